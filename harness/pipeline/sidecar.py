"""What the sidecar of a sample set says for records: written by the sampler, read by the evaluation.

Under its key `record` a samples.json holds the fields of `results.records.Record` that the samples bring with them. The
sampler makes them from typed values (`fields_of_run`, `fields_of_system`), and `read_fields` gives them back. Sidecars of
schema 1, which had no such key, are read through `upgrade_v1`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import protocols
from harness.compute import TRAINING_FACTOR
from harness.errors import UserError, shown
from harness.images.open import open_images
from harness.io import files
from harness.runs.run import Resolved, recipe_identity
from harness.runs.sample_set import SampleRequest
from harness.runs.samples import read_sidecar, sidecar_path
from harness.systems.binding import Source
from harness.systems.spec import System
from results.records import Record, Sampling, Training

SCHEMA = 2


@dataclass(frozen=True, kw_only=True)
class RecordFields:
    """The fields of a `results.records.Record` that say what made the images. None: not known."""

    system: str
    backbone: str | None = None
    kind: str | None = None
    framework: str | None = None
    params: int | None = None
    gflops: float | None = None
    gflops_published_input: float | None = None
    training: Training | None = None
    sampling: Sampling

    def arguments(self) -> dict[str, Any]:
        """The fields by name, as `Record` takes them."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def as_dict(self) -> dict[str, Any]:
        """Plain data, JSON-ready, without what is None."""
        parts = {name: _known(dataclasses.asdict(part)) for name, part in self._parts().items()}
        return {**_known(self.arguments()), **parts}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RecordFields:
        """The fields of what `as_dict` gives. Raises KeyError, TypeError or UserError for anything else."""
        training = data.get("training")
        parts = {
            "training": None if training is None else Training(**training),
            "sampling": Sampling(**data["sampling"]),
        }
        return cls(**{**data, **parts})

    def of_samples(self, sha256: str, name: str | None = None) -> RecordFields:
        """The same with the hash of the samples, and with `name` for the row where it is given."""
        sampling = dataclasses.replace(self.sampling, samples_sha256=sha256)
        return dataclasses.replace(self, system=name or self.system, sampling=sampling)

    def _parts(self) -> dict[str, Training | Sampling]:
        return {"sampling": self.sampling, **({} if self.training is None else {"training": self.training})}


def _known(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def samples_sha256(path: Path) -> str:
    """The hash of a file's bytes, or of the images in a folder or behind a pattern."""
    return files.sha256_file(path) if path.is_file() else open_images(path).sha256()


def read_fields(path: Path, sha256: str, name: str | None = None) -> RecordFields:
    """What the sidecar of the samples at `path`, whose hash is `sha256`, says for their records.

    name: of the row, in place of the sidecar's. Samples without a sidecar are known by `name`, or by the file's.
    Raises `UserError` for the sidecar of other samples, of a newer harness or of another program.
    """
    sidecar = sidecar_path(path)
    if not sidecar.exists():
        return RecordFields(system=name or path.stem, sampling=Sampling(samples_sha256=sha256))
    data = read_sidecar(path)
    if data.get("sha256") != sha256:
        raise UserError(f"{path} is not the file that {sidecar} describes (its hash differs); put the right one back")
    schema = data.get("schema", 1)
    if type(schema) is int and schema > SCHEMA:
        raise UserError(f"{sidecar} was written by a newer harness (schema {schema}); update this one")
    try:
        if type(schema) is not int or schema < 1:
            raise TypeError(f"schema {shown(schema)} is no schema number")
        data = upgrade_v1(data) if schema == 1 else data
        fields = RecordFields.from_dict(data["record"]).of_samples(sha256, name)
        # A record of them is made here to check their types before the evaluation, which takes time.
        Record(
            provenance="measured", metric="fd", value=0.0, n=1, protocol="", resolution=1, dataset="", **fields.arguments()
        )  # fmt: skip
        return fields
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{sidecar} does not say how the samples were made ({error}); give --name and move it away"
        ) from error


