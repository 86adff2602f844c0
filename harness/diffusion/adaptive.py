"""The adaptive sampler: the probability-flow ODE solved by Dormand and Prince's method of order 5(4), image by image.

dx/dt = a' x_0^ + s' eps^, from noise to data, with x_0^ and eps^ as the network's output tells them. Every image has a step
size of its own, by the error of that image alone (root mean square over its elements of error / (atol + rtol |x|) at most
1). torchdiffeq, as SiT calls it, solves a whole batch as one state: its steps, and so an image, then depend on the images
beside it, and with guidance on the unconditional half too. Here no image's steps depend on another. (Last bits of float32,
which the batch size and the framework can change, now and then decide whether a step is accepted: the image then moves
within what the tolerances leave open, of digits by 1 to 3 of 255 levels.) torchdiffeq has no step sizes by image, so the
method is written here, in plain arithmetic for torch and JAX; the tests hold it against torchdiffeq and diffrax.

Source: Hairer, Norsett & Wanner, Solving Ordinary Differential Equations I, sec. II.4 (step sizes, the first one) and II.5
(coefficients, which are Dormand & Prince 1980's). Bounds of the factor and tolerances are those of torchdiffeq and SiT.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from harness.diffusion.grids import END_MARGIN
from harness.diffusion.guidance import Guidance, read_interval
from harness.diffusion.network_times import network_time
from harness.diffusion.objectives import Objective, image_from
from harness.diffusion.processes import Coefficients, Namespace, Process
from harness.errors import UserError

Array: TypeAlias = Any  # of torch or jax

RTOL, ATOL = 1e-3, 1e-6  # SiT's (willisma/SiT train_utils.py, parse_ode_args, @947f95b)
ORDER = 5
SAFETY, LEAST_FACTOR, LARGEST_FACTOR = 0.9, 0.2, 10.0  # of the change of the step size from one attempt to the next
NEAR_AN_END = 1e-5  # relative difference of times
MAX_ATTEMPTS = 10_000  # of an image: tolerances that float32 cannot meet
PROGRESS_UNITS = 100  # of the progress bar, for a batch
STAGES = 7  # slopes of a step; the last is the first one of the next step
STEP_EVALUATIONS = STAGES - 1
START_EVALUATIONS = 2  # the first slope, and the one that gives the first step size

STAGE_TIMES = np.array([0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1])  # as shares of the step
# Row i: what the slopes before it contribute to the state at which slope i is taken. The last row is the step itself.
STAGE_WEIGHTS = np.array(
    [
        [0, 0, 0, 0, 0, 0, 0],
        [1 / 5, 0, 0, 0, 0, 0, 0],
        [3 / 40, 9 / 40, 0, 0, 0, 0, 0],
        [44 / 45, -56 / 15, 32 / 9, 0, 0, 0, 0],
        [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729, 0, 0, 0],
        [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656, 0, 0],
        [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0],
    ]
)
# Two thirds of the step minus that of Dormand and Prince's method of order 4: the estimate of torchdiffeq, hence SiT's
# (Shampine 1986); diffrax and Hairer et al. take the whole of it, which makes steps 8 % smaller.
ERROR_WEIGHTS = (2 / 3) * (
    STAGE_WEIGHTS[6] - np.array([5179 / 57600, 0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40])
)


class Segment(NamedTuple):
    """A stretch of t, from `begin` down to `end`, with or without classifier-free guidance."""

    begin: float
    end: float
    is_guided: bool


@dataclass(frozen=True, kw_only=True)
class AdaptivePlan:
    """The adaptive sampler on one process for one objective.

    t goes from `begin` down to `end`. Where the slope is finite at t = 0, as of a velocity on flow, that is the end, as in
    SiT. Elsewhere some noise s(end) is left (t = 0.001; 1e-5 on vp-continuous; sigma 0.002 on ve), and one last Euler step
    to s = 0, which costs one evaluation, takes the image that the network predicts there.
    """

    name: str  # of the sampler
    schedule: str  # name of the noise schedule
    clip_denoised: bool  # clamp the predicted image to [-1, 1]; for pixels, never for latents
    objective: Objective
    process: Process
    begin: float
    end: float
    learned_variance: bool = False  # no: an ODE draws no noise
    time: str  # the form of the network's time (`harness.spec.TIMES`)

    @property
    def initial_noise(self) -> float:
        """Standard deviation of x at `begin`."""
        return float(self.process.coefficients(np.float64(self.begin), np).s)

    @property
    def has_last_step(self) -> bool:
        """Whether noise is left at `end`, which a last Euler step takes away."""
        return bool(self.process.coefficients(np.float64(self.end), np).s > 0)

    @property
    def advances(self) -> int:
        """Progress-bar units for one batch."""
        return PROGRESS_UNITS

    def segments(self, guidance: Guidance) -> tuple[Segment, ...]:
        """Where guidance is applied. A step ends where an interval of noise levels does: the slope jumps there.

        Raises UserError where the interval holds no noise level of the sampler, and for a package's rule of guidance.
        """
        if guidance.rule:
            raise UserError(
                f"guidance {guidance.short}: a rule of guidance is for samplers of fixed steps, such as heun, and {self.name} "
                "chooses its own; leave out the rule, or take another sampler"
            )
        if guidance.scale == 1 or not guidance.interval:
            return (Segment(self.begin, self.end, guidance.scale != 1),)
        low, high = (self._snapped(self._time_of(sigma)) for sigma in read_interval(guidance.interval))
        if low >= high:
            raise UserError(
                f"guidance {guidance.short} guides nothing: the noise levels sigma of {self.name} go from "
                f"{self._sigma(self.begin):.4g} to {self._sigma(self.end):.4g}; choose another interval"
            )
        parts = (Segment(self.begin, high, False), Segment(high, low, True), Segment(low, self.end, False))
        return tuple(part for part in parts if part.begin > part.end)

    def _sigma(self, t: float) -> float:
        at = self.process.coefficients(np.float64(t), np)
        with np.errstate(divide="ignore"):
            return float(at.s / at.a) if at.a > 0 else float("inf")

    def _snapped(self, t: float) -> float:
        """t, or the beginning or the end where it is so near to them that float32 times leave no room for a step."""
        for edge in (self.begin, self.end):
            if abs(t - edge) <= NEAR_AN_END * max(abs(edge), self.begin * NEAR_AN_END):
                return edge
        return t

    def _time_of(self, sigma: float) -> float:
        """The t, in the range of the plan, at which the noise level s / a is `sigma`, which may be 0 or infinite.

        By bisection: s / a rises with t.
        """
        low, high = self.end, self.begin
        if sigma <= self._sigma(low):
            return low
        if sigma >= self._sigma(high):
            return high
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if self._sigma(middle) < sigma else (low, middle)
        return high

    def network_inputs(self, x: Array, t: Array, xp: Namespace) -> tuple[Array, Array]:
        """(x as the network sees it, float32 as x; t as it is given to the network, float32 as t (N,))."""
        given: Array = network_time(self.time, self.objective, self.process, t, lambda: self._at(t, xp), xp)
        if self.objective.input_scale is None:
            return x, given
        return self.objective.input_scale(self._at(t, xp), xp) * x, given

    def slope(self, x: Array, output: Array, t: Array, xp: Namespace) -> Array:
        """dx/dt of x float32 (N, C, H, W) at t (N,) with the network's output (N, C, H, W), guidance included.

        Solves x = a x_0 + s eps and u = p x_0 + q eps, so that a velocity is exactly itself, also at s = 0.
        """
        at = self._at(t, xp)
        if self.clip_denoised:
            rate = at.ds / at.s
            slope: Array = rate * x + (at.da - at.a * rate) * self.image(x, output, t, xp)
            return slope
        p, q = self.objective.target(at, xp)
        determinant = at.a * q - at.s * p
        slope = ((at.da * q - at.ds * p) / determinant) * x + ((at.ds * at.a - at.da * at.s) / determinant) * output
        return slope

    def image(self, x: Array, output: Array, t: Array, xp: Namespace) -> Array:
        """The image D (N, C, H, W) that is predicted, arguments as of `slope`."""
        at = self._at(t, xp)
        from_x, from_output = image_from(at, self.objective.target(at, xp))
        image: Array = from_x * x + from_output * output
        return xp.clip(image, -1.0, 1.0) if self.clip_denoised else image

    def _at(self, t: Array, xp: Namespace) -> Coefficients:
        """The process at t (N,): (N, 1, 1, 1) each, or floats."""
        return self.process.coefficients(t[:, None, None, None], xp)


def make_adaptive_plan(
    name: str,
    objective: Objective,
    process: Process,
    *,
    first: float,
    last: float,
    clip_denoised: bool,
    time: str,
) -> AdaptivePlan:
    """The plan of the adaptive sampler. first, last: range of t in which the network can be asked. time: of the backbone.

    Raises UserError where the slope is not finite inside of that range.
    """

    def ending_at(end: float) -> AdaptivePlan:
        return AdaptivePlan(
            name=name, schedule=process.name, clip_denoised=clip_denoised, objective=objective, process=process,
            begin=last, end=end, time=time,
        )  # fmt: skip

    def is_finite(plan: AdaptivePlan, t: float) -> bool:
        with np.errstate(all="ignore"):
            x = output = np.ones((1, 1, 1, 1))
            slope = plan.slope(x, output, np.array([t]), np)
        return bool(np.isfinite(slope).all())

    plan = ending_at(first)
    if not is_finite(plan, first):
        plan = ending_at(END_MARGIN)
    for t in (plan.begin, plan.end):
        if not is_finite(plan, t):
            raise UserError(
                f"a network of the objective {objective.name} cannot be sampled by {name} on {process.name}: its output does "
                f"not tell dx/dt at t = {t:g}; choose another objective or sampler"
            )
    return plan


def first_step(
    slope: Callable[[Array, Array], Array],  # (x, t (N,)) -> dx/dt
    x: Array,  # float32 (N, C, H, W)
    k: Array,  # slope at x
    t: Array,  # float32 (N,)
    end: Array,  # float32, or a float
    xp: Namespace,
) -> Array:
    """The size of the first step, float32 (N,), from the second derivative along Euler's step (Hairer et al., sec. II.4).

    Evaluates the slope once.
    """
    scale = ATOL + RTOL * xp.abs(x)
    size, speed = _rms(x / scale, xp), _rms(k / scale, xp)
    is_small = (size < 1e-5) | (speed < 1e-5)
    guess = xp.where(is_small, 1e-6 * t, 0.01 * size / xp.where(is_small, 1.0, speed))  # (N,)
    guess = xp.minimum(guess, t - end)
    bend = _rms((slope(x - _column(guess) * k, t - guess) - k) / scale, xp) / guess
    largest = xp.maximum(speed, bend)
    is_flat = largest <= 1e-15
    step = xp.where(
        is_flat, xp.maximum(1e-3 * guess, 1e-6 * t), (0.01 / xp.where(is_flat, 1.0, largest)) ** (1 / ORDER)
    )
    return xp.minimum(100 * guess, step)


def stage_state(x: Array, slopes: Array, weights: Array, signed_step: Array) -> Array:
    """x plus a step along the slopes (7, N, C, H, W) with these weights (7,). signed_step: (N,), negative."""
    return x + _column(signed_step) * (weights[:, None, None, None, None] * slopes).sum(0)


class Judged(NamedTuple):
    """What came of an attempted step, (N,) each."""

    accepted: Array  # bool
    step: Array  # size of the next attempt


def judged(
    x: Array,  # float32 (N, C, H, W), before the step
    after: Array,  # and after it
    slopes: Array,  # (7, N, C, H, W)
    error_weights: Array,  # ERROR_WEIGHTS as the framework has them
    tried: Array,  # (N,): size of the step
    proposed: Array,  # (N,): what it would have been if the segment did not end; at least `tried`
    xp: Namespace,
) -> Judged:
    """Whether the error of each image's step is within the tolerances, and the size of its next step."""
    error = _column(tried) * (error_weights[:, None, None, None, None] * slopes).sum(0)
    scale = ATOL + RTOL * xp.maximum(xp.abs(x), xp.abs(after))
    ratio = _rms(error / scale, xp)  # (N,)
    accepted, is_known = ratio <= 1, ratio < float("inf")  # both False for NaN
    factor = SAFETY * xp.clip(xp.where(is_known, ratio, 1.0), 1e-10, None) ** (-1 / ORDER)
    factor = xp.where(is_known, xp.clip(factor, LEAST_FACTOR, LARGEST_FACTOR), LEAST_FACTOR)
    longer = tried * xp.clip(factor, 1.0, None)  # an accepted step is never followed by a smaller one
    # A step that was cut at the end of a segment says little about the next one, hence `proposed`.
    return Judged(accepted, xp.where(accepted, xp.maximum(longer, proposed), tried * factor))


def is_stuck(t: np.ndarray, end: float, step: np.ndarray, attempts: int) -> bool:
    """Whether an image makes no progress: its values are not finite, or float32 does not meet the tolerances."""
    is_working = t > end
    without_progress = (t - step >= t) | ~np.isfinite(step) | (attempts > MAX_ATTEMPTS)
    return bool((is_working & without_progress).any())


class Progress:
    """Calls `advance` PROGRESS_UNITS times in all while the share of t that all images are through goes to 1."""

    def __init__(self, advance: Callable[[], None]):
        self._advance, self._done = advance, 0

    def reach(self, share: float) -> None:
        """Count up to `share`."""
        while self._done < int(PROGRESS_UNITS * share):
            self._done += 1
            self._advance()


def mean_and_largest(counts: Sequence[int] | np.ndarray) -> tuple[float, int]:
    """Of the network evaluations of each image."""
    return float(np.mean(np.asarray(counts, np.float64))), int(np.max(counts))


def _column(values: Array) -> Array:
    return values[:, None, None, None]


def _rms(values: Array, xp: Namespace) -> Array:
    """The root mean square of each image (N, C, H, W): (N,)."""
    return xp.sqrt((values**2).mean((1, 2, 3)))
