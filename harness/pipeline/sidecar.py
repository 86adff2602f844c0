"""The part of a sidecar that goes into records: written by the sampler, read by the evaluation.

The key `record` of a samples.json holds the fields of `results.records.Record` that describe the samples. The sampler
makes them with `fields_of_run` or `fields_of_system`; the evaluation reads them with `read_fields`. Sidecars of schema 1,
which have no such key, are converted by `upgrade_v1`.
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
from harness.diffusion.auxiliary import AuxiliaryCompute
from harness.diffusion.samplers import has_eta
from harness.errors import UserError, shown
from harness.images.open import open_images
from harness.images.source import printable
from harness.io import files
from harness.planning.request import training_passes
from harness.runs.run import Resolved, recipe_identity
from harness.runs.sample_set import SampleRequest
from harness.runs.samples import find_sidecar, sidecar_path
from harness.systems.binding import Source
from harness.systems.spec import System
from results.records import Record, Sampling, Training

SCHEMA = 2


@dataclass(frozen=True, kw_only=True)
class RecordFields:
    """The fields of a `results.records.Record` that say how the images were made. None: not known."""

    system: str
    backbone: str | None = None
    kind: str | None = None
    framework: str | None = None
    params: int | None = None
    gflops: float | None = None
    gflops_published_input: float | None = None
    gflops_source: str | None = None
    training: Training | None = None
    sampling: Sampling

    def arguments(self) -> dict[str, Any]:
        """The fields by name, as `Record` takes them."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain data, ready for JSON; fields that are None are left out."""
        nested = {"sampling": _without_none(dataclasses.asdict(self.sampling))}
        if self.training is not None:
            nested["training"] = _without_none(dataclasses.asdict(self.training))
        return {**_without_none(self.arguments()), **nested}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RecordFields:
        """The inverse of `as_dict`. Raises KeyError, TypeError or UserError for data of another form."""
        training = data.get("training")
        nested = {
            "training": None if training is None else Training(**training),
            "sampling": Sampling(**data["sampling"]),
        }
        return cls(**{**data, **nested})

    def with_evaluations(self, mean: float, largest: int) -> RecordFields:
        """A copy with the network evaluations of an image, counted in sampling, and the Gflops that follow from the mean."""
        assert self.gflops is not None
        sampling = dataclasses.replace(
            self.sampling, evaluations_mean=mean, evaluations_max=largest, gflops_per_image=self.gflops * mean
        )
        return dataclasses.replace(self, sampling=sampling)

    def with_samples(self, sha256: str, name: str | None = None) -> RecordFields:
        """A copy with the hash of the samples and, if given, with `name` as the row name."""
        sampling = dataclasses.replace(self.sampling, samples_sha256=sha256)
        return dataclasses.replace(self, system=name or self.system, sampling=sampling)


def _without_none(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def samples_sha256(path: Path) -> str:
    """The hash by which records name samples: of the file's bytes; for a folder or a pattern, of the images' pixels."""
    return files.sha256_file(path) if path.is_file() else open_images(path).sha256()


def read_fields(path: Path, sha256: str, name: str | None = None) -> RecordFields:
    """The record fields of the samples at `path`, from their sidecar. sha256: of the samples.

    name: row name, instead of the sidecar's. Without a sidecar, the fields are only `name` (default: the name of the
    file) and the hash. Raises `UserError` for the sidecar of other samples, of a newer harness or of another program.
    """
    name = None if name is None else printable(name)
    sidecar, data = sidecar_path(path), find_sidecar(path)
    if data is None:
        return RecordFields(system=name or name_of(path), sampling=Sampling(samples_sha256=sha256))
    if data.get("sha256") != sha256:
        raise UserError(f"{path} is not the file that {sidecar} describes (its hash differs); put the right one back")
    schema = data.get("schema", 1)
    if type(schema) is int and schema > SCHEMA:
        raise UserError(f"{sidecar} was written by a newer harness (schema {schema}); update this one")
    try:
        if type(schema) is not int or schema < 1:  # not isinstance, which accepts true
            raise TypeError(f"schema {shown(schema)} is not a schema number")
        data = upgrade_v1(data) if schema == 1 else data
        fields = RecordFields.from_dict(data["record"]).with_samples(sha256, name)
        # A record of them is made here to check their types before the evaluation, which takes time.
        Record(
            provenance="measured", metric="fd", value=0.0, n=1, protocol="", resolution=1, dataset="", **fields.arguments()
        )  # fmt: skip
        return fields
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{sidecar} does not say how the samples were made ({error}); give --name and move it away"
        ) from error


