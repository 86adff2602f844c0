"""The loss of a backbone of each kind in jax: `harness.engines.torch.loss_functions`, function by function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from harness.diffusion.sampler_plan import check_times
from harness.diffusion.training import TrainingObjective
from harness.engines.jax.loss import DenoisingLoss
from harness.engines.loss_terms import loss_terms_of
from harness.protocols import Recipe
from harness.randomness import Purpose
from harness.randomness import threefry_jax as random
from harness.randomness.threefry_jax import Words
from harness.spec import BackboneSpec


class LossFunction:
    """The loss of one backbone under one recipe. Random numbers depend only on the seed and an example's position."""

    def __init__(self, spec: BackboneSpec, arguments: Mapping[str, Any], *, recipe: Recipe, seed: int):
        self.loss_terms = loss_terms_of(spec)
        self._kind, self._recipe, self._seed = spec.kind, recipe, seed
        self._low_res_size: int = arguments.get("low_res_size", 0)  # 0: not an upsampler
        self._null_label = spec.null_index(arguments["num_classes"])
        training = TrainingObjective.from_recipe(recipe, spec.time)
        check_times(spec, training.objective)
        self._loss = DenoisingLoss(training)

    def losses(self, net: Callable[..., Array], x0: Array, y: Array, positions: Words) -> dict[str, Array]:
        """The loss terms by name, float32 (N,) each; the names are those of `loss_terms`.

        net: called as networks of this kind are (`harness.spec.KINDS`). x0: images float32 (N, C, H, W) in [-1, 1], or
        latents. y: labels int32 (N,). positions: (N,) in the stream of examples.
        """
        recipe, seed = self._recipe, self._seed
        t = self._loss.times(seed, positions)  # (N,) or (N, 2)
        noise = random.normal(seed, Purpose.TRAINING_NOISE, positions, 0, x0.shape[1:])  # (N, C, H, W)
        xt, network_t = self._loss.network_inputs(self._loss.noised(x0, t, noise), t)  # (N, C, H, W), (N,) or (N, 2)
        if self._kind == "classifier":
            logits = net(xt, network_t).astype(jnp.float32)  # (N, num_classes)
            log_likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1)[:, 0]  # (N,)
            return {"cross_entropy": -log_likelihood, "accuracy": (logits.argmax(axis=1) == y).astype(jnp.float32)}
        if self._null_label is not None and recipe.label_dropout:
            dropped = random.uniform(seed, Purpose.LABEL_DROPOUT, positions, 0) < recipe.label_dropout
            y = jnp.where(dropped, self._null_label, y)
        if self._kind == "upsampler":
            output = net(xt, network_t, y, self._low_resolution(x0, positions))
        else:
            output = net(xt, network_t, y)
        step_target = self._loss.step_target(lambda x, t: net(x, t, y), x0, t, noise)
        mse, vb = self._loss.terms(output, x0, t, noise, step_target)
        return {"mse": mse, "vb": vb}

    def _low_resolution(self, x0: Array, positions: Words) -> Array:
        """x0 (N, C, H, W) averaged over areas to (N, C, s, s), plus Gaussian noise of a random level for each image."""
        low = area_means(x0, self._low_res_size)  # (N, C, s, s)
        if self._recipe.conditioning_noise:
            level = random.uniform(self._seed, Purpose.CONDITIONING_LEVEL, positions, 0)  # (N,) in [0, 1)
            noise = random.normal(self._seed, Purpose.CONDITIONING_NOISE, positions, 0, low.shape[1:])
            low = low + self._recipe.conditioning_noise * level[:, None, None, None] * noise
        return low


def area_means(x: Array, side: int) -> Array:
    """Means over a grid of side x side areas, (N, C, H, W) -> (N, C, side, side), as torch's adaptive_avg_pool2d.

    Areas overlap if `side` does not divide H or W.
    """
    for axis in (2, 3):
        size = x.shape[axis]
        cells = [
            # from floor(cell * size / side) to ceil((cell + 1) * size / side)
            x.take(jnp.arange(cell * size // side, -(-(cell + 1) * size // side)), axis).mean(axis, keepdims=True)
            for cell in range(side)
        ]
        x = jnp.concatenate(cells, axis)
    return x
