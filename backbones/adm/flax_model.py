"""ADM's denoisers, upsamplers and noisy classifiers in Flax: the classes of `torch_model.py` in the same order.

Source: as there. The blocks are in `backbones.unet.flax_unet`. Inputs and outputs are channels first, as in torch; inside
the networks, images are channels last. All networks take the arguments of `backbones.adm.spec` by keyword, and `rngs`
for the initial weights (None: seed 0).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from backbones.adm.layout import adm_layout
from backbones.flax_layers import Conv, Sequence, attend, channels_first, channels_last, initial_rngs, resize_bilinear
from backbones.unet.flax_unet import Encoder, UNetBase, check_input, group_norm, split_heads
from backbones.unet.layout import Layout


class _ADM(UNetBase):
    """The U-Net of denoisers and upsamplers."""

    kind: str

    def __init__(self, *, rngs: nnx.Rngs | None = None, **arguments: Any):
        layout = adm_layout(self.kind, arguments)
        channels, size = arguments["in_channels"], arguments["input_size"]
        super().__init__(
            layout,
            arguments["out_channels"] or 2 * channels,
            scale_shift=True,
            dropout=arguments["dropout"],
            qkv_first=arguments["qkv_first"],
            labels=arguments["num_classes"],
            gradient_checkpointing=arguments["gradient_checkpointing"],
            rngs=rngs or initial_rngs(0),
        )
        self.input_shape = (channels, size, size)

    def denoise(self, x: Array, t: Array, y: Array, rngs: nnx.Rngs | None) -> Array:
        """The U-Net's output (N, S, S, C_out) for its input channels x (N, S, S, C), timesteps t and labels y."""
        emb = self.embed(t)  # (N, E) float32
        if self.label_emb is not None:  # None if num_classes is 0
            emb = emb + self.label_emb(y)  # (N, E)
        return self.run_unet(x, emb, rngs=rngs)  # (N, S, S, C_out)


class ADM(_ADM):
    """Denoiser: from x (N, in_channels, input_size, input_size), t (N,) timesteps and y (N,) integer labels to (N,
    out_channels, input_size, input_size). With the paper's objective, the first half of the output channels is the
    noise and the second half the variance.

    The class embedding is added to the timestep embedding. With num_classes 0 there is no class embedding, and y is not
    used. An invalid label gives NaN. The output is exactly 0 before training.
    """

    kind = "denoiser"

    def __call__(self, x: Array, t: Array, y: Array, *, rngs: nnx.Rngs | None = None) -> Array:
        check_input("ADM", x, self.input_shape)
        return channels_first(self.denoise(channels_last(x), t, y, rngs))  # (N, C_out, S, S)


class ADMUpsampler(_ADM):
    """As `ADM`, with one more input: a low-resolution image (N, in_channels, s, s), which is resized to input_size."""

    kind = "upsampler"

    def __call__(self, x: Array, t: Array, y: Array, low_res: Array, *, rngs: nnx.Rngs | None = None) -> Array:
        check_input("ADM", x, self.input_shape)
        _, _, height, width = x.shape
        low_res = resize_bilinear(channels_last(low_res), (height, width))  # (N, S, S, C)
        x = jnp.concatenate([channels_last(x), low_res.astype(x.dtype)], axis=-1)  # (N, S, S, 2 C)
        return channels_first(self.denoise(x, t, y, rngs))  # (N, C_out, S, S)


class AttentionPool(nnx.Module):
    """Attention pooling as in CLIP: the mean of all positions is added as a token, which attends to all tokens.

    The published network uses the output of this token only, so only that one is computed. The channels of qkv_proj are
    always ordered as with qkv_first, whatever the order in the other layers.
    """

    def __init__(self, layout: Layout, heads: int, outputs: int, rngs: nnx.Rngs):
        channels, tokens = layout.channels, layout.side**2
        self.heads = heads
        positions = jax.random.normal(rngs.params(), (channels, tokens + 1)) / channels**0.5
        self.positional_embedding = nnx.Param(positions)  # (C, T + 1), as in torch
        self.qkv_proj = Conv(channels, 3 * channels, 1, axes=1, rngs=rngs)
        self.c_proj = Conv(channels, outputs, 1, axes=1, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = x.reshape(x.shape[0], -1, x.shape[-1])  # (N, T, C)
        x = jnp.concatenate([x.mean(axis=1, keepdims=True), x], axis=1)  # (N, T + 1, C)
        x = x + self.positional_embedding[...].T.astype(x.dtype)  # (N, T + 1, C)
        q, k, v = split_heads(self.qkv_proj(x), self.heads, qkv_first=True)  # (N, T + 1, H, C/H)
        pooled = attend(q[:, :1], k, v).reshape(x.shape[0], 1, -1)  # (N, 1, C)
        return self.c_proj(pooled).squeeze(1)  # (N, num_classes)


class ADMClassifier(Encoder):
    """Classifier of noised images: from x (N, in_channels, input_size, input_size) and t (N,) timesteps to logits
    (N, num_classes)."""

    def __init__(self, *, rngs: nnx.Rngs | None = None, **arguments: Any):
        rngs = rngs or initial_rngs(0)
        layout = adm_layout("classifier", arguments)
        super().__init__(
            layout,
            scale_shift=True,
            dropout=arguments["dropout"],
            qkv_first=arguments["qkv_first"],
            gradient_checkpointing=arguments["gradient_checkpointing"],
            rngs=rngs,
        )
        size = arguments["input_size"]
        self.input_shape = (arguments["in_channels"], size, size)
        _, attention, _ = layout.middle_block
        pool = AttentionPool(layout, attention.heads, arguments["num_classes"], rngs)
        self.out = Sequence([group_norm(layout.channels, rngs), jax.nn.silu, pool])

    def __call__(self, x: Array, t: Array, *, rngs: nnx.Rngs | None = None) -> Array:
        check_input("ADM", x, self.input_shape)
        x, _ = self.encode(channels_last(x), self.embed(t), context=None, rngs=rngs)  # (N, S_min, S_min, C)
        return self.out(x)  # (N, num_classes)