def name_of(path: Path) -> str:
    """The row name of samples without a sidecar: the name of their folder, or of their file without its suffix."""
    return printable(path.name if path.is_dir() else path.stem) or str(path)


def fields_of_run(
    sample_set: SampleRequest,
    *,
    backbone: str,
    framework: str,
    seed: int,  # of the training
    recipe: protocols.Recipe,
    resolved: Resolved,
    params: int,
    gflops: float,  # of a forward pass
    gflops_published_input: float | None,
    gflops_source: str | None = None,  # as in a record
    forward_gflops: float | None = None,  # of a forward pass in training, if it is not `gflops`
    passes: int = TRAINING_FACTOR,  # whose compute is that of training on one image
    auxiliary: AuxiliaryCompute | None = None,  # of the recipe's auxiliary loss
    evaluations: int | None,  # None: not known before sampling, as for an adaptive sampler
    decoder_gflops: float | None,  # of an image; None: nothing to decode
    origin: Mapping[str, Any] | None = None,  # fields of `Training` on its data and its fork; None: not known
) -> RecordFields:
    """The record fields of a sample set of a run."""
    sampling, decoder = sample_set.sampling, sample_set.decoder
    images = sample_set.step * recipe.batch
    training_gflops = (
        (gflops if forward_gflops is None else forward_gflops) * sample_set.step * recipe.batch * passes
    )  # another order could change the last bit
    auxiliary_gflops = None if auxiliary is None else auxiliary.training_flops * images / 1e9
    return RecordFields(
        system=backbone,
        backbone=backbone,
        kind="denoiser",
        framework=framework,
        params=params,
        gflops=gflops,
        gflops_published_input=gflops_published_input,
        gflops_source=gflops_source,
        training=Training(
            steps=sample_set.step,
            images=images,
            gflops=training_gflops + (auxiliary_gflops or 0.0),
            auxiliary_gflops=auxiliary_gflops,
            forward_gflops=forward_gflops,
            precision=resolved.precision,
            micro_batch=resolved.micro_batch,
            checkpoint_sha256=sample_set.checkpoint_sha256,
            **_recipe_fields(recipe, seed),
            **(origin or {}),
        ),
        sampling=Sampling(
            sampler=sampling.sampler,
            steps=None if evaluations is None else sample_set.steps,
            evaluations=evaluations,
            eta=sample_set.eta,
            spacing=sampling.spacing or None,
            ema_width=sampling.ema_width or None,
            guidance_scale=sampling.guidance_scale,
            guidance_interval=sampling.guidance_interval or None,
            guidance_rule=sampling.guidance_rule or None,
            guidance_channels=sample_set.guidance_channels,
            gflops_per_image=None if evaluations is None else gflops * evaluations,
            decoder=None if decoder is None else decoder["name"],
            decoder_gflops=decoder_gflops,
            uint8_rule=sampling.uint8_rule,
            label_policy=sampling.label_policy,
            clip_denoised=sampling.clip_denoised,
            precision=sample_set.precision,
            batch=sample_set.batch,
            seed=sampling.seed,
            # The name of the decoder does not say which weights it had.
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
    gflops: float,  # one forward pass of each network except those that guide, in sum
    gflops_image: float | None,
    evaluations: int | None,  # this and gflops_image are None where they are not known before sampling
    decoder: Mapping[str, Any] | None,  # its identity; None: nothing to decode
    decoder_gflops: float | None,
) -> RecordFields:
    """The record fields of a sample set of a system. A field for a single network describes the base."""
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
            steps=None if generator or evaluations is None else base.steps,
            evaluations=evaluations,
            eta=None if generator or not has_eta(base.sampler) else base.eta,
            spacing=base.spacing or None,
            guidance_scale=scale,
            guidance_interval=system.guidance.interval or None,
            guidance_rule=system.guidance.rule or None,
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
            settings=_settings_text(system),
            settings_hash=_settings_hash(system, decoder),
        ),
    )


