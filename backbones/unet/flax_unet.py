"""The U-Net of ADM and LDM in Flax: the classes of `torch_unet.py` in the same order, with the same attribute names.

Source: as there. `backbones.flax_weights` maps parameters to and from the public checkpoints' names and shapes.

Shapes: N images, C channels, S side of a feature map, T = S * S positions, H heads, E width of the embedding, K context
tokens. Every part of a block is called as part(x, emb, context, rngs); dropout is on if `rngs` has a stream "dropout",
and off if it is None.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from backbones.flax_layers import (
    Conv,
    GroupNorm,
    LayerNorm,
    Linear,
    Sequence,
    attend,
    average_pool,
    checkpointed,
    timestep_features,
    upsample_nearest,
    zeros,
)
from backbones.unet import layout as plan
from harness.errors import UserError

NORM_EPS = 1e-5
TRANSFORMER_NORM_EPS = 1e-6  # of the group norm before a spatial transformer


def zero_conv(inputs: int, outputs: int, kernel: int, *, padding: int = 0, axes: int = 2, rngs: nnx.Rngs) -> Conv:
    """A convolution with initial weights and biases 0, as the last layer of every residual branch."""
    return Conv(inputs, outputs, kernel, padding=padding, axes=axes, kernel_init=zeros, bias_init=zeros, rngs=rngs)


def group_norm(channels: int, rngs: nnx.Rngs, eps: float = NORM_EPS) -> GroupNorm:
    """The group norm of every block."""
    return GroupNorm(channels, plan.GROUPS, eps=eps, rngs=rngs)


class InputConv(Conv):
    """3x3 convolution of the network's input; takes emb and context as every part of a block does, and ignores them."""

    def __call__(
        self, x: Array, emb: Array | None = None, context: Array | None = None, rngs: nnx.Rngs | None = None
    ) -> Array:
        return super().__call__(x)  # (N, S, S, C_out)


class ResBlock(nnx.Module):
    """Residual block of two convolutions, conditioned on the timestep embedding; it may halve or double the side S to S'."""

    def __init__(self, part: plan.ResBlock, embedding: int, *, scale_shift: bool, dropout: float, rngs: nnx.Rngs):
        inputs, outputs = part.inputs, part.outputs
        self.resample, self.scale_shift = part.resample, scale_shift
        self.in_layers = nnx.List(
            [group_norm(inputs, rngs), jax.nn.silu, Conv(inputs, outputs, 3, padding=1, rngs=rngs)]
        )
        self.emb_layers = Sequence([jax.nn.silu, Linear(embedding, (2 if scale_shift else 1) * outputs, rngs=rngs)])
        self.out_layers = nnx.List(
            [
                group_norm(outputs, rngs),
                jax.nn.silu,
                nnx.Dropout(dropout),
                zero_conv(outputs, outputs, 3, padding=1, rngs=rngs),
            ]
        )
        self.skip_connection = None if inputs == outputs else Conv(inputs, outputs, 1, rngs=rngs)

    def change_side(self, x: Array) -> Array:
        """x (N, S, S, C), average-pooled or upsampled by 2, or x itself, as `resample` says."""
        if self.resample == "down":
            return average_pool(x)  # (N, S/2, S/2, C)
        if self.resample == "up":
            return upsample_nearest(x)  # (N, 2S, 2S, C)
        return x

    def __call__(self, x: Array, emb: Array, context: Array | None, rngs: nnx.Rngs | None) -> Array:
        layers: Any = self.in_layers  # nnx does not know the types of a list's items
        norm, activation, conv = layers
        h = conv(self.change_side(activation(norm(x))))  # (N, S', S', C_out)
        emb = self.emb_layers(emb)[:, None, None]  # (N, 1, 1, C_out or 2 C_out)
        layers = self.out_layers
        norm, activation, dropout, conv = layers
        if self.scale_shift:  # ADM; LDM adds the embedding
            scale, shift = jnp.split(emb, 2, axis=-1)  # (N, 1, 1, C_out) each
            h = norm(h).astype(scale.dtype) * (1 + scale) + shift  # (N, S', S', C_out)
        else:
            h = norm(h + emb)  # (N, S', S', C_out)
        h = conv(dropout(activation(h), deterministic=rngs is None, rngs=rngs))  # (N, S', S', C_out)
        x = self.change_side(x)  # (N, S', S', C)
        return (x if self.skip_connection is None else self.skip_connection(x)) + h  # (N, S', S', C_out)


