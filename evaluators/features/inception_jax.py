"""The 2015-12-05 Inception-v3 in JAX: the features of ADM's evaluator on every device that JAX supports, such as TPUs.

Layers: `inception_layers`; weights: `inception_graph`, folded as for torch; resize: as in `tf1_resize`. Only jax and
numpy are needed. Every product requests full float32 (`Precision.HIGHEST`): by default, TPUs multiply in bfloat16 and
GPUs in TF32.
"""

from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from evaluators.features import inception_layers as table
from evaluators.features.inception_graph import InceptionWeights, extract_in_batches, missing_weights, read_weights
from evaluators.features.spec import Features, FeatureSpec
from evaluators.features.tf1_resize import axis_table
from harness.errors import UserError

# Largest difference from torch with the same weights, relative to the root mean square of each stage.
TOLERANCES = {"resize": 0.0, "pooled": 5e-4, "spatial": 5e-4, "logits": 5e-4}
# Largest difference of suite adm's metrics; precision and recall with 100 samples, of which two may change sides.
METRIC_TOLERANCES = {
    "fid": {"rel": 1e-4},
    "sfid": {"rel": 1e-4},
    "is": {"rel": 1e-4},
    "precision": {"abs": 0.02},
    "recall": {"abs": 0.02},
}

Parameters = dict[str, tuple[Array, Array]]  # by scope: kernel (height, width, in, out) and bias (out,)

_EXACT = lax.Precision.HIGHEST


# Preprocessing --------------------------------------------------------------------------------------------------------
#
# first + (last - first) * weight must round its product before the sum, as TensorFlow does. Within one compiled function
# XLA fuses both into one multiply-add on a CPU, which changes the last bit of every eighth pixel, even with
# `optimization_barrier` or `reduce_precision` between them. XLA never fuses across two compiled functions, so each of
# the two sums below is in a different function than its product.


@jax.jit
def _x_terms(images: Array, lo: Array, hi: Array, f: Array) -> tuple[Array, Array]:
    """Both terms of the interpolation along x: the left pixels, and the difference to the right ones times f."""
    left, right = (images[:, :, index].astype(jnp.float32) for index in (lo, hi))  # (N, H, 299, C)
    return left, (right - left) * f[:, None]


@jax.jit
def _y_terms(left: Array, product: Array, lo: Array, hi: Array, f: Array) -> tuple[Array, Array]:
    """Both terms of the interpolation along y, from those of `_x_terms`, which it adds first."""
    wide = left + product  # (N, H, 299, C)
    top, bottom = wide[:, lo], wide[:, hi]  # (N, 299, 299, C)
    return top, (bottom - top) * f[:, None, None]


@jax.jit
def _sum(top: Array, product: Array) -> Array:
    return top + product


@jax.jit
def _normalise(pixels: Array) -> Array:
    """(x - 128) / 128 with three channels: (N, H, W, 1 or 3) -> (N, H, W, 3)."""
    x = (pixels - 128.0) * 0.0078125  # 1 / 128, exact in float32
    return jnp.broadcast_to(x, (*x.shape[:3], 3))


@lru_cache(maxsize=64)
def _axis(size: int, device: jax.Device) -> tuple[Array, Array, Array]:
    """The arrays of `axis_table` on a device, with indices as int32."""
    low, high, fraction = axis_table(size)
    return (
        jax.device_put(low.astype(np.int32), device),
        jax.device_put(high.astype(np.int32), device),
        jax.device_put(fraction, device),
    )


def resize(images: Array) -> Array:
    """uint8 or float32 (N, H, W, C) -> float32 (N, 299, 299, C) in the unit of the input, on the same device."""
    (device,) = images.devices()
    left, product = _x_terms(images, *_axis(images.shape[2], device))
    return _sum(*_y_terms(left, product, *_axis(images.shape[1], device)))


def preprocess(images: Array) -> Array:
    """uint8 (N, H, W, C), C 1 or 3 -> float32 (N, 299, 299, 3), (x - 128) / 128."""
    return _normalise(resize(images))


# The network ----------------------------------------------------------------------------------------------------------


def _convolve(x: Array, conv: table.Conv, parameters: Parameters) -> Array:
    """Convolution and ReLU."""
    kernel, bias = parameters[conv.scope]
    # XLA's CPU convolution takes four times as long if it has neither padding nor stride: pad, then crop the border.
    cropped = conv.stride == 1 and not conv.same and conv.kernel != (1, 1)
    y = lax.conv_general_dilated(
        x, kernel, (conv.stride, conv.stride), "SAME" if conv.same or cropped else "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=_EXACT,
    )  # fmt: skip
    if cropped:
        y = y[:, 1:-1, 1:-1]  # all kernels of this kind are 3x3
    return jnp.maximum(y + bias, 0)  # (N, H / stride, W / stride, out)


