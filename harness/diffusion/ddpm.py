"""DDPM, and DDIM with a share of its noise, as tables over the trained timesteps of a respaced schedule."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from harness.diffusion.respacing import space_timesteps
from harness.diffusion.schedule import Schedule
from harness.diffusion.solvers import D, SamplerTable, X
from harness.errors import UserError


def ddpm(schedule: Schedule, steps: int | str, *, learned_variance: bool) -> SamplerTable:
    """Ancestral sampling (Ho et al. 2020, algorithm 2) over `steps` of the schedule's timesteps.

    schedule: not respaced, as from Schedule.named. steps: a count, or another spacing of `space_timesteps`. Without a
    learned variance the variance is the posterior's ("fixed small"). Raises UserError for steps that do not fit.
    """
    spaced = schedule.respaced(space_timesteps(len(schedule), steps))
    adds_noise = np.arange(len(spaced)) > 0  # not at the first timestep, which is the last step
    noise = np.exp(0.5 * spaced.posterior_log_variance_clipped) * adds_noise
    table = _table(spaced, spaced.posterior_mean_from_xt, spaced.posterior_mean_from_x0, noise, shifts_mean=True)
    if not learned_variance:
        return table
    log_variances = spaced.posterior_log_variance_clipped[::-1].copy(), spaced.log_betas[::-1].copy()
    return dataclasses.replace(table, log_variances=log_variances)


def ddim(schedule: Schedule, steps: int | str, *, eta: float) -> SamplerTable:
    """DDIM (Song et al. 2021, eq. 12 and 16). The network's variance channels, if any, are not used.

    eta: 0 is deterministic, 1 has DDPM's noise. steps: "ddim50" gives the paper's whole strides; 50 the evenly rounded
    ones. Eq. 12 adds sqrt(1 - abar_prev - sigma^2) eps to sqrt(abar_prev) x0. Here eps is written as
    (x0_from_x x - x0) / x0_from_eps, from the clamped x0, which gives the common form in x0 and x.
    Raises UserError for eta outside [0, 1] and for steps that do not fit.
    """
    _check_eta(eta)
    spaced = schedule.respaced(space_timesteps(len(schedule), steps))
    sigma = eta * np.sqrt(spaced.posterior_variance)  # eq. 16: the posterior's standard deviation times eta
    direction = np.sqrt(1.0 - spaced.abar_prev - sigma**2) / spaced.sqrt_recipm1_abar
    return _table(spaced, direction * spaced.sqrt_recip_abar, np.sqrt(spaced.abar_prev) - direction, sigma)


def ddim_ldm(schedule: Schedule, steps: int | str, *, eta: float) -> SamplerTable:
    """DDIM as in LDM's code: timesteps 1, 1 + c, 1 + 2c, ... for an integer stride c; the last step goes to abar[0].

    CompVis/latent-diffusion a506df5, ldm/modules/diffusionmodules/util.py (make_ddim_timesteps,
    make_ddim_sampling_parameters). So the noise of timestep 0 is left after the last step, which also adds noise if
    eta > 0. Raises UserError for eta outside [0, 1] and for steps that do not fit.
    """
    _check_eta(eta)
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
    # Of `spaced` only entries of each timestep by itself are used: its abar_prev begins with 1, and LDM's with abar[0].
    spaced = schedule.respaced(timesteps)
    abar = schedule.abar[timesteps]
    abar_prev = np.append(schedule.abar[0], abar[:-1])
    sigma = eta * np.sqrt((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev))
    direction = np.sqrt(1.0 - abar_prev - sigma**2) / spaced.sqrt_recipm1_abar
    return _table(spaced, direction * spaced.sqrt_recip_abar, np.sqrt(abar_prev) - direction, sigma)


def _check_eta(eta: float) -> None:
    if not (math.isfinite(eta) and 0 <= eta <= 1):
        raise UserError(f"DDIM eta {eta:g} is out of range: give a number from 0 to 1")


def _table(
    spaced: Schedule,
    from_x: np.ndarray,  # these three arrays are in the order of ascending timesteps
    from_image: np.ndarray,
    noise: np.ndarray,
    *,
    shifts_mean: bool = False,
) -> SamplerTable:
    """The table over the timesteps of `spaced`, with all arrays reversed into the order of execution, descending timesteps."""
    x_from = np.zeros((len(spaced), 3))
    x_from[:, X], x_from[:, D] = from_x[::-1], from_image[::-1]
    return SamplerTable(
        times=spaced.timesteps[::-1].copy(),
        a=spaced.sqrt_abar[::-1].copy(),
        s=spaced.sqrt_one_minus_abar[::-1].copy(),
        x_from=x_from,
        base_from=np.zeros_like(x_from),
        noise_to_x=noise[::-1].copy(),
        noise_to_base=np.zeros(len(spaced)),
        initial_noise=1.0,  # DDPM begins with x_T ~ N(0, I), though s is a little below 1 at its last timestep
        shifts_mean=shifts_mean,
    )
