"""Plans over a schedule at hand, for tests: `harness.diffusion.sampler_plan` takes names."""

from harness import registry
from harness.diffusion.plans import SamplerPlan, make_plan
from harness.diffusion.samplers import SamplerTask


def plan(sampler, schedule, steps, *, objective="epsilon-fixed", eta=0.0, clip_denoised=False) -> SamplerPlan:
    spec, objective = registry.samplers.get(sampler), registry.objectives.get(objective)
    task = SamplerTask(process=schedule, steps=steps, eta=eta, learned_variance=objective.learned_variance)
    return make_plan(
        spec.name, spec.make(task), objective, schedule, steps=steps, eta=eta if spec.has_eta else None,
        clip_denoised=clip_denoised, time="timestep",
    )  # fmt: skip


def ddpm_plan(schedule, steps, *, variance="learned-range", **options):
    return plan("ddpm", schedule, steps, objective=f"epsilon-{variance.removesuffix('-small')}", **options)


def ddim_plan(schedule, steps, **options):
    return plan("ddim", schedule, steps, **options)


def ldm_ddim_plan(schedule, steps, **options):
    return plan("ddim-ldm", schedule, steps, **options)
