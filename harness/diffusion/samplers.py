"""Samplers by name: functions that make a plan from a schedule, a number of steps and the settings.

`harness.diffusion.plans` is imported when a plan is made, so that listing samplers is fast.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.diffusion.objectives import Objective
    from harness.diffusion.plans import SamplerPlan
    from harness.diffusion.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class SamplerSpec:
    """A named sampler.

    make: function of (schedule, steps, objective, eta, clip_denoised) that returns the plan; the schedule is not respaced.
    has_eta: whether the plan depends on eta; if not, sample sets and records have no eta.
    """

    name: str
    summary: str
    make: Callable[[Schedule, int, Objective, float, bool], SamplerPlan]
    has_eta: bool = True


def _ddpm(schedule: Schedule, steps: int, objective: Objective, eta: float, clip_denoised: bool) -> SamplerPlan:
    from harness.diffusion.plans import ddpm_plan

    return ddpm_plan(schedule, steps, variance=objective.variance, clip_denoised=clip_denoised)


def _ddim(schedule: Schedule, steps: int, objective: Objective, eta: float, clip_denoised: bool) -> SamplerPlan:
    from harness.diffusion.plans import ddim_plan

    return ddim_plan(schedule, steps, eta=eta, clip_denoised=clip_denoised)


def _ldm_ddim(schedule: Schedule, steps: int, objective: Objective, eta: float, clip_denoised: bool) -> SamplerPlan:
    from harness.diffusion.plans import ldm_ddim_plan

    return ldm_ddim_plan(schedule, steps, eta=eta, clip_denoised=clip_denoised)


BUILT_IN = (
    SamplerSpec(
        name="ddpm",
        summary="ancestral sampling over respaced steps (Ho et al. 2020; the paper's, 250)",
        make=_ddpm,
        has_eta=False,
    ),
    SamplerSpec(name="ddim", summary="DDIM (Song et al. 2021); --eta 0 is deterministic", make=_ddim),
    SamplerSpec(
        name="ddim-ldm", summary="DDIM over the timesteps of LDM's code, which ends one step early", make=_ldm_ddim
    ),
)
