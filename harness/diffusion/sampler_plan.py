"""The plan for a sampler, a schedule and an objective, all given by name; and the network evaluations of guidance."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from harness import registry

if TYPE_CHECKING:
    from harness.diffusion.objectives import Objective
    from harness.diffusion.plans import SamplerPlan
    from harness.diffusion.samplers import SamplerSpec


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


def guided_evaluations(evaluations: int, guidance_scale: float) -> int:
    """Network evaluations per image with classifier-free guidance: twice those of the plan, unless the scale is 1 (off)."""
    return evaluations * (2 if guidance_scale != 1 else 1)


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
