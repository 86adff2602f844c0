"""The BigGAN-deep generator in torch, with the parameter and buffer names and shapes of the public weights.

Source: arXiv:1809.11096, appendix B; names, constants and peculiarities after huggingface/pytorch-pretrained-BigGAN
1e18aed, model.py, whose `pytorch_model.bin` (converted from the authors' TF Hub modules) loads with strict=True. The
weights depend on that code's peculiarities, which are kept and marked "Peculiar" below.

Shapes: N images, C channels, H x W cells, L latent size, D = 2L condition (z and the class vector).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbones.biggan.layout import BOTTLENECK, IMAGE_CHANNELS, START, START_MULTIPLE, STATISTICS, Block, layout
from harness.errors import UserError

EPS = 1e-4  # of every batch normalisation


class Spectral(nn.Module):
    """A weight that is divided by its largest singular value, sigma = u^T W v, before it is used.

    The singular vectors u and v are stored with the weight and never updated, not even in training mode: the generator is
    not trained here, so the power iteration of torch.nn.utils.spectral_norm is not needed.
    """

    weight_u: Tensor
    weight_v: Tensor

    def __init__(self, *shape: int, bias: bool):
        super().__init__()
        self.bias = nn.Parameter(torch.empty(shape[0])) if bias else None
        self.weight_orig = nn.Parameter(torch.empty(shape))
        self.register_buffer("weight_u", torch.empty(shape[0]))
        self.register_buffer("weight_v", torch.empty(math.prod(shape[1:])))

    def weight(self) -> Tensor:
        """The weight divided by its largest singular value."""
        # Sums of products instead of torch.mv: this work is done once for all images, and the compute convention, which
        # is per image, counts torch.mv.
        projected = (self.weight_orig.flatten(1) * self.weight_v).sum(dim=1)  # (outputs,)
        return self.weight_orig / (projected * self.weight_u).sum()

    def initialise(self) -> None:
        """Draw an orthogonal weight, in place, and set u and v to a pair of its singular vectors; biases become 0."""
        nn.init.orthogonal_(self.weight_orig)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        # All singular values are 1 now. So any unit vector on the shorter side and its image under the matrix are a
        # pair of singular vectors.
        matrix = self.weight_orig.flatten(1)
        if matrix.shape[0] <= matrix.shape[1]:
            self.weight_u.copy_(F.normalize(torch.randn_like(self.weight_u), dim=0))
            self.weight_v.copy_(matrix.t() @ self.weight_u)
        else:
            self.weight_v.copy_(F.normalize(torch.randn_like(self.weight_v), dim=0))
            self.weight_u.copy_(matrix @ self.weight_v)


class SpectralLinear(Spectral):
    """A linear layer with a spectrally normalised weight."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool):
        super().__init__(outputs, inputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight(), self.bias)  # (N, outputs)


class SpectralConv2d(Spectral):
    """A convolution with a spectrally normalised weight that keeps the size of the feature map."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, bias: bool = True):
        super().__init__(outputs, inputs, kernel, kernel, bias=bias)
        self.padding = kernel // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight(), self.bias, padding=self.padding)  # (N, outputs, H, W)


class StandingNorm(nn.Module):
    """Batch normalisation with one row of standing statistics for each truncation 0, 0.02, ... 1."""

    running_means: Tensor
    running_vars: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("running_means", torch.zeros(STATISTICS, channels))
        self.register_buffer("running_vars", torch.ones(STATISTICS, channels))

    def statistics(self, truncation: float) -> tuple[Tensor, Tensor]:
        """Mean and variance (C,) for a truncation in (0, 1].

        Peculiar: between two rows the interpolation weights are swapped, so the nearer row has the smaller weight. At an
        exact row, such as truncation 1, this has no effect. But 0.58 / 0.02 is 28.999999999999996 in floating point,
        which gives row 28 instead of 29 (likewise 0.14, 0.28, 0.56 and 0.94: rows 8, 15, 29 and 46 instead of 7, 14, 28
        and 47).
        """
        fraction, whole = math.modf(truncation / (1 / (STATISTICS - 1)))
        row = int(whole)
        if fraction == 0:
            return self.running_means[row], self.running_vars[row]
        two_rows = slice(row, row + 2)  # the rows on either side of the truncation
        below, above = self.running_means[two_rows]
        mean = below * fraction + above * (1 - fraction)  # (C,)
        below, above = self.running_vars[two_rows]
        return mean, below * fraction + above * (1 - fraction)  # (C,)


class ConditionalNorm(StandingNorm):
    """Batch normalisation with standing statistics, and a gain and an offset that depend on the condition."""

    def __init__(self, channels: int, condition: int):
        super().__init__(channels)
        self.scale = SpectralLinear(condition, channels, bias=False)
        self.offset = SpectralLinear(condition, channels, bias=False)

    def forward(self, x: Tensor, condition: Tensor, truncation: float) -> Tensor:
        mean, variance = self.statistics(truncation)  # (C,) each
        n = x.shape[0]
        # Under autocast, the linear layers return a lower precision than that of the statistics.
        gain = (1 + self.scale(condition)).to(mean.dtype)  # (N, C)
        offset = self.offset(condition).to(mean.dtype)  # (N, C)
        # The channels of all images are put side by side, so that one call normalises all images.
        flat = x.reshape(1, -1, *x.shape[2:])  # (1, N*C, H, W)
        flat = F.batch_norm(flat, mean.repeat(n), variance.repeat(n), gain.flatten(), offset.flatten(), eps=EPS)
        return flat.view(x.shape)  # (N, C, H, W)


class PlainNorm(StandingNorm):
    """Batch normalisation with standing statistics, and one learned gain and offset."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, truncation: float) -> Tensor:
        mean, variance = self.statistics(truncation)  # (C,) each
        return F.batch_norm(x, mean, variance, self.weight, self.bias, eps=EPS)  # (N, C, H, W)


