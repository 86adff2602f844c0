"""A Vision Transformer in torch (Dosovitskiy et al., arXiv:2010.11929), for DINOv2 and CLIP's image tower.

Parameter names are those of facebookresearch/dinov2's files; `norm_pre` and `proj` are CLIP's. Weights: `vit_weights`;
shapes and sources: `vit_shapes`. The attention is torch's: xformers is not needed.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from evaluators.features.spec import Features, FeatureSpec
from evaluators.features.vit_shapes import SHAPES, VitShape
from evaluators.features.vit_weights import find_weights, read_state
from harness.errors import RunError, UserError
from harness.frameworks.torch_float32 import exact_float32

# facebookresearch/dinov2, vision_transformer.py, `interpolate_offset` of the models without registers: the position
# table is scaled slightly more than the grid, which shifts every position. The published features include this.
POSITION_OFFSET = 0.1


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        qkv = self.qkv(x).reshape(n, tokens, 3, self.heads, width // self.heads)  # (N, T, 3, H, D/H)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (N, H, T, D/H) each
        x = functional.scaled_dot_product_attention(q, k, v)  # (N, H, T, D/H)
        return self.proj(x.transpose(1, 2).reshape(n, tokens, width))  # (N, T, D)


class Mlp(nn.Module):
    """Two linear layers with a hidden width of four times the width."""

    def __init__(self, width: int, quick_gelu: bool):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.quick_gelu = quick_gelu

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)  # (N, T, 4D)
        h = h * torch.sigmoid(1.702 * h) if self.quick_gelu else functional.gelu(h)  # (N, T, 4D)
        return self.fc2(h)  # (N, T, D)


class LayerScale(nn.Module):
    """A learned factor for every channel."""

    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma  # (N, T, D)


class Block(nn.Module):
    """Attention and MLP, both with a layer norm before and a skip connection around them."""

    def __init__(self, shape: VitShape):
        super().__init__()
        self.norm1 = nn.LayerNorm(shape.width, eps=shape.eps)
        self.attn = Attention(shape.width, shape.heads)
        self.ls1 = LayerScale(shape.width) if shape.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(shape.width, eps=shape.eps)
        self.mlp = Mlp(shape.width, shape.quick_gelu)
        self.ls2 = LayerScale(shape.width) if shape.layer_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))  # (N, T, D)
        return x + self.ls2(self.mlp(self.norm2(x)))  # (N, T, D)


class PatchEmbed(nn.Module):
    """Linear embedding of the patches, which are numbered row by row."""

    def __init__(self, patch: int, width: int, bias: bool):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # (N, (S / p)^2, D)


class VisionTransformer(nn.Module):
    """From normalised images float32 (N, 3, S, S), S a multiple of the patch size, to features (N, dim)."""

    def __init__(self, shape: VitShape):
        super().__init__()
        self.patch, self.grid = shape.patch, shape.grid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, shape.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + shape.grid**2, shape.width))
        self.patch_embed = PatchEmbed(shape.patch, shape.width, bias=not shape.pre_norm)
        self.norm_pre = nn.LayerNorm(shape.width, eps=shape.eps) if shape.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(shape.width, eps=shape.eps)
        self.proj = nn.Linear(shape.width, shape.projection, bias=False) if shape.projection else None

    def positions(self, side: int) -> Tensor:
        """The position table for side x side patches, that of the class token first: (1, 1 + side^2, D)."""
        if side == self.grid:
            return self.pos_embed
        table = self.pos_embed[:, 1:].unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)  # (1, D, G, G)
        factor = (side + POSITION_OFFSET) / self.grid
        table = functional.interpolate(table, scale_factor=(factor, factor), mode="bicubic")  # (1, D, side, side)
        assert table.shape[2:] == (side, side), (table.shape, side)
        return torch.cat([self.pos_embed[:, :1], table.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        side = x.shape[-1] // self.patch
        x = self.patch_embed(x)  # (N, side^2, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # (N, 1 + side^2, D)
        x = self.norm_pre(x + self.positions(side))  # (N, 1 + side^2, D)
        for block in self.blocks:
            x = block(x)  # (N, 1 + side^2, D)
        x = self.norm(x[:, 0])  # (N, D)
        if self.proj is None:
            return x
        return functional.normalize(self.proj(x), dim=1, eps=0.0)  # (N, projection)


def _resize_by_pillow(images: np.ndarray, size: int) -> np.ndarray:
    """uint8 (N, H, W, C) -> uint8 (N, size, size, C): centre crop to a square, bicubic resize, rounded to 8 bits."""
    from PIL import Image

    height, width, channels = images.shape[1:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    out = np.empty((len(images), size, size, channels), np.uint8)
    for i, image in enumerate(images[:, top : top + side, left : left + side]):
        picture = Image.fromarray(image if channels == 3 else image[..., 0])
        out[i] = np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC)).reshape(size, size, channels)
    return out


def preprocess(images: np.ndarray, shape: VitShape, device: str | torch.device = "cpu") -> Tensor:
    """uint8 (N, H, W, C), C 1 or 3 -> float32 (N, 3, S, S), resized to S = shape.input_size and normalised.

    Grey is repeated over the three channels.
    """
    if shape.resize == "pillow":
        images = _resize_by_pillow(images, shape.input_size)
    # copied: torch warns of read-only maps
    x = torch.from_numpy(np.array(images)).to(device).permute(0, 3, 1, 2).float()
    if shape.resize == "float32":
        size = (shape.input_size, shape.input_size)
        x = functional.interpolate(x, size=size, mode="bicubic", antialias=True)  # (N, C, S, S)
    mean = torch.tensor(shape.mean, device=device).reshape(1, 3, 1, 1)
    std = torch.tensor(shape.std, device=device).reshape(1, 3, 1, 1)
    return (x / 255 - mean) / std  # (N, 3, S, S)


class VitFeatures:
    """The extractor; see `evaluators.features.FeatureExtractor` for the contract.

    weights: a file or folder, or the name of a repository on the Hugging Face hub; None: the file in torch.hub's cache.
    entry: of that file, where several fit.
    """

    def __init__(
        self,
        spec: FeatureSpec,
        shape: VitShape,
        weights: Path | None,
        device: str = "cpu",
        batch_size: int | None = None,
        entry: str | None = None,
    ):
        self.name, self.dim, self.shape = spec.name, spec.dim, shape
        self.device = torch.device(device)
        self.batch_size = batch_size or (8 if self.device.type == "cpu" else 64)
        with torch.device("meta"):  # so that the weights are in memory once, not twice
            net = VisionTransformer(shape)
        loaded = read_state(find_weights(spec.name, shape, weights), net.state_dict(), spec.name, entry)
        net.load_state_dict(loaded.state, strict=True, assign=True)
        self.net = net.eval().requires_grad_(False).to(self.device)
        # The description states the preprocessing, so it is part of the hash.
        self.sha256 = hashlib.sha256(f"{loaded.sha256}\n{spec.description}".encode()).hexdigest()
        self.description = f"{spec.description}; {loaded.found}"

    def __call__(self, images: np.ndarray) -> Features:
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
            raise UserError(f"features need uint8 images (N, H, W, 1 or 3), got {images.dtype} {images.shape}")
        pooled = np.empty((len(images), self.dim), np.float32)
        with torch.inference_mode(), exact_float32(self.device.type):
            for start in range(0, len(images), self.batch_size):
                rows = slice(start, start + self.batch_size)
                pooled[rows] = self.net(preprocess(images[rows], self.shape, self.device)).cpu().numpy()
        if not np.isfinite(pooled).all():
            raise RunError(f"features {self.name} are not finite: the weights or this device are broken")
        return Features(pooled=pooled)


def load(spec: FeatureSpec, device: str = "cpu", weights: Path | None = None, entry: str | None = None) -> VitFeatures:
    """The loader of the FeatureSpec."""
    return VitFeatures(spec, SHAPES[spec.name], weights, device, entry=entry)
