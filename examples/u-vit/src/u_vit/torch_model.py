"""The network in torch."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbones.torch_layers import attend, timestep_features
from harness.errors import UserError


class Block(nn.Module):
    """A transformer block; with `skip` it takes the output of an earlier block, too."""

    def __init__(self, width: int, heads: int, skip: bool):
        super().__init__()
        self.heads = heads
        self.join = nn.Linear(2 * width, width) if skip else None
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.into = nn.Linear(width, 4 * width)
        self.back = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, earlier: Tensor | None = None) -> Tensor:
        if self.join is not None and earlier is not None:
            x = self.join(torch.cat([x, earlier], dim=2))  # (N, T, D)
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (N, H, T, D/H)
        x = x + self.proj(attend(q, k, v).transpose(1, 2).flatten(2))  # (N, T, D)
        return x + self.back(F.gelu(self.into(self.norm2(x))))  # (N, T, D)


class UViT(nn.Module):
    """Denoiser. The arguments are those of the spec's `defaults`."""

    def __init__(
        self,
        *,
        input_size: int,
        in_channels: int,
        num_classes: int,
        out_channels: int | None,
        depth: int,
        width: int,
        heads: int,
        patch: int,
    ):
        super().__init__()
        if input_size % patch:
            raise UserError(f"u-vit: input_size {input_size} is not divisible by patch {patch}; crop or pad the images")
        if width % heads or depth % 2 == 0:
            raise UserError(f"u-vit: depth {depth} must be odd, and width {width} divisible by {heads} heads")
        self.patch, self.width = patch, width
        out_channels = 2 * in_channels if out_channels is None else out_channels
        self.patches = nn.Linear(in_channels * patch**2, width)
        self.time = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
        self.label = nn.Embedding(num_classes + 1, width)  # the last row: no class
        self.position = nn.Parameter(0.02 * torch.randn(1, 2 + (input_size // patch) ** 2, width))
        self.first = nn.ModuleList(Block(width, heads, skip=False) for _ in range(depth // 2))
        self.middle = Block(width, heads, skip=False)
        self.second = nn.ModuleList(Block(width, heads, skip=True) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, out_channels * patch**2)
        self.smooth = nn.Conv2d(out_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        side = x.shape[2] // self.patch
        time = self.time(timestep_features(t, self.width))  # (N, D)
        x = self.patches(F.pixel_unshuffle(x, self.patch).flatten(2).transpose(1, 2))  # (N, H/p W/p, D)
        x = torch.cat([time[:, None], self.label(y)[:, None], x], dim=1) + self.position  # (N, T, D), T = 2 + H/p W/p
        earlier = []
        for block in self.first:
            x = block(x)  # (N, T, D)
            earlier.append(x)
        x = self.middle(x)  # (N, T, D)
        for block in self.second:
            x = block(x, earlier.pop())  # (N, T, D)
        x = self.out(self.norm(x))[:, 2:].transpose(1, 2).unflatten(2, (side, side))  # (N, C p p, H/p, W/p)
        return self.smooth(F.pixel_shuffle(x, self.patch))  # (N, out_channels, H, W)
