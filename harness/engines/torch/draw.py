"""Sampling in torch: weights, network and plan put together; images out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness import checkpoints
from harness.diffusion.plans import SamplerPlan
from harness.engines.torch.resolve import autocast
from harness.engines.torch.sampler import guided, sample_loop
from harness.errors import Failure, Refusal
from harness.protocols import Sampling
from harness.randomness import Purpose
from harness.randomness import threefry_torch as random
from harness.spec import BackboneSpec


def load_weights(net: torch.nn.Module, path: Path) -> torch.nn.Module:
    """Copy a safetensors file into `net`, one tensor at a time; what does not fit is refused by name."""
    state = net.state_dict()
    seen = set()
    for name, array in checkpoints.tensors(path):
        if name not in state or tuple(state[name].shape) != array.shape:
            raise Refusal(f"{path} does not fit the backbone: it holds {name} {array.shape}")
        with torch.no_grad():
            state[name].copy_(torch.from_numpy(array))
        seen.add(name)
    if missing := sorted(set(state) - seen):
        raise Refusal(f"{path} does not fit the backbone: {missing[0]} is missing")
    return net


class TorchSampler:
    """Draws samples of one network under one plan. Implements `harness.sampling.Sampler`."""

    def __init__(
        self,
        spec: BackboneSpec,
        net: torch.nn.Module,
        plan: SamplerPlan,
        sampling: Sampling,
        *,
        arguments: dict[str, Any],
        precision: str,
        device: torch.device,
    ):
        self._net = net.to(device).eval().requires_grad_(False)
        self._plan, self._sampling, self._precision, self._device = plan, sampling, precision, device
        self._shape = (arguments["in_channels"], arguments["input_size"], arguments["input_size"])
        self._null = spec.null_index(arguments["num_classes"])
        self.evaluations = plan.evaluations * (2 if sampling.guidance_scale != 1 else 1)

    def draw(self, index: np.ndarray, labels: np.ndarray, advance: Callable[[], None] = lambda: None) -> np.ndarray:
        """Images (N, H, W, C) uint8 of sample indices (N,) with labels (N,)."""
        seed = self._sampling.seed
        rows = torch.from_numpy(index).to(self._device)
        y = torch.from_numpy(labels).to(self._device)
        x = random.normal(seed, Purpose.INITIAL_NOISE, rows, 0, self._shape)  # (N, C, H, W)

        def call(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            with autocast(self._device, self._precision):
                return self._net(x, t, y).float()

        predict = guided(call, y, self._sampling.guidance_scale, self._sampling.guidance_channels, self._null)
        x = sample_loop(
            predict,
            self._plan,
            x,
            lambda k: random.normal(seed, Purpose.STEP_NOISE, rows, k, self._shape),
            progress=lambda *_: advance(),
        )
        return to_uint8(x, self._sampling.uint8_rule)


def to_uint8(x: torch.Tensor, rule: str) -> np.ndarray:
    """(N, C, H, W) about [-1, 1] -> (N, H, W, C) uint8. "dit": clamp(127.5 x + 128, 0, 255) truncated (its sample_ddp.py)."""
    assert rule == "dit", rule
    if not torch.isfinite(x).all():
        raise Failure("sampling ended in values that are not finite; train longer or sample with float32")
    return (127.5 * x + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
