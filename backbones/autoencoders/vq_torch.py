"""The VQ autoencoders of latent diffusion in torch, with the parameter names and shapes of the public checkpoints.

Source: arXiv:2112.10752, appendix G; names and constants after CompVis/latent-diffusion a506df5,
ldm/modules/diffusionmodules/model.py and ldm/models/autoencoder.py. Keys are those of a public model.ckpt after
`first_stage_model.`: encoder.*, decoder.*, quantize.embedding.weight, quant_conv.*, post_quant_conv.*. Separate releases
of the first stages also hold `loss.*` (perceptual network and discriminator), which is for training and not used here.

Shapes: N images, C channels and H x W cells of a level, h x w cells of a latent, K codes, Z latent channels, E code
channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbones.autoencoders.layout import GROUPS, check_arguments, factor
from harness.errors import UserError

EPS = 1e-6  # of every group norm
CELLS = 1024  # latent cells whose distances to all codes are computed at a time


def norm(channels: int) -> nn.GroupNorm:
    """The group norm of every layer."""
    return nn.GroupNorm(GROUPS, channels, eps=EPS)


class Residual(nn.Module):
    """Two 3x3 convolutions, each after a group norm and a SiLU, with a skip connection."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm1 = norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # (N, C_out, H, W)
        h = self.conv2(F.silu(self.norm2(h)))  # (N, C_out, H, W)
        skip = x if self.nin_shortcut is None else self.nin_shortcut(x)  # (N, C_out, H, W)
        return skip + h


class Attention(nn.Module):
    """Self-attention over all cells with one head of C features, with a skip connection."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)  # (N, C, H, W)
        q, k, v = (
            layer(h).flatten(2).transpose(1, 2).unsqueeze(1) for layer in (self.q, self.k, self.v)
        )  # (N, 1, HW, C)
        h = F.scaled_dot_product_attention(q, k, v)  # (N, 1, HW, C)
        h = h.squeeze(1).transpose(1, 2).reshape(x.shape)  # (N, C, H, W)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    """Halves the side by a 3x3 convolution of stride 2, padded only at the right and at the bottom."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # (N, C, H / 2, W / 2)


