"""The Diffusion Transformer in Flax: the classes of `torch_model.py` in the same order, with the same attribute names.

Source: as there. `backbones.flax_weights` maps parameters to and from the public release's names and shapes.

Shapes: N images, T tokens, D width, H heads, p patch size, C channels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from backbones.dit.layout import MLP_RATIO, TIME_FEATURES, check_arguments
from backbones.dit.position import sincos_table
from backbones.flax_layers import (
    Conv,
    Frozen,
    LayerNorm,
    Linear,
    Sequence,
    attend,
    channels_first,
    channels_last,
    checkpointed,
    initial_rngs,
    timestep_features,
    xavier,
    zeros,
)
from harness.errors import UserError

EPS = 1e-6  # of every layer norm

normal = nnx.initializers.normal(0.02)


def modulate(x: Array, shift: Array, scale: Array) -> Array:
    """x (N, T, D) scaled by 1 + scale and shifted; scale and shift are (N, D).

    The result has the dtype of scale and shift: the linear layer that follows would round it to that dtype anyway.
    """
    return x.astype(scale.dtype) * (1 + scale[:, None]) + shift[:, None]


def plain_norm(width: int, rngs: nnx.Rngs) -> LayerNorm:
    """A layer norm without learned scale and shift."""
    return LayerNorm(width, eps=EPS, affine=False, rngs=rngs)


def linear(inputs: int, outputs: int, rngs: nnx.Rngs, kernel_init: nnx.Initializer | None = None) -> Linear:
    """A linear layer; kernel_init None: Xavier-uniform. The initial bias is 0."""
    return Linear(inputs, outputs, kernel_init=kernel_init or xavier(inputs, outputs), bias_init=zeros, rngs=rngs)


class Attention(nnx.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.heads = heads
        self.qkv = linear(width, 3 * width, rngs)
        self.proj = linear(width, width, rngs)

    def __call__(self, x: Array) -> Array:
        n, t, d = x.shape
        q, k, v = (part.reshape(n, t, self.heads, -1) for part in jnp.split(self.qkv(x), 3, axis=-1))  # (N, T, H, D/H)
        x = attend(q, k, v)  # (N, T, H, D/H)
        return self.proj(x.reshape(n, t, d))  # (N, T, D)


class CrossAttention(nnx.Module):
    """Multi-head attention from the image tokens to the conditioning tokens."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.heads = heads
        self.q = linear(width, width, rngs)
        self.kv = linear(width, 2 * width, rngs)
        self.proj = linear(width, width, rngs)

    def __call__(self, x: Array, context: Array) -> Array:
        n, t, d = x.shape
        q = self.q(x).reshape(n, t, self.heads, -1)  # (N, T, H, D/H)
        k, v = (
            part.reshape(n, context.shape[1], self.heads, -1) for part in jnp.split(self.kv(context), 2, axis=-1)
        )  # (N, 2, H, D/H)
        x = attend(q, k, v)  # (N, T, H, D/H)
        return self.proj(x.reshape(n, t, d))  # (N, T, D)


class Mlp(nnx.Module):
    """Two linear layers around a GELU in its tanh form."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.fc1 = linear(width, MLP_RATIO * width, rngs)
        self.fc2 = linear(MLP_RATIO * width, width, rngs)

    def __call__(self, x: Array) -> Array:
        x = jax.nn.gelu(self.fc1(x), approximate=True)  # (N, T, 4D)
        return self.fc2(x)  # (N, T, D)


class AdaLNBlock(nnx.Module):
    """ViT block whose layer norms are modulated by timestep and class: adaLN-Zero if `gated`, else adaLN.

    A linear layer regresses scales and shifts, and if gated also gates of the two residual branches.
    """

    def __init__(self, width: int, heads: int, gated: bool, rngs: nnx.Rngs):
        self.gated = gated
        self.norm1 = plain_norm(width, rngs)
        self.attn = Attention(width, heads, rngs)
        self.norm2 = plain_norm(width, rngs)
        self.mlp = Mlp(width, rngs)
        # With adaLN-Zero, every block starts as the identity.
        regression = linear(width, (6 if gated else 4) * width, rngs, kernel_init=zeros if gated else None)
        self.adaLN_modulation = Sequence([jax.nn.silu, regression])

    def __call__(self, x: Array, c: Array) -> Array:
        modulation = self.adaLN_modulation(c)  # (N, 6D) or (N, 4D)
        if not self.gated:
            shift1, scale1, shift2, scale2 = jnp.split(modulation, 4, axis=-1)  # (N, D) each
            x = x + self.attn(modulate(self.norm1(x), shift1, scale1))  # (N, T, D)
            return x + self.mlp(modulate(self.norm2(x), shift2, scale2))  # (N, T, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation, 6, axis=-1)  # (N, D) each
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))  # (N, T, D)
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))  # (N, T, D)


class InContextBlock(nnx.Module):
    """A standard ViT block; the conditioning is two more tokens of the sequence."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(width, eps=EPS, rngs=rngs)
        self.attn = Attention(width, heads, rngs)
        self.norm2 = LayerNorm(width, eps=EPS, rngs=rngs)
        self.mlp = Mlp(width, rngs)

    def __call__(self, x: Array, c: Array) -> Array:
        x = x + self.attn(self.norm1(x))  # (N, T + 2, D); c is in x
        return x + self.mlp(self.norm2(x))  # (N, T + 2, D)


