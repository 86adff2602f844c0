"""The evaluation stage: from samples.npz to records.

A sample set that carries its sidecar says itself what it is; one from elsewhere is measured under the name it is given.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from harness import files, registry
from harness.data.images import ImageSet
from harness.environment import environment, timing_of
from harness.errors import Refusal
from harness.held_images import held
from harness.image_sources import ImageSource, from_batches, open_images
from harness.planning import TRAINING_FACTOR
from harness.progress import Stages
from harness.protocols import Protocol, get_protocol
from harness.samples import read_sidecar, sidecar_path
from results.records import Environment, Evaluation, Record, Sampling, Training

if TYPE_CHECKING:
    from evaluators.division import Division
    from evaluators.suites import Suite


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Who measures: a suite, the weights of its features where the user brings them, and where the reference's file
    may hold statistics. device: where the features are computed, in the words of their framework. reference: that file
    as a source, for the guards (statistics in it, stored with loss). allow: guards that the user waives. say: takes
    warnings."""

    suite: Suite
    weights: Path | None = None
    statistics: Path | None = None
    device: str = "cpu"
    reference: ImageSource | None = None
    allow: tuple[str, ...] = ()
    division: Division | None = None  # of extraction among processes; all but the first return no records
    picture: Path | None = None  # where the samples nearest to training images are drawn
    say: Callable[[str], object] = lambda text: sys.stderr.write(f"{text}\n")

    @classmethod
    def of(cls, protocol: Protocol) -> Judge:
        """The protocol's suite, with nothing brought."""
        from evaluators.suites import get_suite

        return cls(suite=get_suite(protocol.suite))


def evaluate(
    path: Path,
    protocol: Protocol,
    data: ImageSet,
    *,
    cache: Path,
    judge: Judge,
    name: str | None = None,
) -> list[Record]:
    """Measure the sample set at `path` with the suite of `judge` against the images of `data`.

    `name` is the row's name for samples without a sidecar. Refused: too few samples, other shapes, other labels.
    """
    source = open_images(path, classes=protocol.num_classes)
    _check_fit(source, protocol, judge)
    with held(source, cache) as images:
        about = describe(path, files.sha256_file(path) if path.is_file() else images.sha256(), name)
        return _measure(images, about, protocol, data, cache=cache, judge=judge, timing=timing_of(path))


def evaluate_images(
    images: Iterable[np.ndarray],
    protocol: Protocol | str,
    data: ImageSet | None = None,
    *,
    name: str,
    count: int | None = None,
    labels: np.ndarray | None = None,
    cache: Path | None = None,
    judge: Judge | None = None,
) -> list[Record]:
    """Measure images that a program makes: what `harness evaluate` says of the same images in a file.

    images: uint8 (n, H, W, C) arrays with values 0 to 255, any n, from a list, a generator or any other iterable; each is
    taken once and copied, so a buffer may be used again. Above 512 MiB they are kept in a nameless file in `cache`.
    protocol: or its name. data: the images to judge by; None: the protocol's data set. name: of the row. count: how many
    images are taken, so that an endless generator is fine; None: all that come. labels: int64, one an image. cache: where
    features of the reference are kept; None: nowhere. judge: None: the protocol's suite.

        records = evaluate_images(my_sampler(batch=100), "digits", name="mine", count=1000)

    Refused as in a file: too few images, another shape or type, what the guards refuse.
    """
    from harness import stages  # which imports this module

    protocol = get_protocol(protocol) if isinstance(protocol, str) else protocol
    judge = judge or Judge.of(protocol)
    data = stages.load_data(protocol, None) if data is None else data
    source = from_batches(images, count, labels=labels, name=name)
    _check_fit(source, protocol, judge)
    with held(source, cache) as kept:
        about = {"system": name, "sampling": Sampling(samples_sha256=kept.sha256())}
        return _measure(kept, about, protocol, data, cache=cache, judge=judge)


