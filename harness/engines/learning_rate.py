"""The schedule of the learning rate, the same in both frameworks."""

from __future__ import annotations

from harness.protocols import Recipe


def learning_rate(recipe: Recipe, step: int) -> float:
    """The learning rate at optimiser step `step` (from 1): a linear warmup over `warmup_steps`, then constant."""
    if not recipe.warmup_steps:
        return recipe.learning_rate
    return recipe.learning_rate * min(1.0, step / recipe.warmup_steps)
