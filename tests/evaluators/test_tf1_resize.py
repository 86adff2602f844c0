"""TensorFlow 1's bilinear resize: bit-equal to TensorFlow's results, and to a computation pixel by pixel."""

import hashlib

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from evaluators.features import inception_jax
from evaluators.features.tf1_resize import SIDE, axis_table, resize_numpy, resize_torch

# Measured with TensorFlow 2.21 on a CPU: first 12 digits of the SHA-1 of the float32 result for
# RandomState(n).randint(0, 256, (1, n, n, 3)).
GOLDENS = {
    32: "be813ba04bb1",
    64: "7c627085c38f",
    128: "dc32bbb519bc",
    256: "7acf917bd2ed",
    299: "2e18f1647976",
    512: "d2d9fe3bb55d",
}


def by_numpy(images):
    return resize_numpy(images)


def by_torch(images):
    return resize_torch(torch.from_numpy(images)).numpy()


def by_jax(images):
    return np.asarray(inception_jax.resize(jnp.asarray(images)))


def noise(n):
    return np.random.RandomState(n).randint(0, 256, (1, n, n, 3)).astype(np.uint8)


@pytest.mark.parametrize("resize", [by_numpy, by_torch, by_jax])
@pytest.mark.parametrize("size", GOLDENS)
def test_bits_are_tensorflows(size, resize):
    out = resize(noise(size))
    assert out.shape == (1, SIDE, SIDE, 3) and out.dtype == np.float32
    assert hashlib.sha1(out.tobytes()).hexdigest()[:12] == GOLDENS[size]


@pytest.mark.parametrize("resize", [by_numpy, by_torch, by_jax])
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (700, 3), (299, 40)])
def test_recipe_pixel_by_pixel(shape, resize):
    image = np.random.default_rng(0).integers(0, 256, (1, *shape, 1), dtype=np.uint8)
    out = resize(image)[0, :, :, 0]
    one = np.float32

    def place(i, size):
        position = one(i) * one(size / 299)
        low = int(np.floor(position))
        return low, min(low + 1, size - 1), one(position - one(low))

    value = image[0, :, :, 0].astype(np.float32)
    for y, x in np.random.default_rng(1).integers(0, 299, (200, 2)):
        (up, down, fy), (left, right, fx) = place(y, shape[0]), place(x, shape[1])
        top = one(value[up, left] + one(one(value[up, right] - value[up, left]) * fx))
        bottom = one(value[down, left] + one(one(value[down, right] - value[down, left]) * fx))
        assert out[y, x] == one(top + one(one(bottom - top) * fy))


def test_native_size_is_untouched_and_not_shared():
    image = noise(299)
    for resize in (by_numpy, by_torch, by_jax):
        np.testing.assert_array_equal(resize(image), image.astype(np.float32))
    floats = torch.from_numpy(image).float()
    resize_torch(floats).zero_()
    np.testing.assert_array_equal(floats.numpy(), image)


def test_an_image_does_not_know_its_batch():
    images = np.random.default_rng(2).integers(0, 256, (7, 40, 52, 3), dtype=np.uint8)
    whole = resize_numpy(images)
    for resize in (by_torch, by_jax):
        np.testing.assert_array_equal(resize(images), whole)
    np.testing.assert_array_equal(np.concatenate([resize_numpy(images[i : i + 1]) for i in range(7)]), whole)
    assert resize_numpy(images[:0]).shape == (0, SIDE, SIDE, 3)


def test_it_is_not_the_half_pixel_rule():
    image = noise(64)
    other = torch.nn.functional.interpolate(torch.from_numpy(image).permute(0, 3, 1, 2).float(), SIDE, mode="bilinear")
    assert np.abs(other.permute(0, 2, 3, 1).numpy() - resize_numpy(image)).max() > 10


def test_tables_are_made_once():
    assert axis_table(123) is axis_table(123)
