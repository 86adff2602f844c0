"""The plan for a sampler, a schedule and an objective, all given by name; and the network evaluations of guidance."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from harness import registry

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness.diffusion.objectives import Objective
    from harness.diffusion.plans import SamplerPlan
    from harness.diffusion.schedule import Schedule


def sampler_plan(
    sampler: str,
    steps: int,
    *,
    schedule: str,
    diffusion_steps: int,
    objective: str,
    eta: float = 0.0,
    clip_denoised: bool = False,
) -> SamplerPlan:
    """The plan of `sampler` with `steps` steps. Cached, because cost estimates need the same plan many times.

    diffusion_steps: length of the schedule, of which the sampler takes `steps` timesteps. eta: for samplers that have it.

    Raises UserError for an unknown name, and for a sampler, schedule and steps that do not fit each other.
    """
    # The key of the cache holds what the names stand for: a name that is registered anew gets a new plan.
    make = registry.samplers.get(sampler).make
    return _cached_plan(make, registry.objectives.get(objective), schedule, diffusion_steps, steps, eta, clip_denoised)


def guided_evaluations(evaluations: int, guidance_scale: float) -> int:
    """Network evaluations per image with classifier-free guidance: twice those of the plan, unless the scale is 1 (off)."""
    return evaluations * (2 if guidance_scale != 1 else 1)


@functools.lru_cache(maxsize=128)
def _cached_plan(
    make: Callable[[Schedule, int, Objective, float, bool], SamplerPlan],
    objective: Objective,
    schedule: str,
    diffusion_steps: int,
    steps: int,
    eta: float,
    clip_denoised: bool,
) -> SamplerPlan:
    from harness.diffusion.schedule import Schedule

    return make(Schedule.named(schedule, diffusion_steps), steps, objective, eta, clip_denoised)
