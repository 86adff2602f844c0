"""Plans: what a run costs and what is missing for it, calculated before anything expensive begins."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import registry
from harness.compute import TRAINING_FACTOR
from harness.data.public_files import FILES
from harness.diffusion.guidance import Guidance
from harness.errors import UserError
from harness.planning.request import Match, Request, published_input_gflops, training_passes
from harness.protocols import Protocol
from harness.runs import checkpoints


@dataclass(frozen=True, kw_only=True)
class TrainingCost:
    """Training: optimiser steps, images per batch, images in total, Gflops in total, those of an auxiliary loss included.

    auxiliary: of the recipe's auxiliary loss, for one image: "encoder_gflops" (forward alone), "heads_gflops" (one pass, of
    which training counts three); and "gflops" in total. None: it has none. forward_gflops: of a forward pass on one image in
    training, if it is not that of sampling (`BackboneSpec.masked_training`). passes: forward passes whose compute is that of
    training on one image, if they are not 3 (`harness.diffusion.objectives.TwoTimes`).
    """

    steps: int
    batch: int
    images: int
    gflops: float
    auxiliary: dict[str, float] | None = None
    forward_gflops: float | None = None
    passes: int | None = None


@dataclass(frozen=True, kw_only=True)
class SamplingCost:
    """One sample set: its sampler settings, Gflops of one image and of all images.

    steps, gflops_per_image, gflops: None for an adaptive sampler, of which they are not known before sampling.
    """

    sampler: str
    steps: int | None
    guidance_scale: float
    gflops_per_image: float | None
    gflops: float | None
    guidance_interval: str = ""  # of noise levels; "": guidance at all
    guidance_rule: str = ""  # of a package; "": classifier-free guidance

    @property
    def guidance(self) -> Guidance:
        """The scale of guidance, its interval and its rule."""
        return Guidance(self.guidance_scale, self.guidance_interval, self.guidance_rule)


@dataclass(frozen=True, kw_only=True)
class MeasuredCost:
    """Measurements on this machine: speed, memory, time.

    compile: whether the network is compiled and why, such as "on (...)"; None: the framework has no choice, or the plan
    did not measure it. memory_bytes: needed; free_bytes: available. images_per_second: of training, by precision.
    training_seconds, sampling_seconds: of the whole run.
    """

    device: str
    precision: str
    micro_batch: int
    compile: str | None
    memory_bytes: int
    free_bytes: int
    images_per_second: dict[str, float]
    steps_per_second: float
    training_seconds: float
    sampling_seconds: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run would cost.

    input: of the network, as "32x32x4" (side, side, channels). gflops: of one forward pass at that input. gflops_source:
    "closed form" or "traced". gflops_published_input: gflops at the paper's input, if that differs. match: how the
    training steps were matched; None: they were not. match_sampling: the same for sampler steps, one for each number.
    samples: of each sample set. disk_bytes: two checkpoints, the saved averages of `ema_widths` and the samples; EMA
    checkpoints, latents and the report are not counted.
    missing: what prevents the run on this machine, one sentence each. missing_evaluator_files: files that the
    evaluation needs; without them a run ends after sampling. measured: None if nothing was measured.
    """

    backbone: str
    protocol: str
    input: str
    params: int
    gflops: float
    gflops_source: str
    gflops_published_input: float | None
    training: TrainingCost
    sampling: tuple[SamplingCost, ...]
    match: Match | None
    match_sampling: tuple[Match, ...]
    samples: int
    disk_bytes: int
    recipe: dict[str, Any]
    missing: tuple[str, ...]
    missing_evaluator_files: tuple[str, ...]
    measured: MeasuredCost | None = field(default=None)

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain data, ready for JSON. An interval and a rule of guidance appear where there is one."""
        data = dataclasses.asdict(self)
        for name in ("auxiliary", "forward_gflops", "passes"):
            if data["training"][name] is None:
                del data["training"][name]
        for row in data["sampling"]:
            for name in ("guidance_interval", "guidance_rule"):
                if not row[name]:
                    del row[name]
        return data


def make_plan(
    request: Request, *, check_files: bool = False, decoder: str | None = None, decoder_entry: str | None = None
) -> Plan:
    """The plan of a request, without measurements.

    check_files: whether `missing` also says what a run finds out itself when it reads its files: data that cannot be read
    or do not fit the protocol, and, for a run in latents, that its autoencoder is gone or has weights that cannot be read.
    decoder: that autoencoder; None: the one that made the latents. decoder_entry: of its weight file.
    """
    compute, recipe, sampling, protocol = request.compute, request.recipe, request.sampling, request.protocol
    images = recipe.steps * recipe.batch
    reasons = missing(request)
    if check_files:
        reasons += [*unfit_data(request), *unfit_decoder(request, decoder, decoder_entry)]
    passes = training_passes(request.spec, recipe)
    training = TrainingCost(
        steps=recipe.steps, batch=recipe.batch, images=images, gflops=compute.in_training.gflops * images * passes,
        forward_gflops=None if compute.training is None else compute.training.gflops,
        passes=None if passes == TRAINING_FACTOR else passes,
    )  # fmt: skip
    if request.auxiliary is not None:
        extra = request.auxiliary
        gflops = extra.training_flops * images / 1e9
        training = dataclasses.replace(
            training,
            gflops=training.gflops + gflops,
            auxiliary={"encoder_gflops": extra.encoder / 1e9, "heads_gflops": extra.heads / 1e9, "gflops": gflops},
        )
    # A part of a system, such as an upsampler, cannot generate images alone.
    sampler_steps = sampling.steps if request.spec.kind == "denoiser" else ()
    return Plan(
        backbone=request.spec.name,
        protocol=protocol.name,
        input=f"{protocol.input_size}x{protocol.input_size}x{protocol.in_channels}",
        params=compute.params,
        gflops=compute.gflops,
        gflops_source=compute.source,
        gflops_published_input=published_input_gflops(request),
        training=training,
        sampling=tuple(_sampling_cost(request, steps) for steps in sampler_steps),
        match=request.match,
        match_sampling=request.match_sampling,
        samples=request.samples,
        disk_bytes=checkpoints.KEPT * request.checkpoint_bytes
        + request.snapshot_bytes()
        + len(sampler_steps) * request.samples * protocol.resolution**2 * protocol.image_channels,
        recipe=dataclasses.asdict(recipe),
        missing=tuple(reasons),
        missing_evaluator_files=tuple(missing_evaluator_files(protocol)),
    )


def _sampling_cost(request: Request, steps: int) -> SamplingCost:
    gflops_image = request.gflops_image(steps)
    return SamplingCost(
        sampler=request.sampling.sampler,
        steps=None if gflops_image is None else steps,
        guidance_scale=request.sampling.guidance_scale,
        gflops_per_image=gflops_image,
        gflops=None if gflops_image is None else gflops_image * request.samples,
        guidance_interval=request.sampling.guidance_interval,
        guidance_rule=request.sampling.guidance_rule,
    )


def missing(request: Request) -> list[str]:
    """What the request needs and this machine does not have: one sentence for each, with the fix."""
    from evaluators.suites import get_suite

    protocol, reasons = request.protocol, []
    if protocol.dataset not in registry.datasets:
        reasons.append(
            f"data set {protocol.dataset!r}: no reader of that name is installed (see `harness list datasets`)"
        )
    elif protocol.space == "latents":
        from harness.data import latents

        if (reason := latents.missing(request.data, protocol)) is not None:
            reasons.append(f"data set {protocol.dataset!r} in latents: {reason}")
    elif (reason := registry.datasets.get(protocol.dataset).missing(request.data, protocol.resolution)) is not None:
        reasons.append(f"data set {protocol.dataset!r}: {reason}")
    try:
        suite = get_suite(protocol.suite)
    except UserError as error:
        reasons.append(f"suite {protocol.suite!r}: {error} (see `harness list suites`)")
    else:
        unmet = [metric for metric in suite.metrics if request.samples < metric.minimum]
        if unmet:
            reasons.append(f"samples: {unmet[0].key} needs at least {unmet[0].minimum} samples, not {request.samples}")
    return reasons


def unfit_data(request: Request) -> list[str]:
    """One sentence if the data are there, but a run would refuse them: unreadable, of another size, without labels.

    The data are opened as a run opens them.
    """
    from harness.data.load import check_labels, training_data

    protocol = request.protocol
    if protocol.dataset not in registry.datasets:
        return []
    dataset = registry.datasets.get(protocol.dataset)
    # `missing` reports that files are missing; the digits, which have none, always fit
    if protocol.space == "latents":
        from harness.data import latents

        if latents.missing(request.data, protocol) is not None:
            return []
    elif dataset.missing(request.data, protocol.resolution) is not None or request.data is None and not dataset.finder:
        return []
    try:
        data = training_data(protocol, request.data)
        data.check(protocol)
        check_labels(data, protocol.num_classes)
    except UserError as error:
        return [str(error)]
    return []


def unfit_decoder(request: Request, name: str | None = None, entry: str | None = None) -> list[str]:
    """One sentence if the autoencoder of a run in latents is gone, or its weight file cannot be read; else nothing.

    name: of --decoder; None: the autoencoder that made the latents. entry: of its weight file.
    """
    from harness.autoencoders.files import check_weights
    from harness.data import latents

    if request.protocol.space != "latents":
        return []
    if name is None:
        if request.data is None or latents.missing(request.data, request.protocol) is not None:  # `missing` reports it
            return []
        meta = latents.read_meta(request.data)
        name, entry = meta.source_paths.get("vae", ""), meta.vae.get("entry")
        if not Path(name).is_absolute():  # a name, whose files are on the hub
            return []
        if not Path(name).exists():
            return [
                f"the autoencoder behind {request.data} is no longer at {name}; give it, or another one, with "
                "--decoder DIR"
            ]
    try:
        check_weights(name, "--decoder DIR", entry)
    except UserError as error:
        return [str(error)]
    return []


def missing_evaluator_files(protocol: Protocol, *, reference_given: bool = False) -> list[str]:
    """One sentence if the user must give files for the protocol's suite; without them a run ends after sampling.

    reference_given: whether the reference is given, but not the weights. Then only Inception's are missing: the other
    networks have default weights, which are used as soon as there is a reference.
    """
    flag = _weights_flag(protocol)
    if not flag or (reference_given and flag != "--inception"):
        return []
    names = ("inception",) if reference_given else ("inception", protocol.name)
    public = [name for name in names if name in FILES] if flag == "--inception" else []
    fetch = f" ({', '.join(f'`harness data fetch {name}`' for name in public)})" if public else ""
    wanted = f"{flag} FILE" if reference_given else f"{flag} FILE and --reference FILE"
    return [f"suite {protocol.suite!r} needs {wanted}{fetch}"]


def evaluate_command(protocol: Protocol, samples: Path) -> str:
    """The command that evaluates a sample set later, with the files that the suite needs.

    Files that `harness data fetch` downloads appear under their names there, the others as placeholders such as
    REFERENCE.npz. Call it only if the suite's network takes a weight file.
    """
    flag = _weights_flag(protocol)
    reference = FILES[protocol.name].file if protocol.name in FILES else "REFERENCE.npz"
    weights = FILES["inception"].file if flag == "--inception" else "FILE"
    return f"harness evaluate {samples} {flag} {weights} --reference {reference}"


def _weights_flag(protocol: Protocol) -> str:
    """The flag for the weights of the suite's network; empty if the suite includes them or is unknown."""
    from evaluators.suites import get_suite

    try:
        return get_suite(protocol.suite).features.weights_option
    except UserError:  # `missing` reports it
        return ""
