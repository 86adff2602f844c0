"""Flax layers that more than one family of backbones uses. Shapes are channels last: (N, H, W, C) or (N, T, C).

Parameters are float32. Linear layers and convolutions compute in the dtype of `set_compute_dtype` (by default float32),
those with `force_float32` always in float32. Normalisations compute their statistics in float32 and return the dtype of
their input. This corresponds to torch's autocast on the torch networks.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from harness.randomness import Purpose, bits

Initializer = Callable[..., Array]

zeros: Initializer = nnx.initializers.zeros_init()


class Frozen(nnx.Variable):
    """A weight that is loaded and saved but never trained, such as a position table.

    It is not an `nnx.Param`, so gradients, the optimiser and the moving average leave it out. Checkpoints and weight files
    include it, because they hold all of `backbones.flax_weights.variables`.
    """


def dropout_rngs(net: nnx.Module, key: Array) -> dict[str, nnx.Rngs]:
    """The keyword arguments of a call of `net`: {"rngs": generator of dropout} if it takes one, else {}.

    key: uint32 (2,), of that generator.
    """
    if "rngs" not in inspect.signature(type(net).__call__).parameters:
        return {}
    return {"rngs": nnx.Rngs(dropout=jax.random.wrap_key_data(key, impl="threefry2x32"))}


def initial_rngs(seed: int) -> nnx.Rngs:
    """The generator of a run's initial weights: jax's Threefry, whose key is 64 bits drawn from `harness.randomness`."""
    words = bits(seed, Purpose.INITIALISATION, index=np.zeros(1, np.int64), step=0, count=2)[0]  # (2,) uint32
    return nnx.Rngs(params=jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32"))


def uniform(bound: float) -> Initializer:
    """Initialiser with uniform numbers in [-bound, bound)."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def xavier(inputs: int, outputs: int) -> Initializer:
    """torch's xavier_uniform for a linear map, independent of the shape of its weight (Glorot and Bengio 2010)."""
    return uniform(math.sqrt(6 / (inputs + outputs)))


class Linear(nnx.Linear):
    """Linear layer; by default, initial weights and biases are uniform within 1 / sqrt(inputs), as in torch."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        bias: bool = True,
        kernel_init: Initializer | None = None,
        bias_init: Initializer | None = None,
        force_float32: bool = False,  # independent of `set_compute_dtype`
        rngs: nnx.Rngs,
    ):
        default = uniform(inputs**-0.5)
        super().__init__(
            inputs,
            outputs,
            use_bias=bias,
            kernel_init=kernel_init or default,
            bias_init=bias_init or default,
            dtype=jnp.float32 if force_float32 else None,
            # By default, GPUs and TPUs multiply float32 numbers with a lower precision.
            precision=jax.lax.Precision.HIGHEST if force_float32 else None,
            rngs=rngs,
        )
        self.force_float32 = force_float32


class Conv(nnx.Conv):
    """Convolution over the axes between batch and channels; by default, initialised as in torch.

    padding: cells added at both ends of every axis (jax's "SAME" would pad only one end for stride 2).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        stride: int = 1,
        padding: int = 0,
        axes: int = 2,
        kernel_init: Initializer | None = None,
        bias_init: Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        default = uniform((inputs * kernel**axes) ** -0.5)
        super().__init__(
            inputs,
            outputs,
            (kernel,) * axes,
            strides=stride,
            padding=((padding, padding),) * axes,
            kernel_init=kernel_init or default,
            bias_init=bias_init or default,
            rngs=rngs,
        )
        self.non_overlapping = kernel == stride and padding == 0  # a patch embedding, or a 1x1 convolution

    def __call__(self, x: Array) -> Array:  # type: ignore[override]  # without nnx's out_sharding
        if not self.non_overlapping:
            return super().__call__(x)  # (N, ..., C_out)
        # Non-overlapping patches are one matrix product: on a CPU, XLA's convolution takes 1.5 times as long.
        assert self.bias is not None
        x, kernel, bias = self.promote_dtype((x, self.kernel[...], self.bias[...]), dtype=self.dtype)
        axes = len(self.kernel_size)
        sides: list[int] = []  # H/p, p, W/p, p
        for side, k in zip(x.shape[1:-1], self.kernel_size, strict=True):
            sides += (side // k, k)
        x = x.reshape(x.shape[0], *sides, x.shape[-1])  # (N, H/p, p, W/p, p, C)
        x = x.transpose(0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), 2 * axes + 1)  # (N, H/p, W/p, p, p, C)
        return x.reshape(*x.shape[: axes + 1], -1) @ kernel.reshape(-1, kernel.shape[-1]) + bias  # (N, ..., C_out)


def normalise(x: Array, axes: tuple[int, ...], eps: float) -> Array:
    """x minus its mean over `axes`, divided by its standard deviation: float32. Two passes, as in torch."""
    x = x.astype(jnp.float32)
    x = x - x.mean(axes, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(axes, keepdims=True) + eps)


class LayerNorm(nnx.LayerNorm):
    """Layer norm, with learned scale and shift if `affine`."""

    def __init__(self, width: int, *, eps: float, affine: bool = True, rngs: nnx.Rngs):
        super().__init__(width, epsilon=eps, use_bias=affine, use_scale=affine, rngs=rngs)

    def __call__(self, x: Array) -> Array:  # type: ignore[override]  # without nnx's mask
        y = normalise(x, (-1,), self.epsilon)  # (..., C)
        if self.scale is not None and self.bias is not None:
            y = y * self.scale[...] + self.bias[...]  # (..., C)
        return y.astype(x.dtype)


class GroupNorm(nnx.GroupNorm):
    """Group norm over all positions, with scale and shift."""

    def __init__(self, channels: int, groups: int, *, eps: float, rngs: nnx.Rngs):
        super().__init__(channels, groups, epsilon=eps, rngs=rngs)

    def __call__(self, x: Array) -> Array:  # type: ignore[override]  # without nnx's mask
        y = x.reshape(x.shape[0], -1, self.num_groups, self.group_size)  # (N, T, G, C/G)
        y = normalise(y, (1, 3), self.epsilon).reshape(x.shape)  # (N, ..., C)
        assert self.scale is not None and self.bias is not None
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)  # (N, ..., C)


