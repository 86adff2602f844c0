"""Moving averages of the weights: their rules, the same in both frameworks.

Every run has the exponential moving average (EMA) "ema". With the recipe's `ema_widths` it also has an average with a
power-function profile for each width, of which any other width can be reconstructed after training
(`harness.runs.posthoc_ema`): Karras et al. 2024, arXiv:2312.02696, sec. 3 and appendix C.

The power-function average after t steps weighs the weights of time tau <= t by tau^gamma:
(gamma + 1) / t^(gamma + 1) x integral of tau^gamma theta(tau) from 0 to t (sec. 3.1). Its width sigma_rel is the standard
deviation of this profile as a share of t, so it is the same share of a training of any length.
"""

from __future__ import annotations

import functools
import math

from harness.protocols import Recipe

RAMP_LAG = 10
NEWTON_STEPS = 100  # at most; it takes about five


def ema_decay(recipe: Recipe, step: int) -> float:
    """The decay at optimiser step `step` (from 1): ema <- decay x ema + (1 - decay) x weights.

    With `ema_ramp` it is at most (1 + step) / (10 + step), as in TensorFlow's ExponentialMovingAverage.
    """
    if not recipe.ema_ramp:
        return recipe.ema_decay
    return min(recipe.ema_decay, (1 + step) / (RAMP_LAG + step))


def width_of(gamma: float) -> float:
    """sigma_rel of the profile tau^gamma: sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3)), as in sec. 3.1 of the paper."""
    return math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3))


@functools.cache
def gamma_of(width: float) -> float:
    """The exponent gamma >= 0 of the profile with this sigma_rel, in (0, 1/sqrt(12)].

    `width_of` solved for gamma: the largest root of gamma^3 + 7 gamma^2 + (16 - r) gamma + 12 - r with r = 1 / width^2.
    """
    r = 1 / width**2
    # Newton's method falls monotonically from any point above the largest root, because the cubic is convex there. At
    # gamma = 1/width the cubic is 6 r + 16/width + 12 > 0, and the root is less than 4 below.
    gamma = 1 / width
    for _ in range(NEWTON_STEPS):
        value = ((gamma + 7) * gamma + 16 - r) * gamma + 12 - r
        following = gamma - value / ((3 * gamma + 14) * gamma + 16 - r)
        if following >= gamma:  # as close as float64 gets
            break
        gamma = following
    return max(gamma, 0.0)


def power_weight(gamma: float, step: int) -> float:
    """1 - beta at step `step` (from 1), with beta = (1 - 1/step)^(gamma + 1): average <- average + this x (weights - average).

    At step 1 it is 1, so the initial weights are no part of the average. Without the loss of digits of 1 - beta.
    """
    return 1.0 if step == 1 else -math.expm1((gamma + 1) * math.log1p(-1 / step))


def power_part(width: float) -> str:
    """Name of the part of a checkpoint that holds the average with this width: "ema-0.05"."""
    return f"ema-{width!r}"


def parts(recipe: Recipe) -> tuple[str, ...]:
    """The averages of a run, by the names of their parts of a checkpoint: "ema", then one for each of `ema_widths`."""
    return ("ema", *map(power_part, recipe.widths))


def snapshot_steps(recipe: Recipe, total: int) -> tuple[int, ...]:
    """The steps of a training of `total` steps after which the averages of `ema_widths` are saved, ascending.

    They are `ema_snapshots` multiples of total / ema_snapshots, rounded; fewer in a training of fewer steps.
    """
    if not recipe.widths:
        return ()
    count = recipe.ema_snapshots
    return tuple(sorted({max(1, round(total * number / count)) for number in range(1, count + 1)}))


def update_weights(recipe: Recipe, step: int) -> dict[str, float]:
    """Part -> share of the new weights in its average at step `step` (from 1), in float64."""
    shares = {"ema": 1 - ema_decay(recipe, step)}
    return shares | {power_part(width): power_weight(gamma_of(width), step) for width in recipe.widths}