def _check_fit(source: ImageSource, protocol: Protocol, judge: Judge) -> None:
    """Before anything is read: the shape, and the number where it is known."""
    shape = (protocol.resolution, protocol.resolution, protocol.image_channels)
    if source.shape != shape:
        text = f"{source.name}: images are {source.shape}, but protocol {protocol.name!r} has {shape} (H, W, C)"
        raise Refusal(f"{text}; sample at that size, or name the protocol of these (resolution)")
    if source.count is not None:
        judge.suite.check_count(source.count)


def _measure(
    source: ImageSource,
    about: dict[str, Any],
    protocol: Protocol,
    data: ImageSet,
    *,
    cache: Path | None,
    judge: Judge,
    timing: Mapping[str, Any] | None = None,
) -> list[Record]:
    """Records of images that are held, by what is known `about` them, and of the time that they took."""
    suite = judge.suite
    suite.check_count(source.count)
    if judge.division is not None and judge.division.index:
        _contribute(source, data, cache, judge)
        return []
    guard(source, data, protocol, judge, about)
    samples = source.array()
    from evaluators.reference import build_reference, with_statistics
    from evaluators.reference_file import check_network
    from evaluators.suites import evaluate_samples

    with Stages({"metrics": "metrics"}) as progress:
        extractor = suite.features.load(judge.device, weights=judge.weights)
        if judge.statistics is not None:
            check_network(judge.statistics, extractor)
        reference = build_reference(data.images, extractor, cache=cache, progress=progress, division=judge.division)
        if judge.statistics is not None:
            reference = with_statistics(reference, judge.statistics)
        measurements = evaluate_samples(
            samples, reference, suite, progress=progress, picture=judge.picture, division=judge.division
        )
    for each in measurements:
        if each.remark:
            judge.say(f"warning ({each.metric}): {each.remark}")
    judged = Evaluation(
        suite=suite.name,
        suite_version=str(suite.version),
        features=suite.features.name,
        features_sha256=reference.extractor.sha256,
        reference_sha256=reference.sha256,
        mode=suite.mode,
    )
    return [
        Record(
            provenance="measured",
            metric=each.metric,
            value=each.value,
            low=each.low,
            high=each.high,
            interval=each.interval,
            n=each.n,
            protocol=protocol.name,
            protocol_version=str(protocol.version),
            resolution=protocol.resolution,
            dataset=protocol.dataset,
            evaluation=judged,
            environment=Environment(**environment(judge.device), **(timing or {})),
            **about,
        )
        for each in measurements
    ]


def _contribute(source: ImageSource, data: ImageSet, cache: Path | None, judge: Judge) -> None:
    """The part of extraction that another process collects."""
    from evaluators.reference import cached, contribute, images_sha256

    assert judge.division is not None
    extractor = judge.suite.features.load(judge.device, weights=judge.weights)
    if cached(data.images, images_sha256(data.images), extractor, cache) is None:
        contribute(data.images, extractor, judge.division)
    contribute(source.array(), extractor, judge.division)


def samples_sha256(path: Path) -> str:
    """Of a file its bytes, of a folder or a pattern the images."""
    return files.sha256_file(path) if path.is_file() else open_images(path).sha256()


def guard(source: ImageSource, data: ImageSet, protocol: Protocol, judge: Judge, about: dict[str, Any]) -> None:
    """Say what is doubtful about samples and reference, and refuse what makes no sense."""
    from evaluators.guards import Task, check, enforce, survey

    task = Task(
        minimum={metric.key: metric.minimum for metric in judge.suite.metrics},
        names=(judge.suite.name, about["system"]),
        classes=protocol.num_classes,
        label_policy=about["sampling"].label_policy,
        reference_statistics=judge.suite.reference_statistics == "expected" and judge.statistics is not None,
        allow=judge.allow,
    )
    if judge.reference is not None:
        reference = survey(judge.reference)
        if reference.brings_statistics and judge.statistics is None:
            text = f"{reference.name} brings mu and sigma, which suite {judge.suite.name} does not use"
            judge.say(f"warning (reference-statistics): {text}: the distance is to its {reference.count} images")
    else:
        reference = survey(data.images, name=f"data set {data.name}", labels=data.labels)
    enforce(check(survey(source), reference, task), judge.say)