class CrossAttentionBlock(nnx.Module):
    """A ViT block with attention to the two conditioning tokens after the self-attention."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(width, eps=EPS, rngs=rngs)
        self.attn = Attention(width, heads, rngs)
        self.norm_cross = LayerNorm(width, eps=EPS, rngs=rngs)
        self.cross_attn = CrossAttention(width, heads, rngs)
        self.norm2 = LayerNorm(width, eps=EPS, rngs=rngs)
        self.mlp = Mlp(width, rngs)

    def __call__(self, x: Array, c: Array) -> Array:
        x = x + self.attn(self.norm1(x))  # (N, T, D)
        x = x + self.cross_attn(self.norm_cross(x), c)  # (N, T, D); c (N, 2, D)
        return x + self.mlp(self.norm2(x))  # (N, T, D)


def build_block(block: str, width: int, heads: int, rngs: nnx.Rngs) -> nnx.Module:
    """A block of the named design, one of backbones.dit.layout.BLOCKS; every block is called as block(x, c)."""
    if block == "in-context":
        return InContextBlock(width, heads, rngs)
    if block == "cross-attention":
        return CrossAttentionBlock(width, heads, rngs)
    return AdaLNBlock(width, heads, gated=block == "adaln-zero", rngs=rngs)


class PatchEmbed(nnx.Module):
    """Linear embedding of p x p patches, row by row; its weight has a convolution's shape (p, p, C, D)."""

    def __init__(self, patch: int, in_channels: int, width: int, rngs: nnx.Rngs):
        # Initialised as a linear map of p*p*C inputs, although it is stored as a convolution.
        kernel_init = xavier(patch * patch * in_channels, width)
        self.proj = Conv(in_channels, width, patch, stride=patch, kernel_init=kernel_init, bias_init=zeros, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = self.proj(x)  # (N, H/p, W/p, D)
        return x.reshape(x.shape[0], -1, x.shape[-1])  # (N, T, D)


class TimestepEmbedder(nnx.Module):
    """256 sinusoids of the timestep and a two-layer MLP, always in float32."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        def layer(inputs: int) -> Linear:
            return Linear(inputs, width, kernel_init=normal, bias_init=zeros, force_float32=True, rngs=rngs)

        self.mlp = Sequence([layer(TIME_FEATURES), jax.nn.silu, layer(width)])

    def __call__(self, t: Array) -> Array:
        return self.mlp(timestep_features(t, TIME_FEATURES))  # (N, D)


class LabelEmbedder(nnx.Module):
    """One float32 vector per class, and a last one for "no class". An invalid label gives NaN."""

    def __init__(self, num_classes: int, width: int, rngs: nnx.Rngs):
        self.embedding_table = nnx.Embed(num_classes + 1, width, embedding_init=normal, rngs=rngs)

    def __call__(self, y: Array) -> Array:
        return self.embedding_table(y)  # (N, D)


class FinalLayer(nnx.Module):
    """Layer norm and linear output layer of every token; with adaLN for the two adaLN designs."""

    def __init__(self, width: int, outputs: int, adaptive: bool, rngs: nnx.Rngs):
        self.norm_final = LayerNorm(width, eps=EPS, affine=not adaptive, rngs=rngs)
        self.linear = linear(width, outputs, rngs, kernel_init=zeros)
        modulation: Sequence | None = None
        if adaptive:
            modulation = Sequence([jax.nn.silu, linear(width, 2 * width, rngs, kernel_init=zeros)])
        self.adaLN_modulation = modulation

    def __call__(self, x: Array, c: Array) -> Array:
        if self.adaLN_modulation is None:
            return self.linear(self.norm_final(x))  # (N, T, p*p*C_out)
        shift, scale = jnp.split(self.adaLN_modulation(c), 2, axis=-1)  # (N, D) each
        return self.linear(modulate(self.norm_final(x), shift, scale))  # (N, T, p*p*C_out)


class DiT(nnx.Module):
    """Diffusion Transformer.

    Its inputs are x (N, in_channels, input_size, input_size), t (N,) timesteps 0..999, integer or not, and y (N,)
    integer labels 0..num_classes, where num_classes means "no class". It returns (N, out_channels, input_size,
    input_size). With the paper's objective, the first half of the output channels is the noise and the second half the
    variance. Label dropout is done by the trainer. The output is exactly 0 before training. Timestep and label
    embeddings are float32 for every compute dtype. `gradient_checkpointing` stores only the input of each block for the
    backward pass and recomputes the rest.
    """

    def __init__(
        self,
        *,
        input_size: int,  # latent cells or pixels a side
        in_channels: int,
        num_classes: int,  # without the "no class" label
        out_channels: int | None,  # None: 2 * in_channels
        depth: int,
        width: int,
        heads: int,
        patch: int,
        block: str,  # one of backbones.dit.layout.BLOCKS
        gradient_checkpointing: bool = False,
        rngs: nnx.Rngs | None = None,  # for the initial weights; None: seed 0
    ):
        check_arguments(
            input_size=input_size,
            in_channels=in_channels,
            num_classes=num_classes,
            out_channels=out_channels,
            depth=depth,
            width=width,
            heads=heads,
            patch=patch,
            block=block,
            gradient_checkpointing=gradient_checkpointing,
        )
        rngs = rngs or initial_rngs(0)
        self.input_shape = (in_channels, input_size, input_size)
        self.out_channels = 2 * in_channels if out_channels is None else out_channels
        self.patch = patch
        self.grid = input_size // patch
        self.block = block
        self.gradient_checkpointing = gradient_checkpointing

        adaptive = block in ("adaln", "adaln-zero")
        self.x_embedder = PatchEmbed(patch, in_channels, width, rngs)
        self.t_embedder = TimestepEmbedder(width, rngs)
        self.y_embedder = LabelEmbedder(num_classes, width, rngs)
        self.pos_embed = Frozen(jnp.asarray(sincos_table(width, self.grid)[None], jnp.float32))  # (1, T, D)
        self.blocks = nnx.List([build_block(block, width, heads, rngs) for _ in range(depth)])
        self.final_layer = FinalLayer(width, patch * patch * self.out_channels, adaptive, rngs)

    def __call__(self, x: Array, t: Array, y: Array, *, rngs: nnx.Rngs | None = None) -> Array:
        """`rngs` is for networks with dropout; it has no effect here."""
        if x.shape[1:] != self.input_shape:
            raise UserError(
                f"DiT: input of shape {tuple(x.shape)}, but this network takes (N, {', '.join(map(str, self.input_shape))});"
                " build it with the input_size and in_channels of the data"
            )
        tokens = self.grid**2  # T, of the image
        t_embedding = self.t_embedder(t)  # (N, D) float32
        y_embedding = self.y_embedder(y)  # (N, D) float32
        x = self.x_embedder(channels_last(x)) + self.pos_embed[...]  # (N, T, D), T = (input_size / p) ** 2
        if self.block in ("adaln", "adaln-zero"):
            c = t_embedding + y_embedding  # (N, D)
        else:
            c = jnp.stack([t_embedding, y_embedding], axis=1)  # (N, 2, D)
        if self.block == "in-context":
            x = jnp.concatenate([x, c.astype(x.dtype)], axis=1)  # (N, T + 2, D)
        for block in self.blocks:
            if self.gradient_checkpointing:
                x = checkpointed(lambda block, x, c: block(x, c), block, x, c)
            else:
                x = block(x, c)  # (N, T, D), in-context T + 2
        x = self.final_layer(x[:, :tokens], c)  # (N, T, p*p*C_out), without the conditioning tokens
        return channels_first(self.unpatchify(x))  # (N, C_out, input_size, input_size)

    def unpatchify(self, x: Array) -> Array:
        """Images, channels last, from token vectors laid out as (row, column, channel) with the channel fastest."""
        n, side = x.shape[0], self.grid * self.patch
        x = x.reshape(n, self.grid, self.grid, self.patch, self.patch, self.out_channels)  # (N, G, G, p, p, C_out)
        return x.transpose(0, 1, 3, 2, 4, 5).reshape(n, side, side, self.out_channels)  # (N, G p, G p, C_out)