class Upsample(nn.Module):
    """Doubles the side by nearest-neighbour interpolation, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # (N, C, 2 H, 2 W)


class Level(nn.Module):
    """Residual blocks, each followed by attention if `attended`, and then a downsampling or upsampling layer or neither.

    Encoder and Decoder set `downsample` or `upsample` of the levels that have one.
    """

    def __init__(self, inputs: int, outputs: int, blocks: int, attended: bool):
        super().__init__()
        self.block = nn.ModuleList(Residual(inputs if i == 0 else outputs, outputs) for i in range(blocks))
        self.attn = nn.ModuleList(Attention(outputs) for _ in range(blocks if attended else 0))
        self.downsample: Downsample | None = None
        self.upsample: Upsample | None = None

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x = block(x)  # (N, C_out, H, W)
            if self.attn:
                x = self.attn[index](x)  # (N, C_out, H, W)
        if self.downsample is not None:
            return self.downsample(x)  # (N, C_out, H / 2, W / 2)
        if self.upsample is not None:
            return self.upsample(x)  # (N, C_out, 2 H, 2 W)
        return x


class Middle(nn.Module):
    """Residual block, attention, residual block, at the side of the latent."""

    def __init__(self, channels: int):
        super().__init__()
        self.block_1 = Residual(channels, channels)
        self.attn_1 = Attention(channels)
        self.block_2 = Residual(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))  # (N, C, H, W)


class Encoder(nn.Module):
    """From images (N, image channels, H, W) to (N, Z, h, w)."""

    def __init__(self, image_channels: int, widths: list[int], blocks: int, attended: list[bool], out_channels: int):
        super().__init__()
        self.conv_in = nn.Conv2d(image_channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        for index, width in enumerate(widths):
            inputs = widths[max(index - 1, 0)]  # of the level before; of conv_in at level 0
            level = Level(inputs, width, blocks, attended[index])
            if index != len(widths) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Middle(widths[-1])
        self.norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)  # (N, C, H, W)
        for level in self.down:
            x = level(x)  # (N, C, H / 2, W / 2); the last level keeps H and W
        x = self.mid(x)  # (N, C, h, w)
        return self.conv_out(F.silu(self.norm_out(x)))  # (N, Z, h, w)


class Decoder(nn.Module):
    """From (N, Z, h, w) to images (N, image channels, H, W).

    `up` is numbered as the encoder's levels, so its levels are executed in reverse order. Each level has one residual
    block more than the encoder's.
    """

    def __init__(self, image_channels: int, widths: list[int], blocks: int, attended: list[bool], in_channels: int):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList()
        for index, width in enumerate(widths):
            # From the next level, which runs before this one; at the last level from `mid`, which has the same width.
            inputs = widths[min(index + 1, len(widths) - 1)]
            level = Level(inputs, width, blocks + 1, attended[index])
            if index:
                level.upsample = Upsample(width)
            self.up.append(level)
        self.norm_out = norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], image_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))  # (N, C, h, w)
        for level in reversed(self.up):
            x = level(x)  # (N, C, 2 H, 2 W); up[0], which runs last, keeps H and W
        return self.conv_out(F.silu(self.norm_out(x)))  # (N, image channels, H, W)


class CodeBook(nn.Module):
    """K vectors of E features. `forward` replaces every cell of z (N, E, h, w) by its nearest vector."""

    def __init__(self, codes: int, channels: int):
        super().__init__()
        self.embedding = nn.Embedding(codes, channels)
        nn.init.uniform_(self.embedding.weight, -1 / codes, 1 / codes)

    def indices(self, z: Tensor) -> Tensor:
        """Index of the nearest code for every cell: z (N, E, h, w) -> int64 (N, h, w).

        Computed in float64 (on MPS in float32), so that the result depends neither on rounding nor on the other images
        of the batch.
        """
        dtype = torch.float32 if z.device.type == "mps" else torch.float64  # MPS has no float64
        codes = self.embedding.weight.to(dtype)  # (K, E)
        half_norms = codes.square().sum(dim=1) / 2  # (K,)
        cells = z.permute(0, 2, 3, 1).flatten(0, 2).to(dtype)  # (N h w, E)
        # Minimises |z - e|^2 / 2 = |e|^2 / 2 - z e + |z|^2 / 2 without the last term, which is the same for every code.
        nearest = [torch.addmm(half_norms, part, codes.T, alpha=-1).min(dim=1).indices for part in cells.split(CELLS)]
        return torch.cat(nearest).view(len(z), *z.shape[2:])  # (N, h, w)

    def forward(self, z: Tensor) -> Tensor:
        return self.embedding(self.indices(z)).permute(0, 3, 1, 2)  # (N, E, h, w)


class VQAutoencoder(nn.Module):
    """Encoder, codebook and decoder; the arguments are those of `AutoencoderSpec`.

    Images are float32 (N, image_channels, H, W) in [-1, 1]; latents are float32 (N, code_channels, H / factor, W / factor).
    """

    def __init__(
        self,
        *,
        resolution: int,
        image_channels: int,
        width: int,
        multipliers: tuple[int, ...],
        blocks: int,
        attention_resolutions: tuple[int, ...],
        latent_channels: int,
        code_channels: int,
        codes: int,
    ):
        check_arguments(
            resolution=resolution,
            image_channels=image_channels,
            width=width,
            multipliers=multipliers,
            blocks=blocks,
            attention_resolutions=attention_resolutions,
            latent_channels=latent_channels,
            code_channels=code_channels,
            codes=codes,
        )
        if codes is None:  # the arguments of a KL autoencoder
            raise UserError("autoencoder: codes is None, but a VQ autoencoder has a codebook; give a number of codes")
        super().__init__()
        self.factor = factor(multipliers)
        self.image_channels = image_channels
        self.code_channels = code_channels
        widths = [width * multiplier for multiplier in multipliers]
        attended = [(resolution >> level) in attention_resolutions for level in range(len(multipliers))]
        self.encoder = Encoder(image_channels, widths, blocks, attended, latent_channels)
        self.decoder = Decoder(image_channels, widths, blocks, attended, latent_channels)
        self.quantize = CodeBook(codes, code_channels)
        self.quant_conv = nn.Conv2d(latent_channels, code_channels, 1)
        self.post_quant_conv = nn.Conv2d(code_channels, latent_channels, 1)

    def encode(self, x: Tensor) -> Tensor:
        """The latent before quantisation, which LDM's diffusion works on (VQModelInterface). UserError for other shapes."""
        if x.dim() != 4 or x.shape[1] != self.image_channels or any(side % self.factor for side in x.shape[2:]):
            raise UserError(
                f"autoencoder: images of shape {tuple(x.shape)}, but it takes (N, {self.image_channels}, H, W) with"
                f" sides that are multiples of {self.factor}; crop or pad them"
            )
        return self.quant_conv(self.encoder(x))  # (N, E, H / factor, W / factor)

    def decode(self, z: Tensor) -> Tensor:
        """The image of a latent; every cell is first replaced by its nearest code. UserError for other shapes."""
        if z.dim() != 4 or z.shape[1] != self.code_channels:
            raise UserError(
                f"autoencoder: latents of shape {tuple(z.shape)}, but it takes (N, {self.code_channels}, h, w)"
            )
        return self.decoder(self.post_quant_conv(self.quantize(z)))  # (N, image channels, factor h, factor w)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))  # (N, image channels, H, W): the reconstruction
