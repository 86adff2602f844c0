"""A ConvMixer that is told the timestep and the class.

Source: "Patches Are All You Need?" (Trockman and Kolter, arXiv:2201.09792), Sec. 2: patches, then blocks of a depthwise
convolution with a skip and a pointwise convolution. Batch norm is replaced by group norm, for an image must not depend
on its batch; scale and shift of the norms come from timestep and class.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.errors import UserError

TIME_FEATURES = 64  # sines and cosines of the timestep


def time_features(t: Tensor) -> Tensor:
    """t (N,) -> float32 (N, TIME_FEATURES): frequencies from 1 down to 1/10,000, geometric."""
    half = TIME_FEATURES // 2
    frequency = torch.exp(-math.log(10_000) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class Norm(nn.Module):
    """Group norm of one group whose scale and shift are a linear function of the condition."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(1, width, affine=False)
        self.condition = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        scale, shift = self.condition(c)[:, :, None, None].chunk(2, dim=1)  # (N, D, 1, 1) each
        return self.norm(x) * (1 + scale) + shift  # (N, D, h, w)


class Block(nn.Module):
    """Depthwise convolution over space, pointwise convolution over channels."""

    def __init__(self, width: int, kernel: int):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, kernel, padding="same", groups=width)
        self.norm1 = Norm(width)
        self.pointwise = nn.Conv2d(width, width, 1)
        self.norm2 = Norm(width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = x + self.norm1(F.gelu(self.depthwise(x)), c)  # (N, D, h, w)
        return x + self.norm2(F.gelu(self.pointwise(x)), c)  # (N, D, h, w)


class ConvMixer(nn.Module):
    """Denoiser. Argument names are those of the spec's `defaults`; out_channels None means 2 * in_channels."""

    def __init__(
        self,
        *,
        input_size: int,
        in_channels: int,
        num_classes: int,
        out_channels: int | None,
        width: int,
        depth: int,
        kernel: int,
        patch: int,
    ):
        super().__init__()
        if input_size % patch:
            raise UserError(
                f"ConvMixer: input_size {input_size} is not divisible by patch {patch}; crop or pad the images"
            )
        out_channels = 2 * in_channels if out_channels is None else out_channels
        self.patches = nn.Conv2d(in_channels, width, patch, stride=patch)
        self.time = nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(num_classes + 1, width)  # the last row: no class
        self.blocks = nn.ModuleList(Block(width, kernel) for _ in range(depth))
        self.out = nn.Conv2d(width, out_channels * patch**2, 1)
        self.patch = patch
        nn.init.zeros_(self.out.weight)  # begins by predicting nothing
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c = F.silu(self.time(time_features(t)) + self.label(y))  # (N, D)
        x = self.patches(x)  # (N, D, H/p, W/p)
        for block in self.blocks:
            x = block(x, c)  # (N, D, H/p, W/p)
        return F.pixel_shuffle(self.out(x), self.patch)  # (N, out_channels, H, W)
