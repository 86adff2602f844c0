"""The plan of a registered sampler by the names of its settings, and the network evaluations that follow from it."""

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
    """The plan of `sampler` with `steps` steps; cached, since costs ask for it again and again.

    Raises `UserError` for an unknown name, and where sampler, schedule and steps do not fit each other.
    """
    make = registry.samplers.get(sampler).make
    return _cached(make, registry.objectives.get(objective), schedule, diffusion_steps, steps, eta, clip_denoised)


def guided_evaluations(evaluations: int, guidance_scale: float) -> int:
    """Network evaluations of an image with classifier-free guidance, which asks twice; 1 is no guidance."""
    return evaluations * (2 if guidance_scale != 1 else 1)


@functools.lru_cache(maxsize=128)
def _cached(
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
