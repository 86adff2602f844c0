"""The loss of a backbone of each kind in torch, from one micro-batch of images.

Denoisers predict the noise and, where it is learned, the variance. Upsamplers do the same and are given the image at low
resolution. Classifiers predict the label of a noised image (Dhariwal and Nichol 2021, sec. 4.1; guided-diffusion
classifier_train.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.diffusion.sampler_plan import check_times
from harness.diffusion.training import TrainingObjective
from harness.engines.loss_terms import loss_terms_of
from harness.engines.torch.loss import DenoisingLoss
from harness.protocols import Recipe
from harness.randomness import Purpose
from harness.randomness import threefry_torch as random
from harness.spec import BackboneSpec


class Draws(NamedTuple):
    """The random numbers of one micro-batch: the small ones as they are, noise on images by its keys."""

    t: Tensor  # (N,), or (N, 2) with the ends of steps
    y: Tensor  # int64 (N,): labels, of which some may be the null label
    level: Tensor  # float32 (N,) in [0, 1): of the noise on an upsampler's input; (0,): there is none
    normal: random.JointNormals  # noise on images

    def tensors(self) -> list[Tensor]:
        """What goes to the device, for `with_tensors`."""
        return [self.t, self.y, self.level, self.normal.words]

    def with_tensors(self, t: Tensor, y: Tensor, level: Tensor, words: Tensor) -> Draws:
        """The same random numbers, with `tensors` on a device."""
        self.normal.use(words)
        return Draws(t, y, level, self.normal)


class LossFunction:
    """The loss of one backbone under one recipe. Random numbers depend only on the seed and an example's position."""

    def __init__(
        self, spec: BackboneSpec, arguments: Mapping[str, Any], *, recipe: Recipe, seed: int, device: torch.device
    ):
        self.loss_terms = loss_terms_of(spec)
        self._device = device
        self._kind, self._recipe, self._seed = spec.kind, recipe, seed
        self._low_res_size: int = arguments.get("low_res_size", 0)  # 0: not an upsampler
        self._null_label = spec.null_index(arguments["num_classes"])
        training = TrainingObjective.from_recipe(recipe, spec.time)
        check_times(spec, training.objective)
        self._loss = DenoisingLoss(training, device)

    def draws(self, y: Tensor, positions: Tensor) -> Draws:
        """The random numbers of the examples at `positions`, int64 (N,), with labels `y`, int64 (N,); all on the CPU."""
        recipe, seed = self._recipe, self._seed
        level = torch.empty(0)
        if self._kind == "upsampler" and recipe.conditioning_noise:
            level = random.uniform(seed, Purpose.CONDITIONING_LEVEL, positions, 0)
        if self._kind != "classifier" and self._null_label is not None and recipe.label_dropout:
            dropped = random.uniform(seed, Purpose.LABEL_DROPOUT, positions, 0) < recipe.label_dropout
            y = torch.where(dropped, self._null_label, y)
        purposes = [Purpose.POSTERIOR, Purpose.TRAINING_NOISE, *([Purpose.CONDITIONING_NOISE] if len(level) else [])]
        return Draws(
            self._loss.times(seed, positions), y, level, random.JointNormals(seed, purposes, positions, self._device)
        )

    def losses(self, net: Callable[..., Tensor], x0: Tensor, draws: Draws) -> dict[str, Tensor]:
        """The loss terms by name, float32 (N,) each; the names are those of `loss_terms`.

        net: called as networks of this kind are (`harness.spec.KINDS`); it sets its own autocast, and everything else is
        float32. x0: images float32 (N, C, H, W) in [-1, 1], or latents. draws: of the method, on the device of x0.
        """
        t, y, level, normal = draws
        noise = normal(Purpose.TRAINING_NOISE, tuple(x0.shape[1:]))  # (N, C, H, W)
        # Before the network's own pass, whose activations an auxiliary loss taps.
        step_target = self._loss.step_target(lambda x, t: net(x, t, y), x0, t, noise)
        xt, network_t = self._loss.network_inputs(self._loss.noised(x0, t, noise), t)  # (N, C, H, W), (N,) or (N, 2)
        if self._kind == "classifier":
            logits = net(xt, network_t).float()  # (N, num_classes)
            cross_entropy = F.cross_entropy(logits, y, reduction="none")  # (N,)
            return {"cross_entropy": cross_entropy, "accuracy": (logits.argmax(dim=1) == y).float()}
        if self._kind == "upsampler":
            output = net(xt, network_t, y, self._low_resolution(x0, level, normal))
        else:
            output = net(xt, network_t, y)
        mse, vb = self._loss.terms(output, x0, t, noise, step_target)
        return {"mse": mse, "vb": vb}

    def _low_resolution(self, x0: Tensor, level: Tensor, normal: random.JointNormals) -> Tensor:
        """x0 (N, C, H, W) averaged over areas to (N, C, s, s), plus Gaussian noise of a random level for each image.

        The level is uniform from 0 to the recipe's conditioning_noise. This is the conditioning augmentation of Ho et al.,
        "Cascaded Diffusion Models" (arXiv:2106.15282), sec. 4.2, in its simplest form: the level is no input of the network.
        """
        low = F.adaptive_avg_pool2d(x0, self._low_res_size)  # (N, C, s, s)
        if len(level):
            noise = normal(Purpose.CONDITIONING_NOISE, tuple(low.shape[1:]))
            low = low + self._recipe.conditioning_noise * level[:, None, None, None] * noise
        return low