def _recipe_fields(recipe: protocols.Recipe, seed: int) -> dict[str, Any]:
    """The fields of `Training` that a recipe and a seed decide."""
    return {
        "batch": recipe.batch,
        "learning_rate": recipe.learning_rate,
        "ema_decay": recipe.ema_decay,
        "seed": seed,
        "objective": recipe.objective,
        "schedule": recipe.schedule,
        "time_distribution": None if recipe.time_distribution == "uniform" else recipe.time_distribution,
        "loss_weight": None if recipe.loss_weight == "none" else recipe.loss_weight,
        "noise_scale": None if recipe.noise_scale == 1 else recipe.noise_scale,
        "ema_widths": recipe.ema_widths or None,
        "ema_snapshots": recipe.ema_snapshots if recipe.widths else None,
        "auxiliary": recipe.auxiliary or None,
        "recipe_hash": files.sha256_json(recipe_identity(recipe)),
    }


def _guidance(system: System) -> tuple[float, str | None]:
    """(scale, channels) of classifier-free guidance; (scale, "classifier") if only a classifier guides.

    (scale, "autoguidance") with a weak network, which excludes the others. A record has room for one scale. channels None: no guidance.
    """
    base, classifier = system.base, system.classifier
    assert base is not None
    if system.weak is not None:
        return system.weak.scale, "autoguidance"
    if classifier is not None and base.guidance_scale == 1:
        return classifier.scale, "classifier"
    return base.guidance_scale, base.guidance_channels if base.guidance_scale != 1 else None


def _settings_text(system: System) -> str | None:
    """The settings of parts besides the base as text, because the columns of a table describe only the base."""
    texts = [] if system.weak is None else [f"autoguided by {system.weak.backbone}"]
    for each in system.upsamplers:
        eta = f", eta {each.eta:g}" if has_eta(each.sampler) else ""
        noise = f", conditioning noise {each.conditioning_noise:g}" if each.conditioning_noise else ""
        texts.append(f"{each.backbone} by {each.sampler}{eta}{noise}")
    # If only the classifier guides, its scale is in the record's field of guidance already: see `_guidance`.
    if system.classifier is not None and system.base is not None and system.base.guidance_scale != 1:
        texts.append(f"guided by {system.classifier.backbone} too, scale {system.classifier.scale:g}")
    return "; ".join(texts) or None


def _settings_hash(system: System, decoder: Mapping[str, Any] | None) -> str:
    """Hash of all settings of all parts, except the system's name and the steps, which have columns."""
    data = system.as_dict()
    stages = [{**each, "steps": None} for each in (data["base"], *data["upsamplers"])]
    rest = {name: value for name, value in data.items() if name not in ("name", "base", "upsamplers")}
    return files.sha256_json({"stages": stages, "system": rest, "decoder": decoder})