def split_heads(qkv: Array, heads: int, *, qkv_first: bool) -> tuple[Array, Array, Array]:
    """(N, T, 3 C) -> q, k, v (N, T, H, C/H). Order of the channels: (3, H, C/H) if `qkv_first`, else (H, 3, C/H)."""
    n, tokens, _ = qkv.shape
    if qkv_first:
        parts, axis = qkv.reshape(n, tokens, 3, heads, -1), 2
    else:
        parts, axis = qkv.reshape(n, tokens, heads, 3, -1), 3
    q, k, v = (part.squeeze(axis) for part in jnp.split(parts, 3, axis))
    return q, k, v


class AttentionBlock(nnx.Module):
    """ADM's self-attention over all positions, with a skip connection."""

    def __init__(self, part: plan.Attention, *, qkv_first: bool, rngs: nnx.Rngs):
        self.heads, self.qkv_first = part.heads, qkv_first
        self.norm = group_norm(part.channels, rngs)
        self.qkv = Conv(part.channels, 3 * part.channels, 1, axes=1, rngs=rngs)
        self.proj_out = zero_conv(part.channels, part.channels, 1, axes=1, rngs=rngs)

    def __call__(self, x: Array, emb: Array, context: Array | None, rngs: nnx.Rngs | None) -> Array:
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])  # (N, T, C)
        q, k, v = split_heads(self.qkv(self.norm(tokens)), self.heads, qkv_first=self.qkv_first)  # (N, T, H, C/H)
        h = attend(q, k, v).reshape(tokens.shape)  # (N, T, C)
        return (tokens + self.proj_out(h)).reshape(x.shape)  # (N, S, S, C)


class CrossAttention(nnx.Module):
    """Multi-head attention from (N, T, C) to a context (N, K, context width), or self-attention without a context."""

    def __init__(self, width: int, context_width: int, heads: int, rngs: nnx.Rngs):
        self.heads = heads
        self.to_q = Linear(width, width, bias=False, rngs=rngs)
        self.to_k = Linear(context_width, width, bias=False, rngs=rngs)
        self.to_v = Linear(context_width, width, bias=False, rngs=rngs)
        self.to_out = Sequence([Linear(width, width, rngs=rngs)])

    def __call__(self, x: Array, context: Array | None = None) -> Array:
        context = x if context is None else context
        q, k, v = (
            projection.reshape(*projection.shape[:2], self.heads, -1)
            for projection in (self.to_q(x), self.to_k(context), self.to_v(context))
        )  # (N, T or K, H, C/H)
        return self.to_out(attend(q, k, v).reshape(x.shape))  # (N, T, C)


