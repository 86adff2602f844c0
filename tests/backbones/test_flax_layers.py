"""The layers of the Flax networks against torch."""

import zlib

import numpy as np
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("flax", reason="JAX is not installed")

import jax
import jax.numpy as jnp
from flax import nnx

from backbones import flax_layers
from backbones.torch_layers import timestep_features
from backbones.unet.flax_unet import GatedGelu


@pytest.fixture(autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def numbers(name, *shape):
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)


def test_timestep_features():
    t = np.array([0, 1, 3.5, 500, 999], np.float32)
    theirs = timestep_features(torch.from_numpy(t), 64)
    ours = flax_layers.timestep_features(jnp.asarray(t), 64)
    # One of torch's frequencies is a unit in the last place off: up to 6e-8 of the angle.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=7e-5)
    assert (np.abs(ours - theirs.numpy()).max(axis=0) > 1e-6).sum() <= 2


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (3, 4), (2, 2), (12, 1)])
def test_stretched_is_torchs_bilinear_interpolation(size):
    x = numbers("x", 2, 3, 3, 4)
    theirs = F.interpolate(torch.from_numpy(x), size, mode="bilinear", align_corners=False)
    ours = flax_layers.resize_bilinear(flax_layers.channels_last(jnp.asarray(x)), size)
    np.testing.assert_allclose(flax_layers.channels_first(ours), theirs, rtol=0, atol=1e-6)


def test_upsample_nearest_and_average_pool():
    x = numbers("x", 2, 3, 4, 6)
    ours = flax_layers.channels_last(jnp.asarray(x))
    nearest = F.interpolate(torch.from_numpy(x), scale_factor=2, mode="nearest")
    np.testing.assert_array_equal(flax_layers.channels_first(flax_layers.upsample_nearest(ours)), nearest)
    mean = F.avg_pool2d(torch.from_numpy(x), 2)
    np.testing.assert_allclose(flax_layers.channels_first(flax_layers.average_pool(ours)), mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("offset", [0, 10])
def test_normalisations(offset):
    """With a mean far from 0, for which a one-pass variance would be wrong."""
    x = numbers("x", 2, 64, 3, 3) * 0.01 + offset
    ours = flax_layers.channels_last(jnp.asarray(x))
    norm = flax_layers.GroupNorm(64, 32, eps=1e-5, rngs=nnx.Rngs(0))
    theirs = F.group_norm(torch.from_numpy(x).double(), 32, eps=1e-5).float()
    np.testing.assert_allclose(flax_layers.channels_first(norm(ours)), theirs, rtol=0, atol=3e-4)
    assert norm(ours.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    norm = flax_layers.LayerNorm(64, eps=1e-6, rngs=nnx.Rngs(0))
    tokens = torch.from_numpy(x).permute(0, 2, 3, 1)
    theirs = F.layer_norm(tokens.double(), (64,), eps=1e-6).float()
    np.testing.assert_allclose(norm(ours), theirs, rtol=0, atol=3e-4)
    assert norm(ours.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_gelu_is_the_exact_form():
    layer = GatedGelu(1, 1, nnx.Rngs(0))
    gate = np.linspace(-4, 4, 101, dtype=np.float32)
    layer.proj.kernel.set_value(jnp.array([[0.0, 1.0]]))  # the first half is gated, the second gates
    layer.proj.bias.set_value(jnp.array([1.0, 0.0]))
    exact = F.gelu(torch.from_numpy(gate))
    np.testing.assert_allclose(layer(jnp.asarray(gate)[None, :, None]).reshape(-1), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(2, 2, 0), (1, 1, 0), (3, 2, 1), (3, 1, 1)])
def test_convolutions(kernel, stride, padding):
    x, weight, bias = numbers("x", 2, 3, 4, 6), numbers("w", 5, 3, kernel, kernel), numbers("b", 5)
    conv = flax_layers.Conv(3, 5, kernel, stride=stride, padding=padding, rngs=nnx.Rngs(0))
    conv.kernel.set_value(jnp.asarray(weight.transpose(2, 3, 1, 0)))
    conv.bias.set_value(jnp.asarray(bias))
    theirs = F.conv2d(*map(torch.from_numpy, (x, weight, bias)), stride=stride, padding=padding)
    ours = conv(jnp.asarray(x.transpose(0, 2, 3, 1)))
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1), rtol=0, atol=1e-5)
