"""Where a training example comes from: by position in the stream, the same in both frameworks."""

import jax.numpy as jnp
import numpy as np
import torch

from harness.data.digits import load
from harness.data.epoch_sampler import EpochSampler
from harness.randomness import Purpose, uniform


def no_noise(shape):
    raise AssertionError("pixels draw nothing")


def test_images_are_mirrored_by_position_and_scaled_alike_in_both_frameworks():
    data = load()
    positions = np.arange(2 * len(data) - 3, 2 * len(data) + 9)  # over the end of an epoch
    stream, plain = EpochSampler(7, data, flip=True), EpochSampler(7, data, flip=False)
    (stored, labels), rows = stream.take(positions), plain.rows(positions)
    mirrored = uniform(7, Purpose.FLIP, positions, 0) < 0.5
    assert 0 < mirrored.sum() < len(positions)
    expected = np.where(mirrored[:, None, None, None], data.images[rows][:, :, ::-1], data.images[rows])
    np.testing.assert_array_equal(stored, expected)
    np.testing.assert_array_equal(labels, data.labels[rows])
    np.testing.assert_array_equal(plain.take(positions)[0], data.images[rows])

    x0 = data.to_model_input(torch.from_numpy(stored), no_noise)
    assert x0.shape == (12, 1, 8, 8) and x0.dtype == torch.float32
    by_hand = expected.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(127.5) - 1
    np.testing.assert_array_equal(x0.numpy(), by_hand)
    in_jax = data.to_model_input(jnp.asarray(stored), no_noise)
    assert in_jax.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(in_jax), by_hand, atol=1e-7)  # XLA divides by multiplying