def describe(path: Path, sha256: str, name: str | None) -> dict[str, Any]:
    """What the sidecar of the samples at `path` (with hash `sha256`) says of the system behind them, as record fields.

    A sidecar of other samples is refused.
    """
    sidecar = sidecar_path(path)
    if not sidecar.exists():
        sampling = Sampling(samples_sha256=sha256)
        return {"system": name or path.stem, "sampling": sampling}
    data = read_sidecar(path)
    if data.get("sha256") != sha256:
        raise Refusal(f"{path} is not the file that {sidecar} describes (its hash differs); put the right one back")
    try:
        if "system" in data["identity"]:
            return _describe_system(data, sha256, name)
        identity, run = data["identity"], data["identity"]["run"]
        drawn, recipe, compute, trained = identity["sampling"], run["recipe"], data["compute"], data["trained"]
        return {
            "system": name or run["backbone"],
            "backbone": run["backbone"],
            "kind": "denoiser",
            "framework": run["framework"],
            "params": compute["params"],
            "gflops": compute["gflops"],
            "gflops_published_input": compute["gflops_published_input"],
            "training": Training(
                steps=identity["training_steps"],
                images=identity["training_steps"] * recipe["batch"],
                gflops=compute["gflops"] * identity["training_steps"] * recipe["batch"] * TRAINING_FACTOR,
                batch=recipe["batch"],
                learning_rate=recipe["learning_rate"],
                ema_decay=recipe["ema_decay"],
                seed=run["seed"],
                objective=recipe["objective"],
                schedule=recipe["schedule"],
                precision=trained["precision"],
                micro_batch=trained["micro_batch"],
                recipe_hash=files.sha256_json(recipe),
                checkpoint_sha256=identity["checkpoint_sha256"],
            ),
            "sampling": Sampling(
                sampler=drawn["sampler"],
                steps=drawn["steps"],
                evaluations=data["evaluations"],
                eta=drawn["eta"],
                guidance_scale=drawn["guidance_scale"],
                guidance_channels=drawn["guidance_channels"],
                gflops_per_image=compute["gflops"] * data["evaluations"],
                **_decoding(identity.get("decoder"), compute),
                uint8_rule=drawn["uint8_rule"],
                label_policy=drawn["label_policy"],
                clip_denoised=drawn["clip_denoised"],
                precision=drawn["precision"],
                batch=identity["batch"],
                seed=drawn["seed"],
                samples_sha256=sha256,
            ),
        }
    except (KeyError, TypeError) as error:
        raise Refusal(
            f"{sidecar} does not say how the samples were made ({error}); give --name and move it away"
        ) from error


def _decoding(decoder: dict[str, Any] | None, compute: dict[str, Any]) -> dict[str, Any]:
    """What a record says of the decoder of a run in latents; a name alone does not say which weights it had."""
    if decoder is None:
        return {}
    return {
        "decoder": decoder["name"],
        "decoder_gflops": compute["decoder_gflops"],
        "settings_hash": files.sha256_json({"decoder": decoder}),
    }


def _describe_system(data: dict[str, Any], sha256: str, name: str | None) -> dict[str, Any]:
    """The same for a sample set of a system."""
    identity, compute = data["identity"], data["compute"]
    system, weights, drawn = identity["system"], identity["weights"], identity["sampling"]
    base, decoder = system["base"], identity["decoder"]
    parts = {"base": base, "classifier": system["classifier"]}
    for number, stage in enumerate(system["upsamplers"], start=1):
        parts["upsampler" if number == 1 else f"upsampler-{number}"] = stage
    generator = registry.backbones.get(base["backbone"]).kind == "generator"
    hashes = sorted((part, source["sha256"]) for part, source in weights.items())
    return {
        "system": name or system["name"],
        "backbone": "+".join(part["backbone"] for part in parts.values() if part is not None),
        "kind": "generator" if generator else "denoiser",
        "framework": drawn.get("framework", "torch"),
        "params": compute["params"],
        "gflops": compute["gflops"],
        "training": _training_of_parts(parts, weights, files.sha256_json(hashes)),
        "sampling": Sampling(
            sampler=None if generator else base["sampler"],
            steps=None if generator else base["steps"],
            evaluations=data["evaluations"],
            eta=None if generator or base["sampler"] == "ddpm" else base["eta"],
            **_guidance(system),
            gflops_per_image=compute["gflops_per_image"],
            decoder=None if decoder is None else decoder["name"],
            decoder_gflops=compute["decoder_gflops"],
            uint8_rule=drawn["uint8_rule"],
            label_policy=drawn["label_policy"],
            clip_denoised=None if generator else base["clip_denoised"],
            precision=drawn["precision"],
            batch=identity["batch"],
            seed=drawn["seed"],
            stage_steps=_stage_steps(system),
            settings=_settings(system),
            settings_hash=_settings_hash(system, decoder),
            samples_sha256=sha256,
        ),
    }