class GatedGelu(nnx.Module):
    """Linear layer to twice the output width; its first half times the exact GELU of the second (Shazeer 2020)."""

    def __init__(self, width: int, outputs: int, rngs: nnx.Rngs):
        self.proj = Linear(width, 2 * outputs, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x, gate = jnp.split(self.proj(x), 2, axis=-1)  # (N, T, C_out) each
        return x * jax.nn.gelu(gate, approximate=False)  # (N, T, C_out)


class FeedForward(nnx.Module):
    """Two layers with a hidden width of four times the width."""

    def __init__(self, width: int, dropout: float, rngs: nnx.Rngs):
        self.net = nnx.List(
            [GatedGelu(width, 4 * width, rngs), nnx.Dropout(dropout), Linear(4 * width, width, rngs=rngs)]
        )

    def __call__(self, x: Array, rngs: nnx.Rngs | None) -> Array:
        layers: Any = self.net  # nnx does not know the types of a list's items
        gated, dropout, last = layers
        return last(dropout(gated(x), deterministic=rngs is None, rngs=rngs))  # (N, T, C)


class TransformerBlock(nnx.Module):
    """Self-attention, attention to the context, feed-forward."""

    def __init__(self, width: int, context_width: int, heads: int, dropout: float, rngs: nnx.Rngs):
        self.attn1 = CrossAttention(width, width, heads, rngs)
        self.ff = FeedForward(width, dropout, rngs)
        self.attn2 = CrossAttention(width, context_width, heads, rngs)
        self.norm1 = LayerNorm(width, eps=1e-5, rngs=rngs)  # torch's default
        self.norm2 = LayerNorm(width, eps=1e-5, rngs=rngs)
        self.norm3 = LayerNorm(width, eps=1e-5, rngs=rngs)

    def __call__(self, x: Array, context: Array, rngs: nnx.Rngs | None) -> Array:
        x = x + self.attn1(self.norm1(x))  # (N, T, C)
        x = x + self.attn2(self.norm2(x), context)  # (N, T, C)
        return x + self.ff(self.norm3(x), rngs)  # (N, T, C)


class SpatialTransformer(nnx.Module):
    """LDM's transformer over the positions of a feature map, with a skip connection."""

    def __init__(self, part: plan.Attention, context_width: int, depth: int, dropout: float, rngs: nnx.Rngs):
        width = part.channels
        self.norm = group_norm(width, rngs, TRANSFORMER_NORM_EPS)
        self.proj_in = Conv(width, width, 1, rngs=rngs)
        self.transformer_blocks = nnx.List(
            [TransformerBlock(width, context_width, part.heads, dropout, rngs) for _ in range(depth)]
        )
        self.proj_out = zero_conv(width, width, 1, rngs=rngs)

    def __call__(self, x: Array, emb: Array, context: Array, rngs: nnx.Rngs | None) -> Array:
        h = self.proj_in(self.norm(x)).reshape(x.shape[0], -1, x.shape[-1])  # (N, T, C)
        for block in self.transformer_blocks:
            h = block(h, context, rngs)  # (N, T, C)
        return x + self.proj_out(h.reshape(x.shape))  # (N, S, S, C)


class Downsample(nnx.Module):
    """Halves the side by a 3x3 convolution of stride 2."""

    def __init__(self, part: plan.Downsample, rngs: nnx.Rngs):
        self.op = Conv(part.channels, part.channels, 3, stride=2, padding=1, rngs=rngs)

    def __call__(self, x: Array, emb: Array, context: Array | None, rngs: nnx.Rngs | None) -> Array:
        return self.op(x)  # (N, S/2, S/2, C)


class Upsample(nnx.Module):
    """Doubles the side by nearest-neighbour interpolation, then a 3x3 convolution."""

    def __init__(self, part: plan.Upsample, rngs: nnx.Rngs):
        self.conv = Conv(part.channels, part.channels, 3, padding=1, rngs=rngs)

    def __call__(self, x: Array, emb: Array, context: Array | None, rngs: nnx.Rngs | None) -> Array:
        return self.conv(upsample_nearest(x))  # (N, 2S, 2S, C)


class Encoder(nnx.Module):
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
        rngs: nnx.Rngs,
    ):
        self.width, self.gradient_checkpointing, self.has_dropout = layout.width, gradient_checkpointing, dropout > 0

        def build(block: tuple[plan.Part, ...]) -> nnx.List:
            """The modules of the parts of one block."""
            parts: list[nnx.Module] = []
            for part in block:
                if isinstance(part, plan.InputConv):
                    parts.append(InputConv(part.inputs, part.outputs, 3, padding=1, rngs=rngs))
                elif isinstance(part, plan.ResBlock):
                    parts.append(ResBlock(part, layout.embedding, scale_shift=scale_shift, dropout=dropout, rngs=rngs))
                elif isinstance(part, plan.Downsample):
                    parts.append(Downsample(part, rngs))
                elif isinstance(part, plan.Upsample):
                    parts.append(Upsample(part, rngs))
                elif context is None:
                    parts.append(AttentionBlock(part, qkv_first=qkv_first, rngs=rngs))
                else:
                    parts.append(SpatialTransformer(part, *context, dropout, rngs))
            return nnx.List(parts)

        self.time_embed = Sequence(
            [
                Linear(layout.width, layout.embedding, force_float32=True, rngs=rngs),
                jax.nn.silu,
                Linear(layout.embedding, layout.embedding, force_float32=True, rngs=rngs),
            ]
        )
        normal = nnx.initializers.normal(1.0)  # as torch's nn.Embedding
        table = nnx.Embed(labels, layout.embedding, embedding_init=normal, rngs=rngs) if labels else None
        self.label_emb = table
        self.input_blocks = nnx.List([build(block) for block in layout.input_blocks])
        self.middle_block = build(layout.middle_block)
        self.output_blocks = nnx.List([build(block) for block in layout.output_blocks])

    def embed(self, t: Array) -> Array:
        """Embedding (N, E) of timesteps (N,), in float32 for every compute dtype."""
        return self.time_embed(timestep_features(t, self.width))

    def run_block(self, block: nnx.List, x: Array, emb: Array, context: Array | None, rngs: nnx.Rngs | None) -> Array:
        """The output of one block, a list of parts that are applied one after another."""
        # The key is drawn here and not in `parts`, which may be run again for the backward pass: both runs need the same
        # dropout masks.
        key = rngs.dropout() if rngs is not None and self.has_dropout else None

        def parts(block: nnx.List, x: Array, emb: Array, context: Array | None, key: Array | None) -> Array:
            rngs = None if key is None else nnx.Rngs(dropout=key)
            for part in block:
                x = part(x, emb, context, rngs)
            return x

        if self.gradient_checkpointing:
            return checkpointed(parts, block, x, emb, context, key)
        return parts(block, x, emb, context, key)

    def encode(self, x: Array, emb: Array, context: Array | None, rngs: nnx.Rngs | None) -> tuple[Array, list[Array]]:
        """The feature map after the middle block, and the outputs of all input blocks, for the skip connections."""
        skips = []
        for block in self.input_blocks:
            x = self.run_block(block, x, emb, context, rngs)  # (N, S, S, C)
            skips.append(x)
        return self.run_block(self.middle_block, x, emb, context, rngs), skips  # (N, S_min, S_min, C)