def fields_of_run(
    wanted: SampleRequest,
    *,
    backbone: str,
    framework: str,
    seed: int,  # of the training
    recipe: protocols.Recipe,
    resolved: Resolved,
    params: int,
    gflops: float,  # of a forward pass
    gflops_published_input: float | None,
    evaluations: int,
    decoder_gflops: float | None,  # of an image; None: nothing to decode
) -> RecordFields:
    """What records say of a sample set of a run."""
    images, sampling = wanted.step * recipe.batch, wanted.sampling
    decoder = wanted.decoder
    return RecordFields(
        system=backbone,
        backbone=backbone,
        kind="denoiser",
        framework=framework,
        params=params,
        gflops=gflops,
        gflops_published_input=gflops_published_input,
        training=Training(
            steps=wanted.step,
            images=images,
            gflops=gflops * wanted.step * recipe.batch * TRAINING_FACTOR,
            precision=resolved.precision,
            micro_batch=resolved.micro_batch,
            checkpoint_sha256=wanted.checkpoint_sha256,
            **_of_recipe(recipe, seed),
        ),
        sampling=Sampling(
            sampler=sampling.sampler,
            steps=wanted.steps,
            evaluations=evaluations,
            eta=wanted.eta,
            guidance_scale=sampling.guidance_scale,
            guidance_channels=wanted.guidance_channels,
            gflops_per_image=gflops * evaluations,
            decoder=None if decoder is None else decoder["name"],
            decoder_gflops=decoder_gflops,
            uint8_rule=sampling.uint8_rule,
            label_policy=sampling.label_policy,
            clip_denoised=sampling.clip_denoised,
            precision=wanted.precision,
            batch=wanted.batch,
            seed=sampling.seed,
            # A name alone does not say which weights the decoder had.
            settings_hash=None if decoder is None else files.sha256_json({"decoder": decoder}),
        ),
    )


def fields_of_system(
    system: System,
    sources: Mapping[str, Source],  # by part
    *,
    framework: str,
    seed: int,
    precision: str,
    batch: int,
    params: int,
    gflops: float,  # of a forward pass of each network but the classifier
    gflops_image: float,
    evaluations: int,
    decoder: Mapping[str, Any] | None,  # its identity; None: nothing to decode
    decoder_gflops: float | None,
) -> RecordFields:
    """What records say of a sample set of a system. Where a field has room for one network, it is the base's."""
    base = system.base
    assert base is not None
    generator = base.spec.kind == "generator"
    components = system.components
    scale, channels = _guidance(system)
    return RecordFields(
        system=system.name,
        backbone=system.backbone,
        kind="generator" if generator else "denoiser",
        framework=framework,
        params=params,
        gflops=gflops,
        training=_training_of_parts(system, sources),
        sampling=Sampling(
            sampler=None if generator else base.sampler,
            steps=None if generator else base.steps,
            evaluations=evaluations,
            eta=None if generator or base.sampler == "ddpm" else base.eta,
            guidance_scale=scale,
            guidance_channels=channels,
            gflops_per_image=gflops_image,
            decoder=None if decoder is None else decoder["name"],
            decoder_gflops=decoder_gflops,
            uint8_rule=system.uint8_rule,
            label_policy=system.label_policy,
            clip_denoised=None if generator else base.clip_denoised,
            precision=precision,
            batch=batch,
            seed=seed,
            stage_steps=" + ".join(str(each.steps) for each in components) if len(components) > 1 else None,
            settings=_settings_in_words(system),
            settings_hash=_settings_hash(system, decoder),
        ),
    )


def _of_recipe(recipe: protocols.Recipe, seed: int) -> dict[str, Any]:
    """The fields of `Training` that a recipe and a seed decide."""
    return {
        "batch": recipe.batch,
        "learning_rate": recipe.learning_rate,
        "ema_decay": recipe.ema_decay,
        "seed": seed,
        "objective": recipe.objective,
        "schedule": recipe.schedule,
        "recipe_hash": files.sha256_json(recipe_identity(recipe)),
    }


def _guidance(system: System) -> tuple[float, str | None]:
    """Scale and channels of classifier-free guidance, or scale and "classifier": a record has one scale."""
    base, classifier = system.base, system.classifier
    assert base is not None
    if classifier is not None and base.guidance_scale == 1:
        return classifier.scale, "classifier"
    return base.guidance_scale, base.guidance_channels if base.guidance_scale != 1 else None


def _settings_in_words(system: System) -> str | None:
    """What the columns of a table, which speak of the base, leave out of a system of several networks."""
    words = []
    for each in system.upsamplers:
        eta = f", eta {each.eta:g}" if each.sampler != "ddpm" else ""
        noise = f", conditioning noise {each.conditioning_noise:g}" if each.conditioning_noise else ""
        words.append(f"{each.backbone} by {each.sampler}{eta}{noise}")
    if system.classifier is not None and system.base is not None and system.base.guidance_scale != 1:
        words.append(f"guided by {system.classifier.backbone} too, scale {system.classifier.scale:g}")
    return "; ".join(words) or None


def _settings_hash(system: System, decoder: Mapping[str, Any] | None) -> str:
    """Hash of all settings of all parts but the system's name and the steps, which have columns."""
    data = system.as_dict()
    stages = [{**each, "steps": None} for each in (data["base"], *data["upsamplers"])]
    rest = {name: value for name, value in data.items() if name not in ("name", "base", "upsamplers")}
    return files.sha256_json({"stages": stages, "system": rest, "decoder": decoder})