class Sequence(nnx.List):
    """Layers and functions that are applied one after another, numbered as in torch.nn.Sequential."""

    def __call__(self, x: Array) -> Array:
        for layer in self:
            x = layer(x)
        return x


def attend(q: Array, k: Array, v: Array) -> Array:
    """Scaled dot-product attention of arrays (N, tokens, heads, features of a head).

    k and v may have another number of tokens than q.
    """
    return jax.nn.dot_product_attention(q, k, v)  # (N, T, H, D/H)


def timestep_features(t: Array, features: int) -> Array:
    """Sinusoids of timesteps t (N,), integer or not: float32 (N, features), cosines first.

    Frequencies 10000^(-i / half) for i = 0 ... half - 1 (openai/guided-diffusion nn.py, timestep_embedding; DiT's too).
    """
    half = features // 2
    # As in torch, float32 exponents; exp is computed on the host in float64, so that its result has only the error of
    # rounding: at t = 999 an error of one unit in the last place changes the angle by 6e-5.
    exponents = np.float32(-math.log(10000)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)  # (half,)
    angles = t.astype(jnp.float32)[:, None] * frequencies  # (N, half)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)  # (N, features)


def upsample_nearest(x: Array) -> Array:
    """(N, H, W, C) -> (N, 2H, 2W, C), as torch's nearest interpolation by a factor of 2."""
    return x.repeat(2, axis=1).repeat(2, axis=2)


def average_pool(x: Array) -> Array:
    """(N, H, W, C) -> (N, H/2, W/2, C), the means of 2x2 cells, as torch's avg_pool2d."""
    n, h, w, c = x.shape
    return x.reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4))


def resize_bilinear(x: Array, size: tuple[int, int]) -> Array:
    """(N, h, w, C) -> (N, *size, C), as torch's bilinear interpolation with align_corners and antialias False.

    jax.image.resize is not used: by default it antialiases when it shrinks, and it multiplies by matrices.
    """
    for axis, outputs in enumerate(size, start=1):
        inputs = x.shape[axis]
        # The centres of the outputs, in units of the inputs' indices.
        position = (np.arange(outputs, dtype=np.float64) + 0.5) * (inputs / outputs) - 0.5
        position = np.clip(position, 0, inputs - 1)
        # Each output is interpolated between the inputs `low` and `high`.
        low = np.floor(position).astype(np.int32)
        high = np.minimum(low + 1, inputs - 1)
        fraction = (position - low).astype(np.float32)  # (outputs,)
        fraction = fraction.reshape(-1, *[1] * (x.ndim - 1 - axis))  # broadcasts along `axis`
        x = x.take(low, axis) * (1 - fraction) + x.take(high, axis) * fraction
    return x


def checkpointed(function: Callable[..., Array], module: nnx.Module, *inputs: Any) -> Array:
    """function(module, *inputs), with only the inputs stored for the backward pass, which computes the rest again.

    The function must not change the state of the module.
    """
    graph, state = nnx.split(module)  # jax.checkpoint takes functions of pytrees, so the weights become an argument

    def pure(state: nnx.State, *inputs: Any) -> Array:
        return function(nnx.merge(graph, state), *inputs)

    return jax.checkpoint(pure)(state, *inputs)


def set_compute_dtype(net: nnx.Module, dtype: Any | None) -> None:
    """Set, in place, the dtype in which linear layers and convolutions of `net` compute (None: that of the parameters).

    Parameters stay float32. Layers with `force_float32`, those of the timestep embedding, still compute in float32.
    """
    for _, module in nnx.iter_modules(net):
        if isinstance(module, (nnx.Linear, nnx.Conv)) and not getattr(module, "force_float32", False):
            module.dtype = dtype


def channels_last(x: Array) -> Array:
    """(N, C, H, W) -> (N, H, W, C)."""
    return x.transpose(0, 2, 3, 1)


def channels_first(x: Array) -> Array:
    """(N, H, W, C) -> (N, C, H, W)."""
    return x.transpose(0, 3, 1, 2)
