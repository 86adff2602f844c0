"""What a network is given as time, in the form that its backbone states (`harness.spec.TIMES`).

Plain arithmetic that numpy (sampler plans), torch and JAX (training) share.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from harness.diffusion.objectives import Objective
from harness.diffusion.processes import Coefficients, Floats, Namespace, Process
from harness.diffusion.schedule import Schedule
from harness.errors import UserError

MAX_LOG_SIGMA = 10.0  # a process may begin at a = 0 and end at s = 0, where the logarithm is infinite


def network_time(
    form: str,
    objective: Objective,
    process: Schedule | Process,
    t: Floats,
    at: Callable[[], Coefficients],
    xp: Namespace,
) -> Floats:
    """The network's time at t (N,) of the process: t itself (integers) for timesteps of a table, else floats (N,).

    form: of `harness.spec.TIMES`. at: returns the process at t, computed only where it is needed.
    """
    if form == "unit":
        return t / process.original_steps if isinstance(process, Schedule) else t
    if form == "log-sigma":
        found = at()
        # abs: float32's cosine just below t = 1 of gvp is negative
        sigma = xp.clip(xp.abs(found.s / found.a), math.exp(-MAX_LOG_SIGMA), math.exp(MAX_LOG_SIGMA))
        return xp.log(sigma).reshape(t.shape)
    if isinstance(process, Schedule):
        return t
    return (objective.network_time or process.network_time)(t, xp)


def check_time(form: str, process: Schedule | Process) -> None:
    """Raise UserError where a network with this form of time cannot be used on `process`."""
    if form == "unit" and isinstance(process, Process) and not process.is_bounded:
        raise UserError(
            f"the backbone takes time from 0 to 1, and t of the schedule {process.name} is the noise level itself: give "
            'another schedule, or a backbone with time="log-sigma"'
        )