def _stage_steps(system: dict[str, Any]) -> str | None:
    """Steps of all stages where there are several."""
    stages = (system["base"], *system["upsamplers"])
    return " + ".join(str(stage["steps"]) for stage in stages) if len(stages) > 1 else None


def _settings(system: dict[str, Any]) -> str | None:
    """In words, what the columns of a table, which speak of the base, leave out of a system of several networks."""
    words = []
    for stage in system["upsamplers"]:
        eta = f", eta {stage['eta']:g}" if stage["sampler"] != "ddpm" else ""
        noise = f", conditioning noise {stage['conditioning_noise']:g}" if stage["conditioning_noise"] else ""
        words.append(f"{stage['backbone']} by {stage['sampler']}{eta}{noise}")
    if system["classifier"] is not None and system["base"]["guidance_scale"] != 1:
        words.append(f"guided by {system['classifier']['backbone']} too, scale {system['classifier']['scale']:g}")
    return "; ".join(words) or None


def _settings_hash(system: dict[str, Any], decoder: dict[str, Any] | None) -> str:
    """Of what a system's rows differ in beside their columns: all settings of all parts, without name and steps."""
    stages = [{**stage, "steps": None} for stage in (system["base"], *system["upsamplers"])]
    rest = {name: value for name, value in system.items() if name not in ("name", "base", "upsamplers")}
    return files.sha256_json({"stages": stages, "system": rest, "decoder": decoder})


def _guidance(system: dict[str, Any]) -> dict[str, Any]:
    """Classifier-free guidance, or a classifier's with its scale; one of them, for a record has one scale."""
    base, classifier = system["base"], system["classifier"]
    if classifier is not None and base["guidance_scale"] == 1:
        return {"guidance_scale": classifier["scale"], "guidance_channels": "classifier"}
    guided = base["guidance_scale"] != 1
    return {
        "guidance_scale": base["guidance_scale"],
        "guidance_channels": base["guidance_channels"] if guided else None,
    }


def _training_of_parts(parts: dict[str, Any], weights: dict[str, Any], checkpoint: str) -> Training:
    """What is known of the training: steps and images of the base, compute of all parts if all are runs."""
    base = weights["base"]["run"]
    if base is None:
        return Training(checkpoint_sha256=checkpoint)
    gflops: float | None = 0.0
    for part, source in weights.items():
        if source["run"] is None:
            gflops = None
            break
        spec = registry.backbones.get(parts[part]["backbone"])
        images = source["training_steps"] * source["run"]["recipe"]["batch"]
        gflops += spec.count(**parts[part]["arguments"]).gflops * images * TRAINING_FACTOR
    recipe, steps = base["recipe"], weights["base"]["training_steps"]
    return Training(
        steps=steps,
        images=steps * recipe["batch"],
        gflops=gflops,
        batch=recipe["batch"],
        learning_rate=recipe["learning_rate"],
        ema_decay=recipe["ema_decay"],
        seed=base["seed"],
        objective=recipe["objective"],
        schedule=recipe["schedule"],
        recipe_hash=files.sha256_json(recipe),
        checkpoint_sha256=checkpoint,
    )
