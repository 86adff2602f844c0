"""Noise schedules, respacing, sampler plans and objectives: numpy in float64, no framework.

Everything that depends on the step is computed once here; a framework applies it with plain arithmetic.
"""

from harness.diffusion.objectives import OBJECTIVES, Objective, get_objective
from harness.diffusion.plans import SamplerPlan, ddim_plan, ddpm_plan
from harness.diffusion.respacing import space_timesteps
from harness.diffusion.schedule import SCHEDULES, Schedule

__all__ = [
    "OBJECTIVES",
    "SCHEDULES",
    "Objective",
    "SamplerPlan",
    "Schedule",
    "ddim_plan",
    "ddpm_plan",
    "get_objective",
    "space_timesteps",
]
