"""The U-Net of ADM and LDM in torch, with the parameter names and shapes of the public checkpoints.

Source: Dhariwal and Nichol, "Diffusion Models Beat GANs" (arXiv:2105.05233), sec. 3 and appendix; Rombach et al.
(arXiv:2112.10752), appendix E; names and constants after openai/guided-diffusion 22e0df8, guided_diffusion/unet.py,
and CompVis/latent-diffusion a506df5, ldm/modules/diffusionmodules/openaimodel.py and ldm/modules/attention.py.

Shapes: N images, C channels, S side of a feature map, T = S * S positions, H heads, E width of the embedding, K context
tokens. Every part of a block is called as part(x, emb, context).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from backbones.torch_layers import attend, full_precision, timestep_features
from backbones.unet import layout as plan
from harness.errors import UserError

NORM_EPS = 1e-5
TRANSFORMER_NORM_EPS = 1e-6  # of the group norm before a spatial transformer


def group_norm(channels: int, eps: float = NORM_EPS) -> nn.GroupNorm:
    """The group norm of every block."""
    return nn.GroupNorm(plan.GROUPS, channels, eps=eps)


class InputConv(nn.Conv2d):
    """3x3 convolution of the network's input; takes emb and context as every part of a block does, and ignores them."""

    def forward(self, x: Tensor, emb: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        return super().forward(x)  # (N, C_out, S, S)


class ResBlock(nn.Module):
    """Residual block of two convolutions, conditioned on the timestep embedding; it may halve or double the side S to S'."""

    def __init__(self, part: plan.ResBlock, embedding: int, *, scale_shift: bool, dropout: float):
        super().__init__()
        inputs, outputs = part.inputs, part.outputs
        self.resample, self.scale_shift = part.resample, scale_shift
        self.in_layers = nn.Sequential(group_norm(inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, (2 if scale_shift else 1) * outputs))
        self.out_layers = nn.Sequential(
            group_norm(outputs), nn.SiLU(), nn.Dropout(dropout), nn.Conv2d(outputs, outputs, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def change_side(self, x: Tensor) -> Tensor:
        """x (N, C, S, S), average-pooled or upsampled by 2, or x itself, as `resample` says."""
        if self.resample == "down":
            return F.avg_pool2d(x, 2)  # (N, C, S/2, S/2)
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2, mode="nearest")  # (N, C, 2S, 2S)
        return x

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        norm, activation, conv = self.in_layers
        h = conv(self.change_side(activation(norm(x))))  # (N, C_out, S', S')
        emb = self.emb_layers(emb)[:, :, None, None]  # (N, C_out or 2 C_out, 1, 1)
        norm, *activation_dropout_conv = self.out_layers
        if self.scale_shift:  # ADM; LDM adds the embedding
            scale, shift = emb.chunk(2, dim=1)  # (N, C_out, 1, 1) each
            # Under autocast, the norm is float32, and scale and shift are not.
            h = torch.addcmul(shift, norm(h).to(scale.dtype), 1 + scale)  # (N, C_out, S', S')
        else:
            h = norm(h + emb)  # (N, C_out, S', S')
        for layer in activation_dropout_conv:
            h = layer(h)  # (N, C_out, S', S')
        return self.skip_connection(self.change_side(x)) + h  # (N, C_out, S', S')


def split_heads(qkv: Tensor, heads: int, *, qkv_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(N, 3 C, T) -> q, k, v (N, H, T, C/H). Order of the channels: (3, H, C/H) if `qkv_first`, else (H, 3, C/H)."""
    n, channels, tokens = qkv.shape
    if qkv_first:
        q, k, v = qkv.view(n, 3, heads, channels // (3 * heads), tokens).unbind(1)  # (N, H, C/H, T) each
    else:
        q, k, v = qkv.view(n, heads, 3, channels // (3 * heads), tokens).unbind(2)  # (N, H, C/H, T) each
    return q.transpose(2, 3), k.transpose(2, 3), v.transpose(2, 3)  # (N, H, T, C/H) each


class AttentionBlock(nn.Module):
    """ADM's self-attention over all positions, with a skip connection."""

    def __init__(self, part: plan.Attention, *, qkv_first: bool):
        super().__init__()
        self.heads, self.qkv_first = part.heads, qkv_first
        self.norm = group_norm(part.channels)
        self.qkv = nn.Conv1d(part.channels, 3 * part.channels, 1)
        self.proj_out = nn.Conv1d(part.channels, part.channels, 1)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        tokens = x.flatten(2)  # (N, C, T)
        q, k, v = split_heads(self.qkv(self.norm(tokens)), self.heads, qkv_first=self.qkv_first)  # (N, H, T, C/H)
        h = attend(q, k, v).transpose(2, 3).flatten(1, 2)  # (N, C, T)
        return (tokens + self.proj_out(h)).view(x.shape)  # (N, C, S, S)


class CrossAttention(nn.Module):
    """Multi-head attention from (N, T, C) to a context (N, K, context width), or self-attention without a context."""

    def __init__(self, width: int, context_width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (
            projection.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.to_q(x), self.to_k(context), self.to_v(context))
        )  # (N, H, T or K, C/H)
        return self.to_out(attend(q, k, v).transpose(1, 2).flatten(2))  # (N, T, C)


class GatedGelu(nn.Module):
    """Linear layer to twice the output width; its first half times the exact GELU of the second (Shazeer 2020)."""

    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * outputs)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)  # (N, T, C_out) each
        return x * F.gelu(gate)  # (N, T, C_out)


class FeedForward(nn.Module):
    """Two layers with a hidden width of four times the width."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.net = nn.Sequential(GatedGelu(width, 4 * width), nn.Dropout(dropout), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # (N, T, C)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the context, feed-forward."""

    def __init__(self, width: int, context_width: int, heads: int, dropout: float):
        super().__init__()
        self.attn1 = CrossAttention(width, width, heads)
        self.ff = FeedForward(width, dropout)
        self.attn2 = CrossAttention(width, context_width, heads)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))  # (N, T, C)
        x = x + self.attn2(self.norm2(x), context)  # (N, T, C)
        return x + self.ff(self.norm3(x))  # (N, T, C)


