"""Torch layers that more than one family of backbones uses."""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor
from torch.nn import functional as F


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention of (N, H, T, D/H) tensors; k and v may have other tokens than q."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[-2] <= 256:
        # torch's fused CPU kernel takes 3 (256 tokens) to 7 times (16 tokens) as long in bfloat16 as two matrix
        # products, whose scores still fit here; rounding them errs as much as autocast's rounding of q and k does.
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (N, H, T, T)
        return scores.softmax(dim=-1) @ v  # (N, H, T, D/H)
    return F.scaled_dot_product_attention(q, k, v)  # (N, H, T, D/H)


SLOPE, CUBIC = 2 * math.sqrt(2 / math.pi), 2 * math.sqrt(2 / math.pi) * 0.044715  # of GELU's tanh form


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form, x (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), of a tensor of any shape.

    On a CPU it is computed as x sigmoid(2 u) in float32, the same function: torch's tanh takes several times as long
    there as its sigmoid. The two differ by float32 rounding. Uncompiled bfloat16 would round between its steps, and is
    left to torch.
    """
    if x.device.type == "cpu" and torch.compiler.is_compiling():
        wide = x if x.dtype == torch.float64 else x.float()
        return (wide * torch.sigmoid(wide * (SLOPE + CUBIC * wide * wide))).to(x.dtype)
    if x.device.type == "cpu" and x.dtype == torch.float32:
        return _SigmoidGelu.apply(x)
    return F.gelu(x, approximate="tanh")


class _SigmoidGelu(torch.autograd.Function):
    """x sigmoid(2 u), in as few passes over memory as torch has; the backward pass is torch's own."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.addcmul(x.new_tensor(SLOPE), x, x, value=CUBIC).mul_(x).sigmoid_().mul_(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")


def full_precision(device_type: str) -> contextlib.AbstractContextManager:
    """Autocast off; the meta device has none."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def timestep_features(t: Tensor, features: int) -> Tensor:
    """Sinusoids of timesteps t (N,), whole or not: float32 (N, features), cosines first.

    Frequencies 10000^(-i / half) for i = 0 ... half - 1 (openai/guided-diffusion nn.py, timestep_embedding; DiT's too).
    """
    half = features // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(-math.log(10000) * steps / half)  # (half,)
    angles = t.float().unsqueeze(1) * frequencies  # (N, half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)  # (N, features)
