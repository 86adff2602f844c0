"""Noise schedules and the tables of the Gaussian diffusion that follow from them, in float64.

Notation of Ho et al. 2020 (DDPM): beta_t, abar_t = prod_{s<=t} (1 - beta_s). Tables as in
openai/guided-diffusion gaussian_diffusion.py, GaussianDiffusion.__init__.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from difflib import get_close_matches

import numpy as np

from harness.errors import LONGEST_SHOWN, UserError, shown

MAX_STEPS = 100_000  # of a schedule; usual are 1000
# The betas of "linear" go up to 20 / steps and reach 1 with fewer steps. (Of 1 step only the lowest beta is left, which adds
# next to no noise.) Those of the other schedules stay below 1.
MIN_LINEAR_STEPS = 21


@dataclass(frozen=True, kw_only=True, eq=False)
class Schedule:
    """A noise schedule and its tables: all arrays float64 (S,) and read-only, entry k for timestep `timesteps[k]`.

    name, original_steps, timesteps and betas are given; the other tables are computed from betas. A respaced schedule
    keeps the original numbers of its timesteps, which are the network's input.
    """

    name: str
    original_steps: int  # length of the schedule before respacing
    timesteps: np.ndarray  # int64 (S,), ascending original timesteps
    betas: np.ndarray  # in (0, 1)
    abar: np.ndarray = field(init=False)
    abar_prev: np.ndarray = field(init=False)  # abar of the previous kept timestep; 1 at the first
    sqrt_abar: np.ndarray = field(init=False)  # x_t = sqrt_abar x_0 + sqrt_one_minus_abar eps (DDPM eq. 4)
    sqrt_one_minus_abar: np.ndarray = field(init=False)
    sqrt_recip_abar: np.ndarray = field(init=False)  # x_0 = sqrt_recip_abar x_t - sqrt_recipm1_abar eps
    sqrt_recipm1_abar: np.ndarray = field(init=False)
    posterior_variance: np.ndarray = field(init=False)  # of q(x_{t-1} | x_t, x_0), DDPM eq. 7; 0 at the first step
    posterior_log_variance_clipped: np.ndarray = field(init=False)  # its log, with entry 1 in place of entry 0 (log 0)
    posterior_mean_from_x0: np.ndarray = field(init=False)  # mean = from_x0 x_0 + from_xt x_t (DDPM eq. 7)
    posterior_mean_from_xt: np.ndarray = field(init=False)
    log_betas: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        betas = np.array(self.betas, dtype=np.float64)
        timesteps = np.array(self.timesteps, dtype=np.int64)
        assert betas.ndim == 1 and betas.shape == timesteps.shape and len(betas) > 0
        assert (betas > 0).all() and (betas < 1).all()
        alphas = 1.0 - betas
        abar = np.cumprod(alphas)
        abar_prev = np.append(1.0, abar[:-1])
        posterior_variance = betas * (1.0 - abar_prev) / (1.0 - abar)
        # A schedule of one step has no second entry. No noise is drawn at that step, so any finite number will do.
        first = posterior_variance[1] if len(betas) > 1 else betas[0]
        tables = {
            "timesteps": timesteps,
            "betas": betas,
            "abar": abar,
            "abar_prev": abar_prev,
            "sqrt_abar": np.sqrt(abar),
            "sqrt_one_minus_abar": np.sqrt(1.0 - abar),
            "sqrt_recip_abar": np.sqrt(1.0 / abar),
            "sqrt_recipm1_abar": np.sqrt(1.0 / abar - 1.0),
            "posterior_variance": posterior_variance,
            "posterior_log_variance_clipped": np.log(np.append(first, posterior_variance[1:])),
            "posterior_mean_from_x0": betas * np.sqrt(abar_prev) / (1.0 - abar),
            "posterior_mean_from_xt": (1.0 - abar_prev) * np.sqrt(alphas) / (1.0 - abar),
            "log_betas": np.log(betas),
        }
        for name, table in tables.items():
            table.flags.writeable = False
            object.__setattr__(self, name, table)  # the dataclass is frozen

    @classmethod
    def named(cls, name: str = "linear", steps: int = 1000) -> Schedule:
        """A schedule of `SCHEDULES` over `steps` timesteps, not respaced. Raises UserError for a bad name or length."""
        if name not in SCHEDULES:
            close = get_close_matches(name[:LONGEST_SHOWN], SCHEDULES, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise UserError(f"unknown noise schedule {shown(name)}: {hint}known are {', '.join(SCHEDULES)}")
        if not 1 <= steps <= MAX_STEPS:
            raise UserError(f"a noise schedule cannot have {steps} timesteps: give 1 to {MAX_STEPS:,}")
        if name == "linear" and steps < MIN_LINEAR_STEPS:
            raise UserError(
                f"noise schedule {name!r} is too steep at {steps} timesteps: give at least {MIN_LINEAR_STEPS}"
            )
        return cls(name=name, original_steps=steps, timesteps=np.arange(steps), betas=SCHEDULES[name](steps))

    def __len__(self) -> int:
        return len(self.betas)

    def respaced(self, kept: np.ndarray | None = None) -> Schedule:
        """The schedule over the timesteps at positions `kept` (ascending; None = all): betas = 1 - abar_t / abar_prev.

        As in the public DiT and ADM code (respace.py, SpacedDiffusion), the betas are recomputed even when all timesteps
        are kept, which changes all tables by about 1e-16. Training and sampling both use respaced schedules.
        """
        kept = np.arange(len(self)) if kept is None else np.asarray(kept)
        betas, abar_prev = [], 1.0
        for abar in self.abar[kept]:
            betas.append(1.0 - abar / abar_prev)
            abar_prev = abar
        return Schedule(
            name=self.name, original_steps=self.original_steps, timesteps=self.timesteps[kept], betas=np.array(betas)
        )


def _linear_betas(steps: int) -> np.ndarray:
    scale = 1000 / steps  # so that the last abar is about the same for every length
    return np.linspace(scale * 1e-4, scale * 0.02, steps, dtype=np.float64)


def _cosine_betas(steps: int) -> np.ndarray:
    def abar(time: float) -> float:  # time: 0 ... 1, the share of the schedule
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    return np.array([min(1 - abar((k + 1) / steps) / abar(k / steps), 0.999) for k in range(steps)])


def _sqrt_linear_betas(steps: int) -> np.ndarray:
    return np.linspace(0.0015**0.5, 0.0195**0.5, steps, dtype=np.float64) ** 2


SCHEDULES = {
    "linear": _linear_betas,  # Ho et al. 2020, sec. 4: 1e-4 ... 0.02 over 1000 steps
    "sqrt-linear": _sqrt_linear_betas,  # LDM's "linear" for ImageNet: linear in the square root of beta (its util.py)
    "cosine": _cosine_betas,  # Nichol & Dhariwal 2021, eq. 17
}