class SelfAttention(nn.Module):
    """Attention from every cell to the feature map pooled to half its size, added with the learned weight gamma."""

    def __init__(self, channels: int):
        super().__init__()
        self.snconv1x1_theta = SpectralConv2d(channels, channels // 8, 1, bias=False)
        self.snconv1x1_phi = SpectralConv2d(channels, channels // 8, 1, bias=False)
        self.snconv1x1_g = SpectralConv2d(channels, channels // 2, 1, bias=False)
        self.snconv1x1_o_conv = SpectralConv2d(channels // 2, channels, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        query = self.snconv1x1_theta(x).flatten(2)  # (N, C/8, H*W)
        key = F.max_pool2d(self.snconv1x1_phi(x), 2).flatten(2)  # (N, C/8, H*W/4)
        value = F.max_pool2d(self.snconv1x1_g(x), 2).flatten(2)  # (N, C/2, H*W/4)
        weights = (query.transpose(1, 2) @ key).softmax(dim=-1)  # (N, H*W, H*W/4); the scores are not scaled
        mixed = value @ weights.transpose(1, 2)  # (N, C/2, H*W)
        return x + self.gamma * self.snconv1x1_o_conv(mixed.unflatten(2, x.shape[2:]))  # (N, C, H, W)


class GeneratorBlock(nn.Module):
    """Residual bottleneck of four convolutions, each after a conditional normalisation and a ReLU."""

    def __init__(self, inputs: int, outputs: int, condition: int, up: bool):
        super().__init__()
        inner = inputs // BOTTLENECK
        self.up = up  # whether the block doubles the side
        self.outputs = outputs
        self.bn_0 = ConditionalNorm(inputs, condition)
        self.conv_0 = SpectralConv2d(inputs, inner, 1)
        self.bn_1 = ConditionalNorm(inner, condition)
        self.conv_1 = SpectralConv2d(inner, inner, 3)
        self.bn_2 = ConditionalNorm(inner, condition)
        self.conv_2 = SpectralConv2d(inner, inner, 3)
        self.bn_3 = ConditionalNorm(inner, condition)
        self.conv_3 = SpectralConv2d(inner, outputs, 1)

    def grow(self, x: Tensor) -> Tensor:
        """x (N, C, H, W) with the side doubled if the block is one that doubles it, else x itself."""
        return F.interpolate(x, scale_factor=2, mode="nearest") if self.up else x  # (N, C, H', W'), H' = 2H or H

    def forward(self, x: Tensor, condition: Tensor, truncation: float) -> Tensor:
        skip = self.grow(x[:, : self.outputs])  # (N, C_out, H', W'). Peculiar: channels are dropped, not projected
        x = self.conv_0(F.relu(self.bn_0(x, condition, truncation)))  # (N, C/4, H, W)
        x = self.conv_1(self.grow(F.relu(self.bn_1(x, condition, truncation))))  # (N, C/4, H', W')
        x = self.conv_2(F.relu(self.bn_2(x, condition, truncation)))  # (N, C/4, H', W')
        x = self.conv_3(F.relu(self.bn_3(x, condition, truncation)))  # (N, C_out, H', W')
        return x + skip  # (N, C_out, H', W')


class Generator(nn.Module):
    """From the condition (N, D) to images (N, 3, input_size, input_size)."""

    def __init__(self, width: int, condition: int, blocks: Sequence[Block], attention: int | None):
        super().__init__()
        self.gen_z = SpectralLinear(condition, START**2 * START_MULTIPLE * width, bias=True)
        layers: list[nn.Module] = []
        for number, (up, inputs, outputs) in enumerate(blocks):
            if number == attention:  # self-attention comes before this block
                layers.append(SelfAttention(inputs * width))
            layers.append(GeneratorBlock(inputs * width, outputs * width, condition, up))
        self.layers = nn.ModuleList(layers)
        self.bn = PlainNorm(width)
        self.conv_to_rgb = SpectralConv2d(width, width, 3)

    def forward(self, condition: Tensor, truncation: float) -> Tensor:
        x = self.gen_z(condition)  # (N, 4*4*16*width)
        # Peculiar: gen_z gives the features channels last, as in the TensorFlow network.
        x = x.unflatten(1, (START, START, -1)).permute(0, 3, 1, 2).contiguous()  # (N, 16*width, 4, 4)
        for layer in self.layers:
            x = layer(x) if isinstance(layer, SelfAttention) else layer(x, condition, truncation)  # (N, C, H, W)
        x = self.conv_to_rgb(F.relu(self.bn(x, truncation)))  # (N, width, input_size, input_size)
        return torch.tanh(x[:, :IMAGE_CHANNELS])  # (N, 3, ...). Peculiar: the other channels are dropped


class ClassVectors(nn.Module):
    """One vector per class, stored as the (L, classes) matrix of a linear layer on one-hot labels."""

    def __init__(self, num_classes: int, latent_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(latent_size, num_classes))

    def forward(self, y: Tensor) -> Tensor:
        return F.embedding(y, self.weight.t())  # (N, L)


class BigGAN(nn.Module):
    """BigGAN-deep generator.

    `forward` takes z (N, latent_size), y (N,) int64 labels 0..num_classes - 1 (the public code takes one-hot vectors)
    and the truncation in (0, 1]; it returns images (N, 3, input_size, input_size) in -1..1. The truncation only selects
    the standing statistics: the caller draws z as truncation times a standard normal that is truncated to -2..2, also at
    truncation 1. Training and evaluation mode give the same images, and an image does not depend on its batch.
    """

    def __init__(
        self,
        *,
        input_size: int,  # side of the generated image in pixels
        num_classes: int,
        width: int,  # ch of the paper's tables
        latent_size: int,
        blocks: Sequence[Sequence[int]] | None,  # (up, inputs, outputs) of each; None: those of layout.BLOCKS
        attention: int | None,  # index of the block that follows self-attention; None: no self-attention
    ):
        super().__init__()
        block_layout = layout(
            input_size=input_size,
            num_classes=num_classes,
            width=width,
            latent_size=latent_size,
            blocks=blocks,
            attention=attention,
        )
        self.latent_size = latent_size
        self.embeddings = ClassVectors(num_classes, latent_size)
        self.generator = Generator(width, condition=2 * latent_size, blocks=block_layout, attention=attention)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw all weights, in place, from torch's global generator: orthogonal matrices, as in the paper (Sec. 3)."""
        if self.embeddings.weight.is_meta:  # no storage, nothing to draw
            return
        nn.init.orthogonal_(self.embeddings.weight)
        for module in self.modules():
            if isinstance(module, Spectral):
                module.initialise()

    def forward(self, z: Tensor, y: Tensor, truncation: float = 1.0) -> Tensor:
        if z.dim() != 2 or z.shape[1] != self.latent_size:
            raise UserError(f"BigGAN-deep: z of shape {tuple(z.shape)}, but this network takes (N, {self.latent_size})")
        if y.shape != z.shape[:1] or y.is_floating_point():
            raise UserError(
                f"BigGAN-deep: labels of shape {tuple(y.shape)} and {y.dtype}; give one whole number for each of the"
                f" {len(z)} rows of z, not one-hot vectors"
            )
        if not isinstance(truncation, Real) or not 0 < truncation <= 1:
            raise UserError(f"BigGAN-deep: truncation {truncation!r} is not a single number above 0 and at most 1")
        condition = torch.cat([z, self.embeddings(y)], dim=1)  # (N, 2L)
        return self.generator(condition, truncation)  # (N, 3, input_size, input_size)
