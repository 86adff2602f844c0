"""The network in torch."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbones.torch_layers import attend, timestep_features
from harness.errors import UserError

EPS = 1e-6  # of the norms
BASE = 10_000.0  # of the rotary frequencies


def rotary_angles(side: int, features: int) -> Tensor:
    """Angles float32 (side * side, features / 2): the first half of them by row, the second by column."""
    quarter = features // 4
    frequency = BASE ** (-torch.arange(quarter, dtype=torch.float32) / quarter)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.cat([place.reshape(-1, 1) * frequency for place in (rows, columns)], dim=1)


def rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """x (N, heads, T, features) with its pairs of features, one from each half, turned by the angles (T, features / 2)."""
    a, b = x.chunk(2, dim=3)
    return torch.cat([a * cosine - b * sine, a * sine + b * cosine], dim=3)


class Block(nn.Module):
    """Attention with rotary positions and SwiGLU, each behind an RMSNorm that time and label scale and shift."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        hidden = int(width * 8 / 3)
        self.norm1 = nn.RMSNorm(width, eps=EPS, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.norm_q = nn.RMSNorm(width // heads, eps=EPS)
        self.norm_k = nn.RMSNorm(width // heads, eps=EPS)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.RMSNorm(width, eps=EPS, elementwise_affine=False)
        self.into = nn.Linear(width, 2 * hidden)
        self.back = nn.Linear(hidden, width)
        self.condition = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.condition.weight)  # adaLN-Zero: the block begins as the identity
        nn.init.zeros_(self.condition.bias)

    def forward(self, x: Tensor, c: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.condition(c)[:, None].chunk(6, dim=2)  # (N, 1, D) each
        h = self.norm1(x) * (1 + scale1) + shift1  # (N, T, D)
        q, k, v = self.qkv(h).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (N, H, T, D/H) each
        q, k = rotated(self.norm_q(q), cosine, sine), rotated(self.norm_k(k), cosine, sine)
        x = x + gate1 * self.proj(attend(q, k, v.to(q.dtype)).transpose(1, 2).flatten(2))  # (N, T, D)
        a, b = self.into(self.norm2(x) * (1 + scale2) + shift2).chunk(2, dim=2)  # (N, T, hidden) each
        return x + gate2 * self.back(F.silu(a) * b)  # (N, T, D)


class PixelTransformer(nn.Module):
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
        bottleneck: int,
        patch: int,
    ):
        super().__init__()
        if input_size % patch:
            raise UserError(f"jit: input_size {input_size} is not divisible by patch {patch}; crop or pad the images")
        if width % (4 * heads):
            raise UserError(
                f"jit: width {width} must be a multiple of 4 x {heads} heads, for positions in two directions"
            )
        self.patch, self.width = patch, width
        out_channels = 2 * in_channels if out_channels is None else out_channels
        self.squeeze = nn.Linear(in_channels * patch**2, bottleneck, bias=False)
        self.expand = nn.Linear(bottleneck, width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(num_classes + 1, width)  # the last row: no class
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=EPS)
        self.out = nn.Linear(width, out_channels * patch**2)
        nn.init.zeros_(self.out.weight)  # begins by predicting nothing
        nn.init.zeros_(self.out.bias)
        angles = rotary_angles(input_size // patch, width // heads)
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        side = x.shape[2] // self.patch
        c = F.silu(self.time(timestep_features(t, self.width)) + self.label(y))  # (N, D)
        x = F.pixel_unshuffle(x, self.patch).flatten(2).transpose(1, 2)  # (N, T, C p p)
        x = self.expand(self.squeeze(x))  # (N, T, D)
        for block in self.blocks:
            x = block(x, c, self.cosine, self.sine)  # (N, T, D)
        x = self.out(self.norm(x)).transpose(1, 2).unflatten(2, (side, side))  # (N, C p p, H/p, W/p)
        return F.pixel_shuffle(x, self.patch)  # (N, out_channels, H, W)
