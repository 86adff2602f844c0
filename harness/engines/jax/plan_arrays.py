"""A sampler plan for a compiled loop: what the program depends on, and the numbers that it is given.

Plans of one sampler with other numbers of steps have the same form, so they run the same compiled program.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from harness.diffusion.plans import SamplerPlan
from harness.diffusion.solvers import D

FEWEST_ROWS = 256  # that the arrays are filled up to; more rows than that: the next power of two


@dataclass(frozen=True)
class PlanForm:
    """What of a plan is compiled into the loop. Equal forms, of hashable parts, share a program."""

    name: str  # of the sampler, for messages
    learned_variance: bool
    clip_denoised: bool
    shifts_mean: bool  # see `harness.diffusion.solvers.SamplerTable`
    initial_noise: float
    images: int  # that a row uses: the predicted image D, D' of the row before, ...
    x_columns: tuple[int, ...]  # those besides x and D whose coefficients are not all zero
    base_columns: tuple[int, ...] | None  # the same of base; None: no row keeps a base
    scales_input: bool
    adds_noise: bool  # at some row
    noise_to_base: bool
    mixes_guidance: bool  # some rows have guidance and others have not


class PlanArrays(NamedTuple):
    """The numbers of a plan, each with the rows first: float32 unless noted, filled up with rows that are never run.

    Arrays of numpy, or of jax inside a compiled function.
    """

    times: Any  # what the network is given as time: int32 timesteps, or float32; (rows, 2) with the ends of steps
    x0_from_x: Any
    x0_from_output: Any
    x0_from_gradient: Any
    input_scale: Any  # 1 where the plan has none
    x_from: Any  # (rows, columns)
    base_from: Any
    noise_to_x: Any
    noise_to_base: Any
    log_variance_low: Any  # 0 without a learned variance
    log_variance_high: Any
    adds_noise: Any  # bool
    is_guided: Any  # bool
    sigma: Any  # the noise level s / a


def split_plan(plan: SamplerPlan, is_guided: np.ndarray | None = None) -> tuple[PlanForm, PlanArrays]:
    """The form and the arrays of a plan. is_guided: bool (E,), the rows with guidance; None: no row."""
    table, count = plan.table, plan.evaluations
    guided = np.zeros(count, bool) if is_guided is None else is_guided
    rows = max(FEWEST_ROWS, 1 << (count - 1).bit_length())

    def filled(values: np.ndarray | None, dtype: type = np.float32, default: float = 0.0) -> np.ndarray:
        values = np.full(count, default) if values is None else values
        result = np.zeros((rows, *values.shape[1:]), dtype)
        result[:count] = values
        return result

    def used(coefficients: np.ndarray) -> tuple[int, ...]:
        return tuple(column for column in range(coefficients.shape[1]) if coefficients[:, column].any())

    low, high = table.log_variances or (None, None)
    form = PlanForm(
        name=plan.name,
        learned_variance=plan.learned_variance,
        clip_denoised=plan.clip_denoised,
        shifts_mean=table.shifts_mean,
        initial_noise=table.initial_noise,
        images=table.x_from.shape[1] - D,
        x_columns=used(table.x_from),
        base_columns=used(table.base_from) or None,
        scales_input=plan.input_scale is not None,
        adds_noise=bool(plan.adds_noise.any()),
        noise_to_base=bool(table.noise_to_base.any()),
        mixes_guidance=bool(guided.any() and not guided.all()),
    )
    arrays = PlanArrays(
        times=filled(plan.network_times, np.int32 if plan.network_times.dtype == np.int64 else np.float32),
        x0_from_x=filled(plan.x0_from_x),
        x0_from_output=filled(plan.x0_from_output),
        x0_from_gradient=filled(plan.x0_from_gradient),
        input_scale=filled(plan.input_scale, default=1.0),
        x_from=filled(table.x_from),
        base_from=filled(table.base_from),
        noise_to_x=filled(table.noise_to_x),
        noise_to_base=filled(table.noise_to_base),
        log_variance_low=filled(low),
        log_variance_high=filled(high),
        adds_noise=filled(plan.adds_noise, np.bool_),
        is_guided=filled(guided, np.bool_),
        sigma=filled(plan.sigma),
    )
    return form, arrays