def _training_of_parts(system: System, sources: Mapping[str, Source]) -> Training:
    """Steps, images and recipe of the base; the compute of all parts, if all are runs."""
    checkpoint = files.sha256_json(sorted((part, source.sha256) for part, source in sources.items()))
    base = sources["base"]
    if base.trained is None:
        return Training(checkpoint_sha256=checkpoint)
    gflops: float | None = 0.0
    for name, part in sorted(system.parts.items()):
        trained = sources[name].trained
        if trained is None or gflops is None:
            gflops = None
        else:
            gflops += part.spec.count(**part.arguments).gflops * trained.images * TRAINING_FACTOR
    return Training(
        steps=base.trained.steps,
        images=base.trained.images,
        gflops=gflops,
        checkpoint_sha256=checkpoint,
        **_of_recipe(base.trained.recipe, base.trained.seed),
    )


def upgrade_v1(sidecar: Mapping[str, Any]) -> dict[str, Any]:
    """A sidecar of schema 1 as one of schema 2, which has the same facts under `record`.

    Schema 1 said them in pieces: identity, compute, evaluations and, of a run, what its training had frozen. Raises
    an error (KeyError, TypeError, ValueError or AttributeError) where one is missing or of another form: a default of
    today is not what an old sidecar left out.
    """
    identity, compute = sidecar["identity"], sidecar["compute"]
    fields = (
        _system_v1(identity, compute, sidecar["evaluations"])
        if "system" in identity
        else _run_v1(identity, compute, sidecar["evaluations"], sidecar["trained"])
    )
    rest = {name: value for name, value in sidecar.items() if name not in ("compute", "trained")}
    return {**rest, "schema": 2, "record": fields.as_dict()}


def _run_v1(
    identity: Mapping[str, Any], compute: Mapping[str, Any], evaluations: int, trained: Mapping[str, Any]
) -> RecordFields:
    run, settings = identity["run"], identity["sampling"]
    given = {field.name: settings[field.name] for field in dataclasses.fields(protocols.Sampling)}
    without_effect = {"eta": settings["sampler"] == "ddpm", "guidance_channels": settings["guidance_scale"] == 1}
    given = {name: value for name, value in given.items() if value is not None or not without_effect.get(name)}
    if None in given.values():
        raise TypeError("a setting of the sampling is null")
    steps = identity["training_steps"]
    recipe = _recipe_v1(run, steps)
    wanted = SampleRequest(
        step=steps,
        sampling=protocols.Sampling(**{**given, "steps": (settings["steps"],)}),
        steps=settings["steps"],
        count=identity["count"],
        precision=settings["precision"],
        batch=identity["batch"],
        compile=settings.get("compile", "off"),
        checkpoint_sha256=identity["checkpoint_sha256"],
        decoder=identity.get("decoder"),
    )
    return fields_of_run(
        wanted,
        backbone=run["backbone"],
        framework=run["framework"],
        seed=run["seed"],
        recipe=recipe,
        resolved=Resolved(**trained),
        params=compute["params"],
        gflops=compute["gflops"],
        gflops_published_input=compute["gflops_published_input"],
        evaluations=evaluations,
        decoder_gflops=None if wanted.decoder is None else compute["decoder_gflops"],
    )


def _recipe_v1(run: Mapping[str, Any], steps: int) -> protocols.Recipe:
    """The recipe of a run, all of whose items the sidecar states."""
    recipe = protocols.Recipe(**{"steps": steps, **run["recipe"]})
    if missing := recipe_identity(recipe).keys() - run["recipe"].keys():
        raise KeyError(min(missing))
    return recipe


def _system_v1(identity: Mapping[str, Any], compute: Mapping[str, Any], evaluations: int) -> RecordFields:
    settings, system = identity["sampling"], System.from_dict(identity["system"])
    diffusions = (identity["system"]["base"], *identity["system"]["upsamplers"])
    if json.loads(json.dumps(system.as_dict())) != identity["system"] or any(
        None in each.values() for each in diffusions
    ):
        raise TypeError("a setting of the system is missing")
    sources = {
        part: Source(path=Path(), sha256=each["sha256"], run=each["run"], steps=each["training_steps"])
        for part, each in identity["weights"].items()
    }
    for source in sources.values():
        if source.run is not None and source.steps is not None:
            _recipe_v1(source.run, source.steps)
    return fields_of_system(
        system,
        sources,
        framework=settings.get("framework", "torch"),
        seed=settings["seed"],
        precision=settings["precision"],
        batch=identity["batch"],
        params=compute["params"],
        gflops=compute["gflops"],
        gflops_image=compute["gflops_per_image"],
        evaluations=evaluations,
        decoder=identity["decoder"],
        decoder_gflops=compute["decoder_gflops"],
    )
