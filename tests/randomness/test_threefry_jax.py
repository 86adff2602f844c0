"""The counter-based generator in jax: goldens, equality with numpy's traced and not, independence of the batch."""

import jax
import numpy as np
import pytest
from test_threefry import GOLDEN, KNOWN_ANSWERS, SEED, compute

from harness.errors import UserError
from harness.randomness import Purpose, threefry_jax, threefry_numpy
from harness.randomness.threefry_jax import Words, words


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_known_answers(counter, key, result):
    found = threefry_jax.threefry2x32(*(np.array([w], np.uint32) for w in (*key, *counter)))
    assert [w.dtype for w in found] == [np.uint32, np.uint32]
    assert tuple(int(w[0]) for w in found) == result


def test_golden():
    rows = compute(threefry_jax, lambda index: words(np.array(index)))
    assert len(rows) == len(GOLDEN["cases"])
    for row, golden in zip(rows, GOLDEN["cases"], strict=True):
        np.testing.assert_allclose(row.pop("normal"), golden["normal"], rtol=0, atol=1e-6)
        assert row == {name: value for name, value in golden.items() if name != "normal"}


@pytest.mark.parametrize("steps", ["one", "one for each", "traced"])
def test_equals_numpy(steps):
    index = np.arange(100) * 2**33 + 11
    step = {"one": 3, "one for each": np.arange(100)[::-1] + 2**32, "traced": 2**34 + 7}[steps]
    shape = (5, 3, 3)
    where = (SEED, Purpose.STEP_NOISE)
    given = step if steps == "one" else words(step)

    def traced(function):
        if steps == "traced":
            return jax.jit(lambda index, step: function(*where, index, step))(words(index), given)
        return jax.jit(lambda index: function(*where, index, given))(words(index))

    bits = traced(lambda *a: threefry_jax.bits(*a, 45))
    assert bits.dtype == np.uint32 and bits.shape == (100, 45)
    np.testing.assert_array_equal(bits, threefry_numpy.bits(*where, index, step, 45))
    unit = traced(lambda *a: threefry_jax.uniform(*a, shape))
    assert unit.dtype == np.float32 and unit.shape == (100, *shape)
    np.testing.assert_array_equal(unit, threefry_numpy.uniform(*where, index, step, shape))
    z, expected = traced(lambda *a: threefry_jax.normal(*a, shape)), threefry_numpy.normal(*where, index, step, shape)
    assert z.dtype == np.float32 and z.shape == expected.shape
    np.testing.assert_allclose(z, expected, rtol=0, atol=1e-6)
    for high in (10, 2**16 + 1, 2**31):
        drawn = traced(lambda *a, high=high: threefry_jax.integers(*a, high))
        assert drawn.dtype == np.int32 and drawn.shape == (100,)
        np.testing.assert_array_equal(drawn, threefry_numpy.integers(*where, index, step, high))


def test_a_million_normals_lie_within_the_tolerance():
    index = np.arange(10_000)
    z = threefry_jax.normal(SEED, Purpose.TRAINING_NOISE, words(index), 0, (100,))
    assert np.abs(z - threefry_numpy.normal(SEED, Purpose.TRAINING_NOISE, index, 0, (100,))).max() < 1e-6


def test_sample_does_not_know_its_batch():
    def draw(rows):
        return np.asarray(threefry_jax.normal(SEED, Purpose.STEP_NOISE, words(rows), 5, (3, 9)))

    whole, order = draw(np.arange(64)), np.random.default_rng(0).permutation(64)
    np.testing.assert_array_equal(draw(order), whole[order])
    np.testing.assert_array_equal(np.concatenate([draw(np.arange(i, i + 1)) for i in range(64)]), whole)


def test_bad_arguments():
    index = words(np.arange(2))
    for seed in (-1, 2**64):
        with pytest.raises(UserError, match="seed"):
            threefry_jax.bits(seed, Purpose.FLIP, index, 0, 1)
    for step in (-1, 2**63):
        with pytest.raises(UserError, match="step"):
            threefry_jax.bits(0, Purpose.FLIP, index, step, 1)
    for high in (0, 2**31 + 1):
        with pytest.raises(UserError, match="upper bound"):
            threefry_jax.integers(0, Purpose.FLIP, index, 0, high)
    with pytest.raises(TypeError, match="integers"):
        words(np.arange(2.0))
    assert isinstance(index, Words) and index.low.dtype == np.uint32
