"""Requests: a run with all names resolved and all settings checked, before anything expensive begins."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from harness import registry
from harness.compute import TRAINING_FACTOR
from harness.data.examples import Examples
from harness.diffusion.auxiliary import AuxiliaryCompute, read_auxiliary
from harness.diffusion.processes import PROCESSES
from harness.diffusion.sampler_plan import (
    NOMINAL_EVALUATIONS,
    AnyPlan,
    check_guided_rows,
    check_times,
    guided_evaluations,
    sampler_plan,
)
from harness.diffusion.samplers import is_adaptive, needs_timesteps
from harness.engines.ema import snapshot_steps
from harness.errors import UserError
from harness.frameworks.installed import check_installed
from harness.protocols import Protocol, Recipe, Sampling, get_protocol, override
from harness.runs.run import Run, RunSpec, build_arguments, check_plugins, training_plugins
from harness.spec import BackboneSpec, Compute

IN_CONTINUOUS_TIME = "dpm++-2m"  # the sampler where the protocol's needs timesteps and the user names none
ADAPTIVE_STEPS = (1,)  # the `Sampling.steps` of an adaptive sampler: one sample set; the number means nothing
CHECKPOINT_BYTES = 16  # per parameter: weight, EMA and two moments in float32
HEAD_BYTES = 12  # per parameter of the heads of an auxiliary loss, which have no EMA
WEIGHT_BYTES = 4  # per parameter of an average of the weights (float32)


@dataclass(frozen=True, kw_only=True)
class Request:
    """A requested run, with all names resolved and all defaults filled in."""

    spec: BackboneSpec
    protocol: Protocol
    recipe: Recipe
    sampling: Sampling
    samples: int
    seed: int
    framework: str
    data: Path | None
    arguments: dict[str, Any]  # of the network's builder, where they may differ from its defaults
    compute: Compute
    auxiliary: AuxiliaryCompute | None = None  # None: the recipe has no auxiliary loss
    match: Match | None = None  # set if the training steps were matched
    match_sampling: tuple[Match, ...] = ()  # set if the sampler steps were matched

    @property
    def gflops_step(self) -> float:
        """Training compute of one optimiser step."""
        gflops = self.compute.in_training.gflops * self.recipe.batch * training_passes(self.spec, self.recipe)
        return gflops if self.auxiliary is None else gflops + self.auxiliary.training_flops * self.recipe.batch / 1e9

    @property
    def checkpoint_bytes(self) -> int:
        """Size of a checkpoint, with the averages of the recipe's `ema_widths`."""
        heads = 0 if self.auxiliary is None else HEAD_BYTES * self.auxiliary.params
        return (CHECKPOINT_BYTES + WEIGHT_BYTES * len(self.recipe.widths)) * self.compute.params + heads

    def snapshot_bytes(self, steps: Collection[int] = ()) -> int:
        """Disk space of all saved averages of the recipe's `ema_widths`; those of the last step are in its checkpoint.

        steps: at which averages are saved besides those of `ema_snapshots`, such as the steps that are sampled.
        """
        saved = {*snapshot_steps(self.recipe, self.recipe.steps), *steps, self.recipe.steps}
        return (len(saved) - 1) * len(self.recipe.widths) * WEIGHT_BYTES * self.compute.params

    def run_spec(self, data: Examples) -> RunSpec:
        """The definition of the run that trains on `data`, whose identity adds dataset_sha256 and, if any, latents."""
        return RunSpec(
            backbone=self.spec.name,
            protocol=self.protocol,
            recipe=self.recipe,
            seed=self.seed,
            framework=self.framework,
            plugins=training_plugins(self.spec.name, self.recipe),
            auxiliary=self.auxiliary,
            **data.identity,
        )

    def evaluations(self, sampler_steps: int) -> int | None:
        """Network evaluations for one image: the rows of the sampler's plan, those with guidance counted twice.

        None: not known before sampling, as of an adaptive sampler.
        """
        return guided_evaluations(
            plan_of(self.recipe, self.sampling, sampler_steps, self.spec.time), self.sampling.guidance
        )

    def gflops_image(self, sampler_steps: int) -> float | None:
        """Sampling compute of one image, guidance included; None: not known before sampling."""
        evaluations = self.evaluations(sampler_steps)
        return None if evaluations is None else self.compute.gflops * evaluations

    def estimated_gflops_image(self, sampler_steps: int) -> float:
        """As `gflops_image`, and that of NOMINAL_EVALUATIONS where it is not known: to divide work, and for nothing else."""
        gflops = self.gflops_image(sampler_steps)
        return self.compute.gflops * NOMINAL_EVALUATIONS if gflops is None else gflops


