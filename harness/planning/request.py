"""What is asked for, whether it can be had, and what it would cost: before anything expensive begins."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import registry
from harness.compute import TRAINING_FACTOR
from harness.data.examples import Examples
from harness.diffusion.sampler_plan import guided_evaluations, sampler_plan
from harness.errors import UserError
from harness.frameworks.installed import check_installed
from harness.protocols import Protocol, Recipe, Sampling, get_protocol, override
from harness.runs.run import Run, RunSpec, build_arguments
from harness.spec import BackboneSpec, Compute

if TYPE_CHECKING:
    from harness.diffusion.plans import SamplerPlan

CHECKPOINT_BYTES = 16  # a parameter: weight, EMA, two moments in float32


@dataclass(frozen=True, kw_only=True)
class Request:
    """A run as it was asked for, all names resolved and every default filled in."""

    spec: BackboneSpec
    protocol: Protocol
    recipe: Recipe
    sampling: Sampling
    samples: int
    seed: int
    framework: str
    data: Path | None
    arguments: dict[str, Any]  # of the builder
    compute: Compute
    match: Match | None = None  # where the training steps come from, if they were solved for
    match_sampling: tuple[Match, ...] = ()  # the same for the sampler's steps

    @property
    def gflops_step(self) -> float:
        """Training compute of one optimiser step."""
        return self.compute.gflops * self.recipe.batch * TRAINING_FACTOR

    def run_spec(self, data: Examples) -> RunSpec:
        """The identity of the run that trains on `data`."""
        return RunSpec(
            backbone=self.spec.name,
            protocol=self.protocol,
            recipe=self.recipe,
            seed=self.seed,
            framework=self.framework,
            **data.identity,
        )

    def evaluations(self, sampler_steps: int) -> int:
        """Network evaluations for one image: those of the sampler's plan, doubled by guidance."""
        plan = plan_of(self.recipe, self.sampling, sampler_steps)
        return guided_evaluations(plan.evaluations, self.sampling.guidance_scale)

    def gflops_image(self, sampler_steps: int) -> float:
        """Sampling compute of one image, guidance included."""
        return self.compute.gflops * self.evaluations(sampler_steps)


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
    """Resolve names and fill in defaults; whatever does not fit together is refused. Imports no framework."""
    task = get_protocol(protocol)
    recipe = override(task.recipe, {**(settings or {}), **({"steps": steps} if steps else {})})
    return resolve_request(
        backbone, task, recipe, seed=seed, framework=framework, data=data, sampling=sampling, samples=samples,
        gradient_checkpointing=gradient_checkpointing,
    )  # fmt: skip


def request_of_run(run: Run, *, sampling: dict[str, Any], samples: int | None = None) -> Request:
    """The request behind an existing run, with sampling settings laid over its protocol's."""
    return resolve_request(
        run.backbone, run.protocol, run.recipe, seed=run.seed, framework=run.framework, data=None, sampling=sampling,
        samples=samples, gradient_checkpointing=run.resolved.gradient_checkpointing,
    )  # fmt: skip


def resolve_request(
    backbone: str,
    task: Protocol,
    recipe: Recipe,
    *,
    seed: int,
    framework: str,
    data: Path | None,
    sampling: dict[str, Any] | None,
    samples: int | None,
    gradient_checkpointing: bool,
) -> Request:
    """Hold backbone, task, recipe and sampling settings against each other."""
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
    drawing = override(task.sampling, {name: value for name, value in (sampling or {}).items() if value is not None})
    objective = registry.objectives.get(recipe.objective)
    if max(drawing.steps) > recipe.diffusion_steps:
        raise UserError(
            f"{max(drawing.steps)} sampling steps are more than the {recipe.diffusion_steps} steps of the diffusion"
        )
    if drawing.guidance_scale != 1 and spec.null_label is None:
        raise UserError(
            f"backbone {backbone!r} has no null label, so classifier-free guidance cannot be had; leave out --cfg"
        )
    if drawing.guidance_scale != 1 and recipe.label_dropout == 0:
        raise UserError("guidance needs a network trained with label dropout, but label_dropout is 0; leave out --cfg")
    check_plans(recipe, drawing)
    arguments = build_arguments(spec, task, objective.out_channels(task.in_channels))
    if gradient_checkpointing:
        if "gradient_checkpointing" not in spec.defaults:
            raise UserError(f"backbone {backbone!r} has no gradient checkpointing; leave out --gradient-checkpointing")
        arguments["gradient_checkpointing"] = True
    return Request(
        spec=spec, protocol=task, recipe=recipe, sampling=drawing, samples=samples or task.samples, seed=seed,
        framework=framework, data=data, arguments=arguments, compute=spec.count(**arguments),
    )  # fmt: skip


def check_plans(recipe: Recipe, sampling: Sampling) -> None:
    """Try the schedule and the sampler's plans: what does not fit is refused before anything is trained."""
    for steps in sampling.steps:
        plan_of(recipe, sampling, steps)


def plan_of(recipe: Recipe, sampling: Sampling, steps: int) -> SamplerPlan:
    """The sampler's plan for a network trained with `recipe`, with `steps` of the sampler in place of `sampling.steps`.

    Raises `UserError` where sampler, schedule and steps do not fit each other.
    """
    return sampler_plan(
        sampling.sampler, steps, schedule=recipe.schedule, diffusion_steps=recipe.diffusion_steps,
        objective=recipe.objective, eta=sampling.eta, clip_denoised=sampling.clip_denoised,
    )  # fmt: skip


def published_input_gflops(request: Request) -> float | None:
    """Gflops at the backbone's own default input (the paper's), where that differs from the protocol's."""
    defaults = request.spec.arguments()
    here = {name: defaults.get(name) for name in ("input_size", "in_channels")}
    if here == {name: request.arguments.get(name) for name in here}:
        return None
    return request.spec.count().gflops


@dataclass(frozen=True, kw_only=True)
class Match:
    """Steps that were solved for. `to` is None for a budget; the Gflops are those of the training, or of an image."""

    to: str | None
    steps: int
    gflops_target: float
    gflops: float
    relative_error: float  # gflops / gflops_target - 1: what the rounding to whole steps costs

    @classmethod
    def of(cls, to: str | None, steps: int, target: Fraction, spent: int) -> Match:
        """`steps` that cost `spent` flops in all, beside the `target` flops."""
        return cls(
            to=to, steps=steps, gflops_target=float(target / 10**9), gflops=float(Fraction(spent, 10**9)),
            relative_error=float(spent / target - 1),
        )  # fmt: skip
