"""ADM's denoisers, upsamplers and noisy classifiers in Flax: the classes of `torch_model.py` in the same order.

Source: as there. The blocks are in `backbones.unet.flax_unet`. Images are channels first at the border alone. All
networks take the arguments of `backbones.adm.spec` by keyword, and `rngs` of the initial weights (None: of seed 0).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from backbones.adm.spec import adm_layout
from backbones.flax_layers import Conv, Sequence, attend, channels_first, channels_last, initial_rngs, stretched
from backbones.unet.flax_unet import Encoder, UNet, check_input, group_norm, split_heads
from backbones.unet.layout import Layout


class ADM(UNet):
    """Denoiser: x (N, in_channels, input_size, input_size), t (N,) timesteps, y (N,) integer labels, to (N,
    out_channels, input_size, input_size), for the paper's objective the noise and then the variance.

    The class is an embedding added to the timestep's; with num_classes 0 there is none and `y` is not looked at. A
    label that does not exist gives NaN. The output is exactly 0 before training.
    """

    kind = "denoiser"

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

    def __call__(self, x: Array, t: Array, y: Array, *, rngs: nnx.Rngs | None = None) -> Array:
        check_input("ADM", x, self.input_shape)
        return channels_first(self.denoise(channels_last(x), t, y, rngs))  # (N, C_out, S, S)

    def denoise(self, x: Array, t: Array, y: Array, rngs: nnx.Rngs | None) -> Array:
        """The U-Net on its input channels, channels last."""
        emb = self.embed(t)  # (N, E) float32
        if self.label_emb is not None:
            emb = emb + self.label_emb(y)  # (N, E)
        return super().__call__(x, emb, rngs=rngs)  # (N, S, S, C_out)


class ADMUpsampler(ADM):
    """Denoiser that also sees a low-resolution image (N, in_channels, s, s) of any side, stretched to its own size."""

    kind = "upsampler"

    def __call__(self, x: Array, t: Array, y: Array, low_res: Array, *, rngs: nnx.Rngs | None = None) -> Array:
        check_input("ADM", x, self.input_shape)
        low_res = stretched(channels_last(low_res), x.shape[2:])  # (N, S, S, C)
        x = jnp.concatenate([channels_last(x), low_res.astype(x.dtype)], axis=-1)  # (N, S, S, 2 C)
        return channels_first(self.denoise(x, t, y, rngs))  # (N, C_out, S, S)


class AttentionPool(nnx.Module):
    """One token, the mean of all positions, that attends to them and is read out (as CLIP's).

    Of the published layer only the first token's output is used, so only that is computed.
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
    """Classifier of noised images: x (N, in_channels, input_size, input_size), t (N,) timesteps, to logits
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
        heads = layout.middle_block[1].heads
        pool = AttentionPool(layout, heads, arguments["num_classes"], rngs)
        self.out = Sequence([group_norm(layout.channels, rngs), jax.nn.silu, pool])

    def __call__(self, x: Array, t: Array, *, rngs: nnx.Rngs | None = None) -> Array:
        check_input("ADM", x, self.input_shape)
        x, _ = self.encode(channels_last(x), self.embed(t), None, rngs)  # (N, S_min, S_min, C)
        return self.out(x)  # (N, num_classes)