def make_request(
    *,
    backbone: str,
    protocol: str,
    steps: int | None = None,
    seed: int = 0,
    framework: str = "torch",
    data: Path | None = None,
    settings: dict[str, str] | None = None,
    sampling: dict[str, Any] | None = None,
    samples: int | None = None,
    gradient_checkpointing: bool = False,
) -> Request:
    """The request with names resolved and defaults filled in. Imports no framework.

    protocol: a name, or a path that ends in .toml. settings: overrides of the recipe. steps: training steps, which also
    override `settings`; None: those of `settings` or the protocol. sampling: overrides of the protocol's sampling
    settings; None values are ignored. samples: None: the protocol's number. Raises `UserError` for an unknown name, and
    for settings that do not fit together.
    """
    loaded = get_protocol(protocol)
    recipe = override(loaded.recipe, {**(settings or {}), **({"steps": steps} if steps else {})})
    return resolve_request(
        backbone, loaded, recipe, seed=seed, framework=framework, data=data, sampling=sampling, samples=samples,
        gradient_checkpointing=gradient_checkpointing,
    )  # fmt: skip


def request_of_run(run: Run, *, sampling: dict[str, Any], samples: int | None = None) -> Request:
    """The request of an existing run; `sampling` overrides the sampling settings of its protocol.

    Raises `UserError` if the run needs a plug-in file that was not given, or was trained with other code of a plug-in.
    """
    there = run.backbone in registry.backbones and run.recipe.objective in registry.objectives
    if run.plugin_files and not there:
        words = " ".join(f"--plugin {name}" for name in run.plugin_files)
        raise UserError(
            f"{run.folder} was made with a plug-in file, which is executed only if you name it: add {words}"
        )
    if there:
        check_plugins(run, training_plugins(run.backbone, run.recipe), sampling=True)
    return resolve_request(
        run.backbone, run.protocol, run.recipe, seed=run.seed, framework=run.framework, data=None, sampling=sampling,
        samples=samples, gradient_checkpointing=run.resolved.gradient_checkpointing, auxiliary=run.auxiliary,
    )  # fmt: skip


def resolve_request(
    backbone: str,
    protocol: Protocol,
    recipe: Recipe,
    *,
    seed: int,
    framework: str,
    data: Path | None,
    sampling: dict[str, Any] | None,
    samples: int | None,
    gradient_checkpointing: bool,
    auxiliary: AuxiliaryCompute | None = None,
) -> Request:
    """The request, after checking that backbone, protocol, recipe and sampling settings fit together.

    A schedule in continuous time is sampled by IN_CONTINUOUS_TIME if the protocol's sampler goes over timesteps and
    `sampling` names none. sampling, samples: as in `make_request`. auxiliary: of an existing run, whose encoder sampling does not need. Raises `UserError` for what does not fit, or if the framework is not installed.
    """
    spec = registry.backbones.get(backbone)
    if spec.kind == "generator":
        raise UserError(
            f"backbone {backbone!r} is a generator, which the harness samples and does not train; "
            "see `harness list systems` and `harness sample --system`"
        )
    if framework not in spec.builders:
        raise UserError(
            f"backbone {backbone!r} has no {framework} network; use --framework {next(iter(spec.builders))}"
        )
    check_installed(framework)
    sampling_settings = override(
        protocol.sampling, {name: value for name, value in (sampling or {}).items() if value is not None}
    )
    if (
        recipe.schedule in PROCESSES
        and needs_timesteps(sampling_settings.sampler)
        and (sampling or {}).get("sampler") is None
    ):
        two_times = registry.objectives.get(recipe.objective).two_times is not None
        sampler = "euler" if two_times else IN_CONTINUOUS_TIME
        sampling_settings = dataclasses.replace(sampling_settings, sampler=sampler)
    if (
        registry.objectives.get(recipe.objective).two_times is not None
        and (sampling or {}).get("clip_denoised") is None
    ):
        # A long step's D is where its direction leads, and an image only if the step ends there.
        sampling_settings = dataclasses.replace(sampling_settings, clip_denoised=False)
    if is_adaptive(sampling_settings.sampler):
        if (sampling or {}).get("steps") not in (None, ADAPTIVE_STEPS):
            raise UserError(
                f"the sampler {sampling_settings.sampler} chooses its own steps, so it makes one sample set: leave out "
                "--sampling-steps, or take a sampler with fixed steps, such as heun"
            )
        sampling_settings = dataclasses.replace(sampling_settings, steps=ADAPTIVE_STEPS)
    objective = registry.objectives.get(recipe.objective)
    most_steps = max(sampling_settings.steps)
    if recipe.schedule not in PROCESSES and most_steps > recipe.diffusion_steps:
        raise UserError(
            f"{most_steps} sampling steps are more than the {recipe.diffusion_steps} steps of the diffusion"
        )
    needs_null_label = sampling_settings.guidance.needs_null_label
    if needs_null_label and spec.null_label is None:
        raise UserError(
            f"backbone {backbone!r} has no null label, so it cannot use classifier-free guidance; leave out --cfg"
        )
    if needs_null_label and recipe.label_dropout == 0:
        raise UserError("guidance needs a network trained with label dropout, but label_dropout is 0; leave out --cfg")
    if sampling_settings.ema_width and not recipe.widths:
        raise UserError(
            "--ema-width needs a run that keeps averages of several widths; train with --set ema_widths=0.05:0.10"
        )
    check_times(spec, objective)
    check_plans(recipe, sampling_settings, spec.time)
    arguments = build_arguments(spec, protocol, objective.out_channels(protocol.in_channels))
    if gradient_checkpointing:
        if "gradient_checkpointing" not in spec.defaults:
            raise UserError(f"backbone {backbone!r} has no gradient checkpointing; leave out --gradient-checkpointing")
        arguments["gradient_checkpointing"] = True
    return Request(
        spec=spec, protocol=protocol, recipe=recipe, sampling=sampling_settings, samples=samples or protocol.samples,
        seed=seed, framework=framework, data=data, arguments=arguments, compute=spec.count(**arguments),
        auxiliary=auxiliary or auxiliary_compute(spec, arguments, protocol, recipe, framework),
    )  # fmt: skip


