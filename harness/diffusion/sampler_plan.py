"""The plan for a sampler, a schedule and an objective, all given by name; and the network evaluations of guidance."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, TypeAlias, Union

from harness import registry
from harness.diffusion.guidance import Guidance, read_interval
from harness.errors import UserError, shown

if TYPE_CHECKING:
    import numpy as np

    from harness.diffusion.adaptive import AdaptivePlan
    from harness.diffusion.objectives import Objective
    from harness.diffusion.plans import SamplerPlan
    from harness.diffusion.processes import Process
    from harness.diffusion.samplers import SamplerSpec
    from harness.diffusion.schedule import Schedule
    from harness.spec import BackboneSpec

AnyPlan: TypeAlias = Union["SamplerPlan", "AdaptivePlan"]  # AdaptivePlan: of a sampler whose steps are its own affair
# Network evaluations of an image, about, where an adaptive sampler's are not known but the work has to be divided.
NOMINAL_EVALUATIONS = 100
ROUNDING = 1e-9  # relative, of a noise level that is compared with the end of an interval


def sampler_plan(
    sampler: str,
    steps: int,
    *,
    schedule: str,
    diffusion_steps: int,
    objective: str,
    eta: float = 0.0,
    clip_denoised: bool = False,
    spacing: str = "",
    noise_scale: float = 1.0,
    time: str = "timestep",
) -> AnyPlan:
    """The plan of `sampler` with `steps` steps. Cached, because cost estimates need the same plan many times.

    sampler: a name, with values of its options or without (`harness.diffusion.samplers.read_sampler`). steps: without
    meaning for an adaptive sampler. diffusion_steps: length of a schedule over timesteps, of which the sampler takes some.
    eta: for samplers that have it. time: of the backbone (`harness.spec.TIMES`).
    Raises UserError for an unknown name, and for a sampler, schedule, objective and steps that do not fit each other.
    """
    from harness.diffusion.samplers import read_sampler

    spec, options = read_sampler(sampler)
    # The key of the cache holds what the names stand for: a name that is registered anew gets a new plan.
    return _cached_plan(
        spec, tuple(options.items()), registry.objectives.get(objective), schedule, diffusion_steps, steps, eta,
        clip_denoised, spacing, noise_scale, time,
    )  # fmt: skip


def check_times(spec: BackboneSpec, objective: Objective) -> None:
    """Raise UserError where a network of one time is to be trained or sampled by an objective of two, or the reverse."""
    if spec.times == 2 and objective.two_times is None:
        raise UserError(
            f"backbone {spec.name!r} is given two times, t and the end of a step, and the objective {objective.name} trains "
            "networks of one: give --set objective=NAME of one that states two_times"
        )
    if spec.times == 1 and objective.two_times is not None:
        raise UserError(
            f"the objective {objective.name} trains networks of two times, t and the end of a step, and backbone "
            f"{spec.name!r} is given one: give a backbone with times=2, or another objective"
        )


def guided_rows(plan: SamplerPlan, guidance: Guidance) -> np.ndarray:
    """bool (E,): the rows of the plan at which guidance is applied."""
    import numpy as np

    if guidance.scale == 1:
        return np.zeros(plan.evaluations, dtype=bool)
    if not guidance.interval:
        return np.ones(plan.evaluations, dtype=bool)
    low, high = read_interval(guidance.interval)
    # The ends belong to the interval, also where sigma was computed with a rounding error, as 9 at t = 0.9 of flow.
    rows: np.ndarray = (plan.sigma >= low * (1 - ROUNDING)) & (plan.sigma <= high * (1 + ROUNDING))
    return rows


def guided_evaluations(plan: AnyPlan, guidance: Guidance) -> int | None:
    """Network evaluations for an image: one for each row of the plan, and those that guidance adds in guided rows.

    The same for classifier-free guidance, whose guided rows evaluate the network with the label and without it, and for
    autoguidance, whose guided rows evaluate two networks. None: they are not known before sampling, because every image
    has its own number. Raises UserError for a rule of guidance that is not installed.
    """
    from harness.diffusion.adaptive import AdaptivePlan

    if isinstance(plan, AdaptivePlan):
        return None
    return plan.evaluations + (guidance.evaluations - 1) * int(guided_rows(plan, guidance).sum())


def not_known(sampler: str) -> UserError:
    """The error of whatever needs the evaluations of an adaptive sampler before images are drawn."""
    return UserError(
        f"the network evaluations of {sampler} are not known before sampling, because every image has its own; choose a "
        "sampler with a fixed number, such as heun"
    )


def reference_plan(
    plan: SamplerPlan, *, objective: str, schedule: str, diffusion_steps: int, noise_scale: float = 1.0,
    time: str = "timestep",
) -> SamplerPlan:  # fmt: skip
    """The plan of a second network that is evaluated at the rows of `plan`, on the same x: its own times and coefficients.

    Such a network gives no variance: the variance channels that it may have are not used. Raises UserError where its
    image does not follow from its output at one of the rows.
    """
    import dataclasses

    from harness.diffusion.plans import make_plan
    from harness.diffusion.training import check_fit, process_named

    process, found = process_named(schedule, diffusion_steps, noise_scale), registry.objectives.get(objective)
    check_fit(found, process, time)
    table = dataclasses.replace(plan.table, log_variances=None)
    return make_plan(
        plan.name, table, found, process, steps=plan.steps, eta=plan.eta, clip_denoised=plan.clip_denoised, time=time
    )


def check_guided_rows(plan: AnyPlan, guidance: Guidance) -> None:
    """Raise UserError where the interval of guidance holds none of the plan's rows, so that nothing would be guided.

    Also for a rule of guidance that is not installed, or that the plan does not have.
    """
    from harness.diffusion.adaptive import AdaptivePlan

    _ = guidance.custom_rule
    if isinstance(plan, AdaptivePlan):
        plan.segments(guidance)  # for its UserError
        return
    if guidance.interval and not guided_rows(plan, guidance).any():
        raise UserError(
            f"guidance {guidance.short} guides none of the {plan.steps} {plan.name} steps: their noise levels sigma go from "
            f"{plan.sigma.max():.4g} to {plan.sigma.min():.4g}; choose another interval, or more steps"
        )


@functools.lru_cache(maxsize=128)
def _cached_plan(
    spec: SamplerSpec,
    options: tuple[tuple[str, Any], ...],
    objective: Objective,
    schedule: str,
    diffusion_steps: int,
    steps: int,
    eta: float,
    clip_denoised: bool,
    spacing: str,
    noise_scale: float,
    time: str,
) -> AnyPlan:
    from harness.diffusion.plans import make_plan
    from harness.diffusion.processes import Process
    from harness.diffusion.samplers import SamplerTask
    from harness.diffusion.training import check_fit, process_named, time_range

    process = process_named(schedule, diffusion_steps, noise_scale)
    check_fit(objective, process, time)
    if spec.make is None:
        return _adaptive_plan(spec.name, objective, process, spacing, clip_denoised, time)
    first, last = time_range(objective, process) if isinstance(process, Process) else (0.0, 0.0)
    task = SamplerTask(
        process=process,
        steps=steps,
        eta=eta,
        spacing=spacing,
        learned_variance=objective.learned_variance,
        first=first,
        last=last,
        options=dict(options),
    )
    return make_plan(
        spec.name,
        spec.make(task),
        objective,
        process,
        steps=steps,
        eta=eta if spec.has_eta else None,
        clip_denoised=clip_denoised,
        time=time,
    )


def _adaptive_plan(
    sampler: str, objective: Objective, process: Schedule | Process, spacing: str, clip_denoised: bool, time: str
) -> AdaptivePlan:
    from harness.diffusion.adaptive import make_adaptive_plan
    from harness.diffusion.processes import PROCESSES, Process
    from harness.diffusion.training import time_range

    if not isinstance(process, Process):
        raise UserError(
            f"the sampler {sampler} asks the network at any t, and {process.name} is a table of the timesteps that it was "
            f"trained at: take another sampler, such as heun, or a schedule in continuous time ({', '.join(PROCESSES)})"
        )
    if objective.two_times is not None:
        raise UserError(
            f"the sampler {sampler} follows the direction at one time, and a network of the objective {objective.name} predicts "
            "steps: take euler"
        )
    if spacing:
        raise UserError(f"the sampler {sampler} chooses its own times: leave out the spacing {shown(spacing)}")
    first, last = time_range(objective, process)
    return make_adaptive_plan(
        sampler, objective, process, first=first, last=last, clip_denoised=clip_denoised, time=time
    )
