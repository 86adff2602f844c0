"""The plan for a sampler, a schedule and an objective, all given by name; and the network evaluations of guidance."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from harness import registry
from harness.diffusion.guidance import Guidance, read_interval
from harness.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from harness.diffusion.objectives import Objective
    from harness.diffusion.plans import SamplerPlan
    from harness.diffusion.samplers import SamplerSpec


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
) -> SamplerPlan:
    """The plan of `sampler` with `steps` steps. Cached, because cost estimates need the same plan many times.

    diffusion_steps: length of a schedule over timesteps, of which the sampler takes some. eta: for samplers that have it.
    Raises UserError for an unknown name, and for a sampler, schedule, objective and steps that do not fit each other.
    """
    # The key of the cache holds what the names stand for: a name that is registered anew gets a new plan.
    return _cached_plan(
        registry.samplers.get(sampler), registry.objectives.get(objective), schedule, diffusion_steps, steps, eta,
        clip_denoised, spacing, noise_scale,
    )  # fmt: skip


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


def guided_evaluations(plan: SamplerPlan, guidance: Guidance) -> int:
    """Network evaluations for an image: one for each row of the plan, and those that guidance adds in guided rows.

    The same for classifier-free guidance, whose guided rows evaluate the network with the label and without it, and for
    autoguidance, whose guided rows evaluate two networks. Raises UserError for a rule of guidance that is not installed.
    """
    return plan.evaluations + (guidance.evaluations - 1) * int(guided_rows(plan, guidance).sum())


def reference_plan(plan: SamplerPlan, *, objective: str, schedule: str, diffusion_steps: int) -> SamplerPlan:
    """The plan of a second network that is evaluated at the rows of `plan`, on the same x: its own times and coefficients.

    Such a network gives no variance: the variance channels that it may have are not used. Raises UserError where its
    image does not follow from its output at one of the rows.
    """
    import dataclasses

    from harness.diffusion.plans import make_plan
    from harness.diffusion.training import check_fit, process_named

    process, found = process_named(schedule, diffusion_steps, 1.0), registry.objectives.get(objective)
    check_fit(found, process)
    table = dataclasses.replace(plan.table, log_variances=None)
    return make_plan(plan.name, table, found, process, steps=plan.steps, eta=plan.eta, clip_denoised=plan.clip_denoised)


def check_guided_rows(plan: SamplerPlan, guidance: Guidance) -> None:
    """Raise UserError where the interval of guidance holds none of the plan's rows, so that nothing would be guided.

    Also for a rule of guidance that is not installed.
    """
    _ = guidance.custom_rule
    if guidance.interval and not guided_rows(plan, guidance).any():
        raise UserError(
            f"guidance {guidance.short} guides none of the {plan.steps} {plan.name} steps: their noise levels sigma go from "
            f"{plan.sigma.max():.4g} to {plan.sigma.min():.4g}; choose another interval, or more steps"
        )


@functools.lru_cache(maxsize=128)
def _cached_plan(
    spec: SamplerSpec,
    objective: Objective,
    schedule: str,
    diffusion_steps: int,
    steps: int,
    eta: float,
    clip_denoised: bool,
    spacing: str,
    noise_scale: float,
) -> SamplerPlan:
    from harness.diffusion.plans import make_plan
    from harness.diffusion.processes import Process
    from harness.diffusion.samplers import SamplerTask
    from harness.diffusion.training import check_fit, process_named, time_range

    process = process_named(schedule, diffusion_steps, noise_scale)
    check_fit(objective, process)
    first, last = time_range(objective, process) if isinstance(process, Process) else (0.0, 0.0)
    task = SamplerTask(
        process=process,
        steps=steps,
        eta=eta,
        spacing=spacing,
        learned_variance=objective.learned_variance,
        first=first,
        last=last,
    )
    return make_plan(
        spec.name,
        spec.make(task),
        objective,
        process,
        steps=steps,
        eta=eta if spec.has_eta else None,
        clip_denoised=clip_denoised,
    )