class UNetBase(Encoder):
    """A whole U-Net without `__call__`, because ADM and LDM condition it on the class in different ways."""

    def __init__(self, layout: plan.Layout, out_channels: int, *, rngs: nnx.Rngs, **settings: Any):
        super().__init__(layout, rngs=rngs, **settings)
        last = zero_conv(layout.channels, out_channels, 3, padding=1, rngs=rngs)
        self.out = Sequence([group_norm(layout.channels, rngs), jax.nn.silu, last])

    def run_unet(self, x: Array, emb: Array, context: Array | None = None, *, rngs: nnx.Rngs | None = None) -> Array:
        """The output for x (N, S, S, C), an embedding (N, E) and a context (N, K, context width)."""
        x, skips = self.encode(x, emb, context, rngs)  # (N, S_min, S_min, C)
        for block in self.output_blocks:
            x = jnp.concatenate([x, skips.pop().astype(x.dtype)], axis=-1)  # (N, S, S, C)
            x = self.run_block(block, x, emb, context, rngs)  # (N, S, S, C)
        return self.out(x)  # (N, S, S, C_out)


class UNet(UNetBase):
    """A whole U-Net that is called with its embedding and context."""

    def __call__(self, x: Array, emb: Array, context: Array | None = None, *, rngs: nnx.Rngs | None = None) -> Array:
        return self.run_unet(x, emb, context, rngs=rngs)  # (N, S, S, C_out)


def check_input(family: str, x: Array, shape: tuple[int, int, int]) -> None:
    """Raise UserError unless x is (N, *shape), the input that the network was built for."""
    if x.shape[1:] != shape:
        raise UserError(
            f"{family}: input of shape {tuple(x.shape)}, but this network takes (N, {', '.join(map(str, shape))}); "
            "build it with the input_size and in_channels of the data"
        )
