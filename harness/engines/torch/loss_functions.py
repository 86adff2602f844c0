"""The loss of a backbone of each kind in torch, from one micro-batch of images.

Denoisers predict the noise and, where it is learned, the variance. Upsamplers do the same and are given the image at low
resolution. Classifiers predict the label of a noised image (Dhariwal and Nichol 2021, sec. 4.1; guided-diffusion
classifier_train.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.diffusion.training import TrainingObjective
from harness.engines.loss_terms import loss_terms_of
from harness.engines.torch.loss import DenoisingLoss
from harness.protocols import Recipe
from harness.randomness import Purpose
from harness.randomness import threefry_torch as random
from harness.spec import BackboneSpec


class LossFunction:
    """The loss of one backbone under one recipe. Random numbers depend only on the seed and an example's position."""

    def __init__(
        self, spec: BackboneSpec, arguments: Mapping[str, Any], *, recipe: Recipe, seed: int, device: torch.device
    ):
        self.loss_terms = loss_terms_of(spec)
        self._kind, self._recipe, self._seed = spec.kind, recipe, seed
        self._low_res_size: int = arguments.get("low_res_size", 0)  # 0: not an upsampler
        self._null_label = spec.null_index(arguments["num_classes"])
        self._loss = DenoisingLoss(TrainingObjective.from_recipe(recipe, spec.time), device)

    def losses(self, net: Callable[..., Tensor], x0: Tensor, y: Tensor, positions: Tensor) -> dict[str, Tensor]:
        """The loss terms by name, float32 (N,) each; the names are those of `loss_terms`.

        net: called as networks of this kind are (`harness.spec.KINDS`); it sets its own autocast, and everything else is
        float32. x0: images float32 (N, C, H, W) in [-1, 1], or latents. y: labels int64 (N,). positions: int64 (N,) in the
        stream of examples.
        """
        recipe, seed = self._recipe, self._seed
        t = self._loss.times(seed, positions)  # (N,)
        noise = random.normal(seed, Purpose.TRAINING_NOISE, positions, 0, tuple(x0.shape[1:]))  # (N, C, H, W)
        xt, network_t = self._loss.network_inputs(self._loss.noised(x0, t, noise), t)  # (N, C, H, W), (N,)
        if self._kind == "classifier":
            logits = net(xt, network_t).float()  # (N, num_classes)
            cross_entropy = F.cross_entropy(logits, y, reduction="none")  # (N,)
            return {"cross_entropy": cross_entropy, "accuracy": (logits.argmax(dim=1) == y).float()}
        if self._null_label is not None and recipe.label_dropout:
            dropped = random.uniform(seed, Purpose.LABEL_DROPOUT, positions, 0) < recipe.label_dropout
            y = torch.where(dropped, self._null_label, y)
        if self._kind == "upsampler":
            output = net(xt, network_t, y, self._low_resolution(x0, positions))
        else:
            output = net(xt, network_t, y)
        mse, vb = self._loss.terms(output, x0, t, noise)
        return {"mse": mse, "vb": vb}

    def _low_resolution(self, x0: Tensor, positions: Tensor) -> Tensor:
        """x0 (N, C, H, W) averaged over areas to (N, C, s, s), plus Gaussian noise of a random level for each image.

        The level is uniform from 0 to the recipe's conditioning_noise. This is the conditioning augmentation of Ho et al.,
        "Cascaded Diffusion Models" (arXiv:2106.15282), sec. 4.2, in its simplest form: the level is no input of the network.
        """
        low = F.adaptive_avg_pool2d(x0, self._low_res_size)  # (N, C, s, s)
        if self._recipe.conditioning_noise:
            level = random.uniform(self._seed, Purpose.CONDITIONING_LEVEL, positions, 0)  # (N,) in [0, 1)
            noise = random.normal(self._seed, Purpose.CONDITIONING_NOISE, positions, 0, tuple(low.shape[1:]))
            low = low + self._recipe.conditioning_noise * level[:, None, None, None] * noise
        return low
