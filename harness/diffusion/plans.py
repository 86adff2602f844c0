"""Sampler plans: every per-step coefficient of a sampler, computed once in float64.

All plans share one form, which a framework applies with plain arithmetic. At step k, with the network's epsilon:

    x0   = x0_from_x[k] x - x0_from_eps[k] eps             clamped to [-1, 1] with clip_denoised
    mean = mean_from_x0[k] x0 + mean_from_x[k] x
    x    = mean + std noise                                where adds_noise[k], else x = mean

std is exp(log variance / 2) with log variance = frac log_variance_high[k] + (1 - frac) log_variance_low[k] and
frac = (v + 1) / 2 of the network's variance channels v (Nichol & Dhariwal 2021, eq. 15) when learned_variance,
else noise_std[k].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np

from harness.diffusion.respacing import space_timesteps
from harness.diffusion.schedule import Schedule
from harness.errors import UserError

VARIANCES = ("learned-range", "fixed-small")


@dataclass(frozen=True, kw_only=True, eq=False)
class SamplerPlan:
    """A sampler over one schedule. Arrays are (S,) in the order of execution, float64 unless noted, read-only."""

    name: str  # "ddpm", "ddim" or "ddim-ldm"
    schedule: str  # name of the noise schedule
    steps: int  # S
    evaluations: int  # network evaluations for each image, without those that classifier-free guidance adds
    eta: float | None  # DDIM's share of DDPM noise; None for DDPM, by which engines tell the two apart
    learned_variance: bool  # True: the network must give 2 C channels
    clip_denoised: bool  # clamp x0 to [-1, 1]; for pixels, never for latents
    timesteps: np.ndarray  # int64: original timesteps, the network's input, descending
    x0_from_x: np.ndarray
    x0_from_eps: np.ndarray
    mean_from_x0: np.ndarray
    mean_from_x: np.ndarray
    log_variance_low: np.ndarray  # posterior log variance, clipped
    log_variance_high: np.ndarray  # log beta
    noise_std: np.ndarray  # of the fixed variance, not used with learned_variance; 0 where no noise is added
    adds_noise: np.ndarray  # bool; False at the last step of ddpm and ddim, and everywhere with eta 0

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, np.ndarray):
                assert value.shape == (self.steps,) and np.isfinite(value).all(), item.name
                value.flags.writeable = False


def ddpm_plan(
    schedule: Schedule,  # not respaced, as from Schedule.named
    steps: int | str,  # a count, or another spacing of `space_timesteps`
    *,
    variance: str = "learned-range",  # or "fixed-small", the posterior variance
    clip_denoised: bool = False,  # off in the paper's sampling script
) -> SamplerPlan:
    """Ancestral sampling (Ho et al. 2020, algorithm 2) over `steps` of the schedule's timesteps.

    Raises UserError for an unknown variance and for steps that do not fit.
    """
    if variance not in VARIANCES:
        raise UserError(f"unknown sampling variance {variance!r}: known are {', '.join(VARIANCES)}")
    spaced = schedule.respaced(space_timesteps(len(schedule), steps))
    adds_noise = np.arange(len(spaced)) > 0  # not at the first timestep, which is the last step
    return _plan(
        spaced,
        name="ddpm",
        eta=None,
        learned_variance=variance == "learned-range",
        clip_denoised=clip_denoised,
        mean_from_x0=spaced.posterior_mean_from_x0,
        mean_from_x=spaced.posterior_mean_from_xt,
        noise_std=np.exp(0.5 * spaced.posterior_log_variance_clipped) * adds_noise,
        adds_noise=adds_noise,
    )


def ddim_plan(
    schedule: Schedule,  # not respaced
    steps: int | str,  # "ddim50" gives the paper's whole strides; 50 the evenly rounded ones
    *,
    eta: float = 0.0,  # 0 is deterministic, 1 has DDPM's noise
    clip_denoised: bool = False,
) -> SamplerPlan:
    """DDIM (Song et al. 2021, eq. 12 and 16). The network's variance channels, if any, are not used.

    Eq. 12 adds sqrt(1 - abar_prev - sigma^2) eps to sqrt(abar_prev) x0. Here eps is written as
    (x0_from_x x - x0) / x0_from_eps, from the clamped x0, which gives the common form in x0 and x.
    Raises UserError for eta outside [0, 1] and for steps that do not fit.
    """
    if not (math.isfinite(eta) and 0 <= eta <= 1):
        raise UserError(f"DDIM eta {eta:g} is out of range: give a number from 0 to 1")
    spaced = schedule.respaced(space_timesteps(len(schedule), steps))
    sigma = eta * np.sqrt(spaced.posterior_variance)  # eq. 16: the posterior's standard deviation times eta
    direction = np.sqrt(1.0 - spaced.abar_prev - sigma**2) / spaced.sqrt_recipm1_abar
    return _plan(
        spaced,
        name="ddim",
        eta=float(eta),
        learned_variance=False,
        clip_denoised=clip_denoised,
        mean_from_x0=np.sqrt(spaced.abar_prev) - direction,
        mean_from_x=direction * spaced.sqrt_recip_abar,
        noise_std=sigma,
        adds_noise=sigma > 0,
    )


def ldm_ddim_plan(
    schedule: Schedule,  # not respaced
    steps: int,
    *,
    eta: float = 0.0,
    clip_denoised: bool = False,
) -> SamplerPlan:
    """DDIM as in LDM's code: timesteps 1, 1 + c, 1 + 2c, ... for an integer stride c; the last step goes to abar[0].

    CompVis/latent-diffusion a506df5, ldm/modules/diffusionmodules/util.py (make_ddim_timesteps,
    make_ddim_sampling_parameters). So the noise of timestep 0 is left after the last step, which also adds noise if
    eta > 0. Raises UserError for eta outside [0, 1] and for steps that do not fit.
    """
    if not (math.isfinite(eta) and 0 <= eta <= 1):
        raise UserError(f"DDIM eta {eta:g} is out of range: give a number from 0 to 1")
    timesteps = np.arange(0, len(schedule), max(len(schedule) // max(int(steps), 1), 1)) + 1
    if len(timesteps) != int(steps) or timesteps[-1] >= len(schedule):
        # The counts that fit are the divisors of the length, except the length itself: with stride 1, the first timestep
        # being 1, the last would be beyond the schedule.
        fitting = [n for n in range(1, len(schedule) // 2 + 1) if len(schedule) % n == 0]
        nearest = min(fitting, key=lambda n: abs(n - int(steps)), default=None)
        remedy = "use the sampler ddim" if nearest is None else f"{nearest} steps fit"
        raise UserError(
            f"ddim-ldm takes whole strides, and no stride takes {steps} of {len(schedule)} timesteps; {remedy}"
        )
    # Only sqrt_recip_abar and sqrt_recipm1_abar of `spaced` are used: its abar_prev begins with 1, and LDM's with abar[0].
    spaced = schedule.respaced(timesteps)
    abar = schedule.abar[timesteps]
    abar_prev = np.append(schedule.abar[0], abar[:-1])
    sigma = eta * np.sqrt((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev))
    direction = np.sqrt(1.0 - abar_prev - sigma**2) / spaced.sqrt_recipm1_abar
    return _plan(
        spaced,
        name="ddim-ldm",
        eta=float(eta),
        learned_variance=False,
        clip_denoised=clip_denoised,
        mean_from_x0=np.sqrt(abar_prev) - direction,
        mean_from_x=direction * spaced.sqrt_recip_abar,
        noise_std=sigma,
        adds_noise=sigma > 0,
    )


def _plan(
    spaced: Schedule,
    *,
    name: str,
    eta: float | None,
    learned_variance: bool,
    clip_denoised: bool,
    mean_from_x0: np.ndarray,  # these four arrays are in the order of ascending timesteps
    mean_from_x: np.ndarray,
    noise_std: np.ndarray,
    adds_noise: np.ndarray,
) -> SamplerPlan:
    """The plan over the timesteps of `spaced`, with all arrays reversed into the order of execution, descending timesteps."""
    return SamplerPlan(
        name=name,
        schedule=spaced.name,
        steps=len(spaced),
        evaluations=len(spaced),
        eta=eta,
        learned_variance=learned_variance,
        clip_denoised=clip_denoised,
        timesteps=spaced.timesteps[::-1].copy(),
        x0_from_x=spaced.sqrt_recip_abar[::-1].copy(),
        x0_from_eps=spaced.sqrt_recipm1_abar[::-1].copy(),
        mean_from_x0=mean_from_x0[::-1].copy(),
        mean_from_x=mean_from_x[::-1].copy(),
        log_variance_low=spaced.posterior_log_variance_clipped[::-1].copy(),
        log_variance_high=spaced.log_betas[::-1].copy(),
        noise_std=noise_std[::-1].copy(),
        adds_noise=adds_noise[::-1].copy(),
    )
