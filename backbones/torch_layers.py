"""Torch layers that more than one family of backbones uses."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention of tensors (N, heads, tokens, features of a head).

    k and v may have another number of tokens than q.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[-2] <= 256:
        # In bfloat16, torch's fused CPU kernel takes 3 (256 tokens) to 7 times (16 tokens) as long as two matrix
        # products. Their scores are small enough to store, and the error of rounding them is about that of autocast,
        # which rounds q and k.
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (N, H, T of q, T of k)
        return scores.softmax(dim=-1) @ v  # (N, H, T, D/H)
    return F.scaled_dot_product_attention(q, k, v)  # (N, H, T, D/H)


# 2 u = SLOPE x + CUBIC x^3, where u is the argument of tanh in GELU's tanh form
SLOPE, CUBIC = 2 * math.sqrt(2 / math.pi), 2 * math.sqrt(2 / math.pi) * 0.044715


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form, x (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), of a tensor of any shape.

    On a CPU, compiled code and float32 tensors use x sigmoid(2 u), which is the same function up to float32 rounding:
    torch's tanh takes several times as long there as its sigmoid. Uncompiled bfloat16 uses torch's gelu, because the
    steps of the other formula would each be rounded to bfloat16.
    """
    if x.device.type == "cpu" and torch.compiler.is_compiling():  # the compiler fuses the steps of a plain formula
        wide = x if x.dtype == torch.float64 else x.float()  # float32 or float64
        return (wide * torch.sigmoid(wide * (SLOPE + CUBIC * wide * wide))).to(x.dtype)
    if x.device.type == "cpu" and x.dtype == torch.float32:
        return _SigmoidGelu.apply(x)
    return F.gelu(x, approximate="tanh")


class _SigmoidGelu(torch.autograd.Function):
    """x sigmoid(2 u), with as few passes over memory as torch's operators allow; the backward pass is torch's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        slope_and_cubic = torch.addcmul(x.new_tensor(SLOPE), x, x, value=CUBIC)  # 2 u / x
        return slope_and_cubic.mul_(x).sigmoid_().mul_(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")


def full_precision(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Context without autocast, also for the meta device, which does not support autocast."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def timestep_features(t: Tensor, features: int) -> Tensor:
    """Sinusoids of timesteps t (N,), integer or not: float32 (N, features), cosines first.

    Frequencies 10000^(-i / half) for i = 0 ... half - 1 (openai/guided-diffusion nn.py, timestep_embedding; DiT's too).
    """
    half = features // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(-math.log(10000) * steps / half)  # (half,)
    angles = t.float().unsqueeze(1) * frequencies  # (N, half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)  # (N, features)