def training_passes(spec: BackboneSpec, recipe: Recipe) -> int:
    """Forward passes whose compute is that of training on one image: 3, and those of the target of a step (`TwoTimes`)."""
    if spec.times == 1:
        return TRAINING_FACTOR
    two_times = registry.objectives.get(recipe.objective).two_times
    return TRAINING_FACTOR + (0 if two_times is None else two_times.evaluations)


def auxiliary_compute(
    spec: BackboneSpec, arguments: dict[str, Any], protocol: Protocol, recipe: Recipe, framework: str = "torch"
) -> AuxiliaryCompute | None:
    """The compute of the recipe's auxiliary loss, which imports torch; None: it has none.

    Raises `UserError` for unknown names and taps, and for a framework without it.
    """
    if not recipe.auxiliary:
        return None
    wanted = read_auxiliary(recipe.auxiliary)
    loss = registry.auxiliary_losses.get(wanted.name)
    if framework not in loss.builders:
        raise UserError(
            f"auxiliary loss {wanted.name!r} has no heads in {framework}; use --framework {next(iter(loss.builders))}"
        )
    if spec.kind != "denoiser":
        raise UserError(f"auxiliary loss {wanted.name!r} is for denoisers, and {spec.name!r} is of kind {spec.kind}")
    if loss.needs_encoder and not wanted.encoder:
        raise UserError(
            f"auxiliary loss {wanted.name!r} needs an encoder, as in {wanted.name}:efficientnet-lite0-96:{wanted.taps[0]}"
        )
    from harness.engines.torch.auxiliary import count

    return count(spec, spec.arguments(**arguments), wanted, (protocol.image_channels, protocol.resolution))


def check_plans(recipe: Recipe, sampling: Sampling, time: str) -> None:
    """Raise `UserError` if objective, schedule, sampler and steps do not fit together, before anything is trained.

    time: of the backbone (`harness.spec.TIMES`).
    """
    from harness.diffusion.training import TrainingObjective

    TrainingObjective.from_recipe(recipe, time)
    for steps in sampling.steps:
        plan_of(recipe, sampling, steps, time)


def check_guidance_interval(request: Request) -> None:
    """Raise `UserError` if a sample set has no row at which its interval guides.

    Apart from `check_plans`, because matched sampler steps are not known yet when a request is made.
    """
    for steps in request.sampling.steps:
        check_guided_rows(
            plan_of(request.recipe, request.sampling, steps, request.spec.time), request.sampling.guidance
        )


def plan_of(recipe: Recipe, sampling: Sampling, steps: int, time: str = "timestep") -> AnyPlan:
    """The sampler's plan for a network trained with `recipe`, with `steps` instead of `sampling.steps`.

    time: of the backbone, which the number of evaluations does not depend on. Raises `UserError` if sampler, schedule and
    steps do not fit together.
    """
    return sampler_plan(
        sampling.sampler, steps, schedule=recipe.schedule, diffusion_steps=recipe.diffusion_steps,
        objective=recipe.objective, eta=sampling.eta, clip_denoised=sampling.clip_denoised, spacing=sampling.spacing,
        noise_scale=recipe.noise_scale, time=time,
    )  # fmt: skip


def published_input_gflops(request: Request) -> float | None:
    """Gflops at the backbone's default input (the paper's); None if the protocol has the same input."""
    defaults = request.spec.arguments()
    published_input = {name: defaults.get(name) for name in ("input_size", "in_channels")}
    if published_input == {name: request.arguments.get(name) for name in published_input}:
        return None
    return request.spec.count().gflops


@dataclass(frozen=True, kw_only=True)
class Match:
    """Matched steps.

    to: name of the reference, such as dit-xl-2@400000; None: a budget. gflops, gflops_target: of the whole training, or
    of sampling one image.
    """

    to: str | None
    steps: int
    gflops_target: float
    gflops: float
    relative_error: float  # gflops / gflops_target - 1: the error of rounding to whole steps

    @classmethod
    def of(cls, to: str | None, steps: int, target: Fraction, spent: int) -> Match:
        """The match of `steps`, which cost `spent` flops, to a target of `target` flops."""
        return cls(
            to=to, steps=steps, gflops_target=float(target / 10**9), gflops=float(Fraction(spent, 10**9)),
            relative_error=float(spent / target - 1),
        )  # fmt: skip
