"""The network in JAX (Flax NNX). Attributes have the names of the torch network, so that weights can be exchanged."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from backbones.flax_layers import channels_first, channels_last, timestep_features
from harness.errors import UserError

EPS = 1e-6  # of layer norm
EXPANSION = 8 / 3  # channels of the gate and of the value, in widths
KERNEL = 7  # side of the depthwise convolution


class Block(nnx.Module):
    """value x SiLU(gate), where a depthwise convolution has mixed `width` of the value's channels over the positions."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.mixed, hidden = width, int(EXPANSION * width)
        zeros = nnx.initializers.zeros_init()  # adaLN-Zero: the block begins as the identity
        self.norm = nnx.LayerNorm(width, epsilon=EPS, use_bias=False, use_scale=False, rngs=rngs)
        self.into = nnx.Linear(width, 2 * hidden, rngs=rngs)
        self.mix = nnx.Conv(width, width, (KERNEL, KERNEL), feature_group_count=width, rngs=rngs)
        self.back = nnx.Linear(hidden, width, rngs=rngs)
        self.condition = nnx.Linear(width, 3 * width, kernel_init=zeros, rngs=rngs)

    def __call__(self, x: Array, c: Array) -> Array:
        shift, scale, amount = jnp.split(self.condition(c)[:, None, None], 3, axis=3)  # (N, 1, 1, D) each
        gate, value = jnp.split(self.into(self.norm(x) * (1 + scale) + shift), 2, axis=3)  # (N, h, w, hidden) each
        mixed = self.mix(value[..., : self.mixed])  # (N, h, w, D)
        value = jnp.concatenate([mixed, value[..., self.mixed :]], axis=3)  # (N, h, w, hidden)
        return x + amount * self.back(jax.nn.silu(gate) * value)  # (N, h, w, D)


class GatedConv(nnx.Module):
    """Denoiser. The arguments are those of the spec's `defaults`; images are (N, C, H, W), as everywhere in the harness."""

    def __init__(
        self,
        *,
        input_size: int,
        in_channels: int,
        num_classes: int,
        out_channels: int | None,
        width: int,
        depth: int,
        patch: int,
        rngs: nnx.Rngs,
    ):
        if input_size % patch:
            raise UserError(
                f"gated-conv: input_size {input_size} is not divisible by patch {patch}; crop or pad the images"
            )
        self.patch, self.width = patch, width
        out_channels = 2 * in_channels if out_channels is None else out_channels
        zeros = nnx.initializers.zeros_init()  # begins by predicting nothing
        self.patches = nnx.Linear(in_channels * patch**2, width, rngs=rngs)
        self.time1 = nnx.Linear(width, width, rngs=rngs)
        self.time2 = nnx.Linear(width, width, rngs=rngs)
        self.label = nnx.Embed(num_classes + 1, width, rngs=rngs)  # the last row: no class
        self.blocks = nnx.List([Block(width, rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, epsilon=EPS, rngs=rngs)
        self.out = nnx.Linear(width, out_channels * patch**2, kernel_init=zeros, rngs=rngs)

    def __call__(self, x: Array, t: Array, y: Array) -> Array:
        n, channels, height, width = x.shape
        p, rows, columns = self.patch, height // self.patch, width // self.patch
        time = self.time2(jax.nn.silu(self.time1(timestep_features(t, self.width))))  # (N, D)
        c = jax.nn.silu(time + self.label(y))  # (N, D)
        # the features of a patch in torch's order: channel, row, column
        x = channels_last(x).reshape(n, rows, p, columns, p, channels).transpose(0, 1, 3, 5, 2, 4)
        x = self.patches(x.reshape(n, rows, columns, channels * p * p))  # (N, H/p, W/p, D)
        for block in self.blocks:
            x = block(x, c)  # (N, H/p, W/p, D)
        x = self.out(self.norm(x)).reshape(n, rows, columns, -1, p, p)  # (N, H/p, W/p, C, p, p)
        x = x.transpose(0, 1, 4, 2, 5, 3).reshape(n, height, width, -1)  # (N, H, W, out_channels)
        return channels_first(x)  # (N, out_channels, H, W)