def _training_of_parts(system: System, sources: Mapping[str, Source]) -> Training:
    """The training fields: steps, images and recipe of the base; the compute of all parts, None unless all are runs.

    Only the hash of the weights is set if the weights of the base are a file.
    """
    checkpoint = files.sha256_json(sorted((part, source.sha256) for part, source in sources.items()))
    base = sources["base"]
    if base.trained is None:
        return Training(checkpoint_sha256=checkpoint)
    gflops: float | None = 0.0  # None as soon as one part is not a run
    for name, part in sorted(system.parts.items()):
        trained = sources[name].trained
        if trained is None or gflops is None or trained.recipe.auxiliary:  # whose compute is not known here
            gflops = None
        else:
            gflops += (
                part.spec.count(**part.arguments).in_training.gflops
                * trained.images
                * training_passes(part.spec, trained.recipe)
            )
    return Training(
        steps=base.trained.steps,
        images=base.trained.images,
        gflops=gflops,
        checkpoint_sha256=checkpoint,
        **_recipe_fields(base.trained.recipe, base.trained.seed),
        **base.origin,
    )


def upgrade_v1(sidecar: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a sidecar of schema 1 in the form of schema 2, where `record` holds the record fields.

    In schema 1 they are spread over the keys identity, compute, evaluations and, for a run, trained (its frozen
    settings). Raises KeyError, TypeError, ValueError or AttributeError if one is missing or of another form: today's
    defaults do not stand in for what an old sidecar leaves out.
    """
    identity, compute = sidecar["identity"], sidecar["compute"]
    fields = (
        _fields_of_system_v1(identity, compute, sidecar["evaluations"])
        if "system" in identity
        else _fields_of_run_v1(identity, compute, sidecar["evaluations"], sidecar["trained"])
    )
    rest = {name: value for name, value in sidecar.items() if name not in ("compute", "trained")}
    return {**rest, "schema": 2, "record": fields.as_dict()}


def _fields_of_run_v1(
    identity: Mapping[str, Any], compute: Mapping[str, Any], evaluations: int, trained: Mapping[str, Any]
) -> RecordFields:
    """The record fields of a sample set of a run, from a sidecar of schema 1. trained: the frozen settings of the run."""
    run, settings = identity["run"], identity["sampling"]
    # Settings that were added later may be missing: they then have their default value.
    given = {
        field.name: settings[field.name]
        for field in dataclasses.fields(protocols.Sampling)
        if field.name in settings or not field.metadata.get("added_later")
    }
    # Settings without effect are null: they are left out here and get a default, which has no effect either.
    without_effect = {"eta": settings["sampler"] == "ddpm", "guidance_channels": settings["guidance_scale"] == 1}
    given = {name: value for name, value in given.items() if value is not None or not without_effect.get(name)}
    if None in given.values():
        raise TypeError("a setting of the sampling is null")
    steps = identity["training_steps"]
    recipe = _recipe_v1(run, steps)
    sample_set = SampleRequest(
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
        sample_set,
        backbone=run["backbone"],
        framework=run["framework"],
        seed=run["seed"],
        recipe=recipe,
        resolved=Resolved(**trained),
        params=compute["params"],
        gflops=compute["gflops"],
        gflops_published_input=compute["gflops_published_input"],
        evaluations=evaluations,
        decoder_gflops=None if sample_set.decoder is None else compute["decoder_gflops"],
    )


def _recipe_v1(run: Mapping[str, Any], steps: int) -> protocols.Recipe:
    """The recipe of a run from its identity `run`, which has no steps. Raises KeyError if one of the other items is missing.

    Items that were added later may be missing: they then have their default value.
    """
    recipe = protocols.Recipe(**{"steps": steps, **run["recipe"]})
    if missing := recipe_identity(recipe).keys() - run["recipe"].keys():
        raise KeyError(min(missing))
    return recipe


def _fields_of_system_v1(identity: Mapping[str, Any], compute: Mapping[str, Any], evaluations: int) -> RecordFields:
    """The record fields of a sample set of a system, from a sidecar of schema 1."""
    settings, system = identity["sampling"], System.from_dict(identity["system"])
    diffusions = (identity["system"]["base"], *identity["system"]["upsamplers"])
    # `from_dict` gives a missing item its default, so the comparison finds what the sidecar does not state. Null states
    # nothing either.
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
            _recipe_v1(source.run, source.steps)  # called for its KeyError
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