def _pool(x: Array, pool: table.Pool) -> Array:
    """Maximum or average over windows; averages leave the padding out."""
    size, strides = (1, pool.kernel, pool.kernel, 1), (1, pool.stride, pool.stride, 1)
    padding = "SAME" if pool.same else "VALID"
    if not pool.average:
        return lax.reduce_window(x, -np.inf, lax.max, size, strides, padding)  # (N, H / stride, W / stride, C)
    ones = np.ones((1, *x.shape[1:3], 1), np.float32)
    count = lax.reduce_window(ones, np.float32(0), lax.add, size, strides, padding)  # pixels without the padding
    return lax.reduce_window(x, np.float32(0), lax.add, size, strides, padding) / count  # (N, H, W, C)


def _run(x: Array, layers: Sequence[table.Conv | table.Pool | table.Join], parameters: Parameters) -> Array:
    """The output of consecutive layers."""
    for layer in layers:
        if isinstance(layer, table.Conv):
            x = _convolve(x, layer, parameters)
        elif isinstance(layer, table.Pool):
            x = _pool(x, layer)
        else:
            x = jnp.concatenate([_run(x, branch, parameters) for branch in layer.branches], axis=3)
    return x


@jax.jit
def network(x: Array, parameters: Parameters, classifier: Array) -> tuple[Array, Array, Array]:
    """Pooled (N, 2048), spatial (N, 2023) and logits (N, 1008) of normalised images float32 (N, 299, 299, 3).

    classifier: float32 (2048, 1008).
    """
    h = _run(x, table.STEM, parameters)  # (N, 35, 35, 192)
    for scope, block in table.BLOCKS.items():
        h = _run(h, (block,), parameters)  # (N, 35, 35, C), from mixed_3 on 17 x 17, from mixed_8 on 8 x 8
        if scope == "mixed_6":  # mixed_6/conv is the block's first branch; channels are the last axis already
            spatial = h[..., : table.SPATIAL_CHANNELS].reshape(-1, table.SPATIAL)  # (N, 17 * 17 * 7)
    pooled = h.mean(axis=(1, 2))  # (N, 2048)
    return pooled, spatial, jnp.dot(pooled, classifier, precision=_EXACT)


class InceptionFeatures:
    """The extractor; see `evaluators.features.FeatureExtractor` for the contract.

    All batches have `batch_size` images, the last one padded, so that the network is compiled once and an image's
    features do not depend on the number of images. found, known: as in `InceptionWeights`.
    """

    def __init__(
        self, spec: FeatureSpec, weights: InceptionWeights, device: str = "cpu", batch_size: int | None = None
    ):
        self.name, self.dim = spec.name, spec.dim
        self.sha256, self.found, self.known = weights.sha256, weights.found, weights.known
        self.description = f"{spec.description}; JAX {jax.__version__}; {weights.found}"
        self.device = pick_device(device)
        self.batch_size = batch_size or (16 if self.device.platform == "cpu" else 128)
        self.put = partial(jax.device_put, device=self.device)
        self.parameters: Parameters = {}
        for scope, layer in weights.layers.items():
            kernel, bias = layer.folded()
            self.parameters[scope] = self.put(kernel), self.put(bias)
        self.classifier = self.put(np.ascontiguousarray(weights.classifier))

    def _forward(self, batch: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pooled, spatial and logits of a batch uint8 (n, H, W, C), n <= batch_size; it is padded with black images."""
        count = len(batch)
        if count < self.batch_size:
            batch = np.concatenate([batch, np.zeros((self.batch_size - count, *batch.shape[1:]), batch.dtype)])
        pooled, spatial, logits = network(preprocess(self.put(batch)), self.parameters, self.classifier)
        return np.asarray(pooled)[:count], np.asarray(spatial)[:count], np.asarray(logits)[:count]

    def __call__(self, images: np.ndarray) -> Features:
        return extract_in_batches(self.name, images, self.batch_size, self._forward)


def pick_device(name: str) -> jax.Device:
    """The device of a name such as cpu, cuda, cuda:1 or tpu. Raises UserError if JAX does not have it."""
    platform, _, index = name.partition(":")
    try:
        return jax.devices(platform)[int(index or 0)]
    except (RuntimeError, IndexError, ValueError) as error:
        platforms = sorted({available.platform for available in jax.devices()} | {"cpu"})
        raise UserError(
            f"JAX {jax.__version__} has no device {name!r} here: give --device {' or '.join(platforms)}, or install JAX"
            " for that device (pip install jax[cuda13] or jax[tpu])"
        ) from error


def load(
    spec: FeatureSpec, device: str = "cpu", weights: Path | None = None, entry: str | None = None
) -> InceptionFeatures:
    """The loader of the FeatureSpec. weights: the frozen graph or its torch port; entry: of the port."""
    if weights is None:
        raise missing_weights(spec.name)
    return InceptionFeatures(spec, read_weights(weights, entry), device)
