"""What a network of each kind is trained on in torch: how its loss comes from one micro-batch of images.

Denoisers: noise and, where it is learned, variance. Upsamplers: the same, given the image at low resolution.
Classifiers: the label of a noised image (Dhariwal and Nichol 2021, sec. 4.1; guided-diffusion classifier_train.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.diffusion.schedule import Schedule
from harness.engines.loss_terms import LOSS_TERMS
from harness.engines.torch.loss import LossTables, training_losses
from harness.errors import UserError
from harness.protocols import Recipe
from harness.randomness import Purpose
from harness.randomness import threefry_torch as random
from harness.registry import objectives
from harness.spec import BackboneSpec


class LossFunction:
    """The loss of one backbone under one recipe. Everything random is a function of seed and position alone."""

    def __init__(
        self, spec: BackboneSpec, arguments: Mapping[str, Any], *, recipe: Recipe, seed: int, device: torch.device
    ):
        if spec.kind not in LOSS_TERMS:
            raise UserError(f"backbone {spec.name!r} is a {spec.kind}, which the harness samples and does not train")
        self.loss_terms = LOSS_TERMS[spec.kind]
        self._kind, self._recipe, self._seed = spec.kind, recipe, seed
        self._low_side = arguments.get("low_res_size")
        self._null = spec.null_index(arguments["num_classes"])
        self._tables = LossTables(Schedule.named(recipe.schedule, recipe.diffusion_steps), device)
        self._objective = objectives.get(recipe.objective)

    def losses(self, net: Callable[..., Tensor], x0: Tensor, y: Tensor, positions: Tensor) -> dict[str, Tensor]:
        """Terms (N,) float32 of images x0 (N, C, H, W) in [-1, 1], labels y (N,), at positions (N,) of the stream.

        `net` brings its own autocast; all else is float32.
        """
        recipe, seed = self._recipe, self._seed
        t = random.integers(seed, Purpose.TIMESTEP, positions, 0, recipe.diffusion_steps)  # (N,)
        noise = random.normal(seed, Purpose.TRAINING_NOISE, positions, 0, tuple(x0.shape[1:]))  # (N, C, H, W)
        xt = self._tables.q_sample(x0, t, noise)  # (N, C, H, W)
        if self._kind == "classifier":
            logits = net(xt, t).float()  # (N, num_classes)
            cross_entropy = F.cross_entropy(logits, y, reduction="none")  # (N,)
            return {"cross_entropy": cross_entropy, "accuracy": (logits.argmax(dim=1) == y).float()}
        if self._null is not None and recipe.label_dropout:
            dropped = random.uniform(seed, Purpose.LABEL_DROPOUT, positions, 0) < recipe.label_dropout
            y = torch.where(dropped, self._null, y)
        if self._kind == "upsampler":
            output = net(xt, t, y, self._low_resolution(x0, positions))
        else:
            output = net(xt, t, y)
        mse, vb = training_losses(self._objective, self._tables, output, x0, t, noise)
        return {"mse": mse, "vb": vb}

    def _low_resolution(self, x0: Tensor, positions: Tensor) -> Tensor:
        """The images averaged over areas, with Gaussian noise of a level drawn for each up to the recipe's.

        The noise is the conditioning augmentation of Ho et al., "Cascaded Diffusion Models" (arXiv:2106.15282), sec.
        4.2, in its simplest form: the network is not told the level.
        """
        low = F.adaptive_avg_pool2d(x0, self._low_side)  # (N, C, s, s)
        if self._recipe.conditioning_noise:
            level = random.uniform(self._seed, Purpose.CONDITIONING_LEVEL, positions, 0)  # (N,) in [0, 1)
            noise = random.normal(self._seed, Purpose.CONDITIONING_NOISE, positions, 0, tuple(low.shape[1:]))
            low = low + self._recipe.conditioning_noise * level[:, None, None, None] * noise
        return low
