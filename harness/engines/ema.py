"""The exponential moving average (EMA) of the weights: its rule, the same in both frameworks."""

from __future__ import annotations

from harness.protocols import Recipe

RAMP_LAG = 10


def ema_decay(recipe: Recipe, step: int) -> float:
    """The decay at optimiser step `step` (from 1): ema <- decay x ema + (1 - decay) x weights.

    With `ema_ramp` it is at most (1 + step) / (10 + step), as in TensorFlow's ExponentialMovingAverage.
    """
    if not recipe.ema_ramp:
        return recipe.ema_decay
    return min(recipe.ema_decay, (1 + step) / (RAMP_LAG + step))
