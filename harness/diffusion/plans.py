"""Sampler plans: a sampler's table with what the objective adds, computed once in float64.

All plans share one form, which a framework applies with plain arithmetic. At row k, with the network's output u:

    D    = x0_from_x[k] x - x0_from_output[k] u            clamped to [-1, 1] with clip_denoised
    x    = x_from[k]    . (x, base, D, D', ...) + noise_to_x[k]    noise
    base = base_from[k] . (x, base, D, D', ...) + noise_to_base[k] noise

D', D'', ... are the images predicted at the rows before. With log_variances, exp(log variance / 2) replaces noise_to_x:
log variance = frac high[k] + (1 - frac) low[k], frac = (v + 1) / 2 of the network's variance channels v (Nichol & Dhariwal
2021, eq. 15).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from harness.diffusion.network_times import network_time
from harness.diffusion.objectives import Objective, image_from
from harness.diffusion.processes import Coefficients, Process
from harness.diffusion.schedule import Schedule
from harness.diffusion.solvers import SamplerTable
from harness.errors import UserError


@dataclass(frozen=True, kw_only=True, eq=False)
class SamplerPlan:
    """A sampler over one process for one objective. Arrays have E rows, one for each network evaluation of an image.

    Guidance makes the evaluation of the rows that it applies to two; it is no part of the plan.
    """

    name: str  # of the sampler
    schedule: str  # name of the noise schedule
    steps: int  # as the user counts them; evaluations >= steps
    eta: float | None  # DDIM's share of DDPM noise; None for a sampler without one
    clip_denoised: bool  # clamp the predicted image to [-1, 1]; for pixels, never for latents
    table: SamplerTable
    network_times: np.ndarray  # (E,): int64 timesteps, or float64; float64 (E, 2) with the ends of steps
    input_scale: np.ndarray | None  # float64 (E,): the network sees input_scale x; None: x
    x0_from_x: np.ndarray  # float64 (E,)
    x0_from_output: np.ndarray  # float64 (E,)
    x0_from_gradient: np.ndarray  # float64 (E,): s^2 / a, of a classifier's gradient that shifts epsilon

    def __post_init__(self) -> None:
        for values in (self.x0_from_x, self.x0_from_output, self.x0_from_gradient):
            assert values.shape == (self.evaluations,)
            values.flags.writeable = False

    @property
    def evaluations(self) -> int:
        """Network evaluations for each image, without those that guidance adds."""
        return len(self.table.times)

    @property
    def advances(self) -> int:
        """Progress-bar units for one batch: the rows."""
        return self.evaluations

    @property
    def learned_variance(self) -> bool:
        """Whether the network must give 2 C channels."""
        return self.table.log_variances is not None

    @property
    def sigma(self) -> np.ndarray:
        """float64 (E,): the noise level s / a of each row; infinite where a row begins at noise alone."""
        with np.errstate(divide="ignore"):
            return self.table.s / self.table.a

    @property
    def adds_noise(self) -> np.ndarray:
        """bool (E,): whether a row draws noise."""
        return (self.table.noise_to_x != 0) | (self.table.noise_to_base != 0)


def make_plan(
    name: str,
    table: SamplerTable,
    objective: Objective,
    process: Schedule | Process,
    *,
    steps: int,
    eta: float | None,
    clip_denoised: bool,
    time: str,
) -> SamplerPlan:
    """The plan of a sampler's table for networks of `objective`. time: of the backbone (`harness.spec.TIMES`).

    Raises UserError where the image does not follow from the network's output at one of the times.
    """
    if clip_denoised and objective.two_times is not None:
        raise UserError(
            f"a network of the objective {objective.name} predicts steps, and clip_denoised would clamp where a long one leads, "
            "which is no image: set it to false"
        )
    if isinstance(process, Schedule):
        at = Coefficients(table.a, table.s, np.nan, np.nan)  # a table of timesteps has no derivatives
    else:
        at = process.coefficients(table.times, np)
    with np.errstate(divide="ignore", invalid="ignore"):
        network_times = network_time(time, objective, process, table.times, lambda: at, np)
        if objective.two_times is not None:
            network_times = np.stack([network_times, _end_times(name, table, objective, process, time)], axis=1)
        from_x, from_output = image_from(at, objective.target(at, np))
        x0_from_x, x0_from_output = (
            np.broadcast_to(each, len(table.times)).astype(np.float64) for each in (from_x, -from_output)
        )
        # where a = 0, x is noise alone and tells nothing of the class
        x0_from_gradient = np.where(table.a > 1e-12, table.s**2 / table.a, 0.0)
    for values in (x0_from_x, x0_from_output):
        if not np.isfinite(values).all():
            t = table.times[~np.isfinite(values)][0]
            raise UserError(
                f"a network of the objective {objective.name} cannot be sampled on {process.name} at t = {t:g}: its output "
                "does not tell the image there; choose another objective or spacing"
            )
    return SamplerPlan(
        name=name,
        schedule=process.name,
        steps=steps,
        eta=eta,
        clip_denoised=clip_denoised,
        table=table,
        network_times=network_times,
        input_scale=None if objective.input_scale is None else objective.input_scale(at, np),
        x0_from_x=x0_from_x,
        x0_from_output=x0_from_output,
        x0_from_gradient=x0_from_gradient,
    )


def _end_times(
    name: str, table: SamplerTable, objective: Objective, process: Schedule | Process, time: str
) -> np.ndarray:
    """What a network of two times is given as the ends of the steps, float64 (E,). Raises UserError without them."""
    ends = table.end_times
    if ends is None or isinstance(process, Schedule):
        raise UserError(
            f"the sampler {name} does not state where its steps end, and a network of the objective {objective.name} is asked "
            "for the step to there: take euler"
        )
    given: np.ndarray = network_time(time, objective, process, ends, lambda: process.coefficients(ends, np), np)
    return given
