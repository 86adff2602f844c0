"""The network in torch."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbones.torch_layers import timestep_features
from harness.errors import UserError

EPS = 1e-6  # of layer norm
EXPANSION = 8 / 3  # channels of the gate and of the value, in widths
KERNEL = 7  # side of the depthwise convolution


class Block(nn.Module):
    """value x SiLU(gate), where a depthwise convolution has mixed `width` of the value's channels over the positions."""

    def __init__(self, width: int):
        super().__init__()
        self.hidden, self.mixed = int(EXPANSION * width), width
        self.norm = nn.LayerNorm(width, eps=EPS, elementwise_affine=False)
        self.into = nn.Linear(width, 2 * self.hidden)
        self.mix = nn.Conv2d(width, width, KERNEL, padding=KERNEL // 2, groups=width)
        self.back = nn.Linear(self.hidden, width)
        self.condition = nn.Linear(width, 3 * width)
        nn.init.zeros_(self.condition.weight)  # adaLN-Zero: the block begins as the identity
        nn.init.zeros_(self.condition.bias)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, amount = self.condition(c)[:, None, None].chunk(3, dim=3)  # (N, 1, 1, D) each
        gate, value = self.into(self.norm(x) * (1 + scale) + shift).chunk(2, dim=3)  # (N, h, w, hidden) each
        mixed, plain = value.split([self.mixed, self.hidden - self.mixed], dim=3)
        mixed = self.mix(mixed.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # (N, h, w, D)
        value = torch.cat([mixed, plain], dim=3)  # (N, h, w, hidden)
        return x + amount * self.back(F.silu(gate) * value)  # (N, h, w, D)


class GatedConv(nn.Module):
    """Denoiser. The arguments are those of the spec's `defaults`."""

    def __init__(
        self,
        *,
        input_size: int,
        in_channels: int,
        num_classes: int,
        out_channels: int | None,
        width: int,
        depth: int,
        patch: int,
    ):
        super().__init__()
        if input_size % patch:
            raise UserError(
                f"gated-conv: input_size {input_size} is not divisible by patch {patch}; crop or pad the images"
            )
        self.patch, self.width = patch, width
        out_channels = 2 * in_channels if out_channels is None else out_channels
        self.patches = nn.Linear(in_channels * patch**2, width)
        self.time1 = nn.Linear(width, width)
        self.time2 = nn.Linear(width, width)
        self.label = nn.Embedding(num_classes + 1, width)  # the last row: no class
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.out = nn.Linear(width, out_channels * patch**2)
        nn.init.zeros_(self.out.weight)  # begins by predicting nothing
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        time = self.time2(F.silu(self.time1(timestep_features(t, self.width))))  # (N, D)
        c = F.silu(time + self.label(y))  # (N, D)
        x = self.patches(F.pixel_unshuffle(x, self.patch).permute(0, 2, 3, 1))  # (N, H/p, W/p, D)
        for block in self.blocks:
            x = block(x, c)  # (N, H/p, W/p, D)
        x = self.out(self.norm(x)).permute(0, 3, 1, 2)  # (N, C p p, H/p, W/p)
        return F.pixel_shuffle(x, self.patch)  # (N, out_channels, H, W)