class SpatialTransformer(nn.Module):
    """LDM's transformer over the positions of a feature map, with a skip connection."""

    def __init__(self, part: plan.Attention, context_width: int, depth: int, dropout: float):
        super().__init__()
        width = part.channels
        self.norm = group_norm(width, TRANSFORMER_NORM_EPS)
        self.proj_in = nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList(
            [TransformerBlock(width, context_width, part.heads, dropout) for _ in range(depth)]
        )
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)  # (N, T, C)
        for block in self.transformer_blocks:
            h = block(h, context)  # (N, T, C)
        return x + self.proj_out(h.transpose(1, 2).unflatten(2, x.shape[2:]))  # (N, C, S, S)


class Downsample(nn.Module):
    """Halves the side by a 3x3 convolution of stride 2."""

    def __init__(self, part: plan.Downsample):
        super().__init__()
        self.op = nn.Conv2d(part.channels, part.channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        return self.op(x)  # (N, C, S/2, S/2)


class Upsample(nn.Module):
    """Doubles the side by nearest-neighbour interpolation, then a 3x3 convolution."""

    def __init__(self, part: plan.Upsample):
        super().__init__()
        self.conv = nn.Conv2d(part.channels, part.channels, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))  # (N, C, 2S, 2S)


def _zero(layer: nn.Module) -> None:
    """Set all parameters of a layer to 0, in place."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


class Encoder(nn.Module):
    """The downsampling half of a U-Net and its middle block: the trunk of classifiers, and the first half of U-Nets.

    scale_shift: residual blocks scale and shift by the embedding instead of adding it. context: (width of the context,
    transformer depth) of spatial transformers; None: ADM's attention blocks, whose channels are in the order `qkv_first`
    (see `split_heads`). labels: number of classes of the table `label_emb`, which subclasses add to the timestep
    embedding; 0: no table. gradient_checkpointing: store only the input of each block for the backward pass and recompute
    the rest.
    """

    def __init__(
        self,
        layout: plan.Layout,
        *,
        scale_shift: bool,
        dropout: float,
        qkv_first: bool = False,
        context: tuple[int, int] | None = None,
        labels: int = 0,
        gradient_checkpointing: bool = False,
    ):
        super().__init__()
        self.layout, self.gradient_checkpointing, self.has_dropout = layout, gradient_checkpointing, dropout > 0

        def build(block: tuple[plan.Part, ...]) -> nn.ModuleList:
            """The modules of the parts of one block."""
            parts: list[nn.Module] = []
            for part in block:
                if isinstance(part, plan.InputConv):
                    parts.append(InputConv(part.inputs, part.outputs, 3, padding=1))
                elif isinstance(part, plan.ResBlock):
                    parts.append(ResBlock(part, layout.embedding, scale_shift=scale_shift, dropout=dropout))
                elif isinstance(part, plan.Downsample):
                    parts.append(Downsample(part))
                elif isinstance(part, plan.Upsample):
                    parts.append(Upsample(part))
                elif context is None:
                    parts.append(AttentionBlock(part, qkv_first=qkv_first))
                else:
                    parts.append(SpatialTransformer(part, *context, dropout))
            return nn.ModuleList(parts)

        self.time_embed = nn.Sequential(
            nn.Linear(layout.width, layout.embedding), nn.SiLU(), nn.Linear(layout.embedding, layout.embedding)
        )
        if labels:  # created here, as in the release: default initialisation draws random numbers in this order
            self.label_emb = nn.Embedding(labels, layout.embedding)
        self.input_blocks = nn.ModuleList([build(block) for block in layout.input_blocks])
        self.middle_block = build(layout.middle_block)
        if layout.output_blocks:  # empty for classifiers
            self.output_blocks = nn.ModuleList([build(block) for block in layout.output_blocks])

    def embed(self, t: Tensor) -> Tensor:
        """Embedding (N, E) of timesteps (N,) in the dtype of the weights, even under autocast."""
        first = self.time_embed[0]
        assert isinstance(first, nn.Linear)
        with full_precision(t.device.type):
            features = timestep_features(t, self.layout.width)  # (N, width) float32
            return self.time_embed(features.to(first.weight.dtype))

    def run_block(self, block: nn.Module, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        """The output of one block, a ModuleList of parts that are applied one after another."""
        assert isinstance(block, nn.ModuleList)

        def parts(x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
            for part in block:
                x = part(x, emb, context)
            return x

        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(parts, x, emb, context, use_reentrant=False, preserve_rng_state=self.has_dropout)
        return parts(x, emb, context)

    def encode(self, x: Tensor, emb: Tensor, context: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """The feature map after the middle block, and the outputs of all input blocks, for the skip connections."""
        skips = []
        for block in self.input_blocks:
            x = self.run_block(block, x, emb, context)  # (N, C, S, S)
            skips.append(x)
        return self.run_block(self.middle_block, x, emb, context), skips  # (N, C, S_min, S_min)

    @torch.no_grad()
    def initialise(self) -> None:
        """Set the last layer of every residual branch to 0, in place: each block then starts as its skip connection."""
        for module in self.modules():
            if isinstance(module, ResBlock):
                _zero(module.out_layers[-1])
            elif isinstance(module, (AttentionBlock, SpatialTransformer)):
                _zero(module.proj_out)


class UNetBase(Encoder):
    """A whole U-Net without `forward`, because ADM and LDM condition it on the class in different ways."""

    def __init__(self, layout: plan.Layout, out_channels: int, **settings: Any):
        super().__init__(layout, **settings)
        self.out = nn.Sequential(
            group_norm(layout.channels), nn.SiLU(), nn.Conv2d(layout.channels, out_channels, 3, padding=1)
        )
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """As for the encoder; the output layer is also 0, so the network's output is exactly 0."""
        super().initialise()
        _zero(self.out[2])

    def run_unet(self, x: Tensor, emb: Tensor, context: Tensor | None = None) -> Tensor:
        """The output for x (N, C, S, S), an embedding (N, E) and a context (N, K, context width)."""
        x, skips = self.encode(x, emb, context)  # (N, C, S_min, S_min)
        for block in self.output_blocks:
            x = self.run_block(block, torch.cat([x, skips.pop().to(x.dtype)], dim=1), emb, context)  # (N, C, S, S)
        return self.out(x)  # (N, C_out, S, S)


class UNet(UNetBase):
    """A whole U-Net that is called with its embedding and context."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None = None) -> Tensor:
        return self.run_unet(x, emb, context)  # (N, C_out, S, S)


def check_input(family: str, x: Tensor, shape: tuple[int, int, int]) -> None:
    """Raise UserError unless x is (N, *shape), the input that the network was built for."""
    if x.shape[1:] != shape:
        raise UserError(
            f"{family}: input of shape {tuple(x.shape)}, but this network takes (N, {', '.join(map(str, shape))}); "
            "build it with the input_size and in_channels of the data"
        )
