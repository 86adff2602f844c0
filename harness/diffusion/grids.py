"""The times at which a sampler asks the network, from noise to data, in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from harness.diffusion.processes import Coefficients, Process
from harness.diffusion.respacing import WHOLE_STRIDE, respacing, space_timesteps
from harness.diffusion.schedule import Schedule
from harness.errors import UserError, shown
from harness.registry import unknown

KARRAS_RHO = 7.0  # Karras et al. 2022, eq. 5


@dataclass(frozen=True, kw_only=True, eq=False)
class Grid:
    """Times in the order of sampling and the process there: float64 (n + 1,), the last entry where sampling ends.

    Derivatives are None for a process that is a table of trained timesteps.
    """

    times: np.ndarray  # t of the process; timesteps of a table; the last may be -1, the image itself
    a: np.ndarray
    s: np.ndarray
    da: np.ndarray | None
    ds: np.ndarray | None
    lam: np.ndarray = field(init=False)  # ln(a / s), half the log signal-to-noise ratio; inf at s = 0, -inf at a = 0

    def __post_init__(self) -> None:
        with np.errstate(divide="ignore"):
            object.__setattr__(self, "lam", np.log(self.a) - np.log(self.s))
        assert (np.diff(self.lam) > 0).all(), "a sampler's times must go from noise to data"

    def __len__(self) -> int:
        return len(self.times) - 1


def continuous_grid(process: Process, steps: int, kind: str, *, first: float, last: float) -> Grid:
    """`steps` times of `process` from t = last on, and the image itself (t = 0) at the end.

    kind: a key of CONTINUOUS_GRIDS, "shift:C" among them. first, last: the range of t that the network was trained on.
    Raises UserError for an unknown kind.
    """
    name, _, parameter = kind.partition(":")
    if name not in CONTINUOUS_GRIDS:
        raise UserError(unknown("spacing of sampling times", kind, [*CONTINUOUS_GRIDS]))
    times = CONTINUOUS_GRIDS[name](process, steps, first, last, parameter)
    # also where two times are below the first one that the process is defined at, which stands for both
    if not (np.diff(np.maximum(times, process.first)) < 0).all() or times[-1] <= 0:
        raise UserError(
            f"{steps} sampling steps with the spacing {shown(kind)} ask for the same time twice: give fewer steps"
        )
    return at_times(process, np.append(times, 0.0))


def at_times(process: Process, times: np.ndarray) -> Grid:
    """The grid over these times, float64 (n + 1,), descending; the last may be 0, the image itself."""
    inner = np.maximum(times, process.first)  # the derivatives at 0, where they may be infinite, are never used
    a, s, da, ds = (np.broadcast_to(values, times.shape).astype(float) for values in process.coefficients(inner, np))
    a[times == 0], s[times == 0] = 1.0, 0.0
    return Grid(times=times, a=a, s=s, da=da, ds=ds)


def discrete_grid(schedule: Schedule, steps: int | str, kind: str = "respaced") -> Grid:
    """`steps` trained timesteps of `schedule` in descending order, and the image itself (timestep -1) at the end.

    kind: a key of DISCRETE_GRIDS. Raises UserError for an unknown kind and for steps that do not fit.
    """
    if isinstance(steps, int) and (wanted := respacing(steps, kind)) is not None:
        steps, kind = wanted, "respaced"
    if kind not in DISCRETE_GRIDS:
        raise UserError(unknown("spacing of sampling timesteps", kind, [*DISCRETE_GRIDS, WHOLE_STRIDE, "10:10:20"]))
    timesteps = DISCRETE_GRIDS[kind](schedule, steps)
    if len(np.unique(timesteps)) != len(timesteps):
        raise UserError(
            f"{steps} sampling steps with the spacing {shown(kind)} ask for the same timestep twice: give fewer steps"
        )
    a, s = schedule.sqrt_abar[timesteps], schedule.sqrt_one_minus_abar[timesteps]
    return Grid(times=np.append(timesteps, -1), a=np.append(a, 1.0), s=np.append(s, 0.0), da=None, ds=None)


def time_of_lam(process: Process, lam: np.ndarray) -> np.ndarray:
    """The t at which ln(a / s) is `lam` (n,): float64 (n,), by bisection between the ends of the process."""
    if not process.is_bounded:  # t is sigma, and a is 1
        return np.exp(-lam)
    low, high = np.full_like(lam, process.first or 1e-9), np.full_like(lam, process.last)
    for _ in range(200):
        middle = (low + high) / 2
        a, s, *_ = process.coefficients(middle, np)
        is_too_clean = np.log(a) - np.log(s) > lam
        low, high = np.where(is_too_clean, middle, low), np.where(is_too_clean, high, middle)
    return (low + high) / 2


def _uniform(process: Process, steps: int, first: float, last: float, parameter: str) -> np.ndarray:
    """last, ..., in equal steps that would end at 0."""
    return last * (1 - np.arange(steps) / steps)


def _shift(process: Process, steps: int, first: float, last: float, parameter: str) -> np.ndarray:
    """t -> c t / (1 + (c - 1) t) of the uniform grid: more steps at high noise (Esser et al. 2024, eq. 23)."""
    try:
        c = float(parameter or 3.0)
    except ValueError:
        c = 0.0
    if not 0 < c < np.inf:
        raise UserError(
            f"the spacing {shown(f'shift:{parameter}')} is not understood: give a positive number, as in shift:3"
        )
    if not process.is_bounded:
        raise UserError(
            f"the spacing shift needs a schedule with t in [0, 1], not {process.name}: take karras or log-snr"
        )
    t = 1 - np.arange(steps) / steps
    return np.minimum(c * t / (c * t + (1 - t)), last)  # equal to the formula, and exactly 1 at t = 1


def _karras(process: Process, steps: int, first: float, last: float, parameter: str) -> np.ndarray:
    """sigma = s / a, spaced evenly in sigma^(1 / 7) (Karras et al. 2022, eq. 5)."""
    return time_of_lam(process, -np.log(_karras_sigmas(*_sigma_range(process, first, last), steps)))


def _log_snr(process: Process, steps: int, first: float, last: float, parameter: str) -> np.ndarray:
    """Even steps of ln(a / s), as in DPM-Solver (Lu et al. 2022)."""
    sigma_max, sigma_min = _sigma_range(process, first, last)
    return time_of_lam(process, np.linspace(-np.log(sigma_max), -np.log(sigma_min), steps))


def _karras_sigmas(sigma_max: float, sigma_min: float, steps: int) -> np.ndarray:
    """float64 (steps,) from sigma_max to sigma_min, evenly in sigma^(1 / 7)."""
    root_max, root_min = sigma_max ** (1 / KARRAS_RHO), sigma_min ** (1 / KARRAS_RHO)
    return (root_max + np.linspace(0, 1, steps) * (root_min - root_max)) ** KARRAS_RHO


END_MARGIN = 1e-3  # kept from t = 0 and from t = 1 where sigma is 0 or infinite there, as SiT's sample_eps


def _sigma_range(process: Process, first: float, last: float) -> tuple[float, float]:
    """sigma = s / a at the noisy and at the clean end of the grid."""

    def sigma(t: float) -> float:
        at: Coefficients = process.coefficients(np.float64(t), np)
        return float(at.s / at.a)

    if sigma(first) == 0:
        first = END_MARGIN
    if process.coefficients(np.float64(last), np).a < 1e-12:
        last -= END_MARGIN
    return sigma(last), sigma(first)


CONTINUOUS_GRIDS: Mapping[str, Callable[[Process, int, float, float, str], np.ndarray]] = {
    "uniform": _uniform,
    "shift": _shift,
    "karras": _karras,
    "log-snr": _log_snr,
}


def _respaced(schedule: Schedule, steps: int | str) -> np.ndarray:
    if str(steps) in (
        "1",
        "ddim1",
    ):  # `space_timesteps` gives timestep 0, as ddpm and ddim take; a solver begins at noise
        return np.array([len(schedule) - 1])
    return space_timesteps(len(schedule), steps)[::-1]


def _trailing(schedule: Schedule, steps: int | str) -> np.ndarray:
    """T, T - T/S, ... minus 1, so that the first is the last trained timestep (Lin et al. 2023, table 2)."""
    count = int(steps)
    return np.round(np.arange(len(schedule), 0, -len(schedule) / count))[:count].astype(np.int64) - 1


def _linspace(schedule: Schedule, steps: int | str) -> np.ndarray:
    """Evenly from the last timestep towards 0, which is left out (DPM-Solver's choice in diffusers)."""
    return np.linspace(0, len(schedule) - 1, int(steps) + 1).round()[::-1][:-1].astype(np.int64)


def _discrete_karras(schedule: Schedule, steps: int | str) -> np.ndarray:
    sigma = schedule.sqrt_one_minus_abar / schedule.sqrt_abar
    return _nearest(np.log(sigma), np.log(_karras_sigmas(sigma[-1], sigma[0], int(steps))))


def _discrete_log_snr(schedule: Schedule, steps: int | str) -> np.ndarray:
    log_sigma = np.log(schedule.sqrt_one_minus_abar / schedule.sqrt_abar)
    return _nearest(log_sigma, np.linspace(log_sigma[-1], log_sigma[0], int(steps)))


def _nearest(table: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The positions in `table`, ascending (T,), of the entries nearest to `wanted` (n,)."""
    return np.abs(table[None, :] - wanted[:, None]).argmin(axis=1)


DISCRETE_GRIDS: Mapping[str, Callable[[Schedule, int | str], np.ndarray]] = {
    "respaced": _respaced,
    "trailing": _trailing,
    "linspace": _linspace,
    "karras": _discrete_karras,
    "log-snr": _discrete_log_snr,
}
