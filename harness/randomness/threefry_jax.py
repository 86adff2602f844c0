"""Threefry-2x32 for JAX arrays, traced or not: the functions of `threefry_numpy`, with the same numbers.

Bits, uniforms and integers equal numpy's; normals are within 1e-6 of them (float32 elementary functions). By default JAX
has 32-bit integers only, so a 64-bit index or step is a pair of words, `Words`, which `words` makes on the host. A step
may also be an int. Seeds, and steps that are ints, must be known at tracing time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from harness.randomness import threefry_numpy as reference
from harness.randomness.threefry_numpy import PARITY, ROTATIONS, Purpose


class Words(NamedTuple):
    """64-bit integers as two uint32 arrays of the same shape."""

    high: Array | np.ndarray
    low: Array | np.ndarray


def words(value: int | Sequence[int] | np.ndarray) -> Words:
    """Integers 0 <= . < 2**63 of any shape as `Words` of numpy arrays. Called on the host, not on traced arrays."""
    return Words(*reference._split64(value))


def threefry2x32(key0: Array, key1: Array, counter0: Array, counter1: Array) -> tuple[Array, Array]:
    """The 20-round block function on uint32 arrays that broadcast. Returns two uint32 arrays of the broadcast shape."""
    keys = (key0, key1, key0 ^ key1 ^ np.uint32(PARITY))
    x0, x1 = counter0 + key0, counter1 + key1
    for group in range(5):
        for rotation in ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = (x1 << np.uint32(rotation)) | (x1 >> np.uint32(32 - rotation))
            x1 = x1 ^ x0
        x0 = x0 + keys[(group + 1) % 3]
        x1 = x1 + keys[(group + 2) % 3] + np.uint32(group + 1)
    return x0, x1


def bits(seed: int, purpose: Purpose, index: Words, step: int | Words, count: int) -> Array:
    """Random words: uint32 (N, count) for index (N,). step: one for all, or (N,). Ranges and errors as in numpy."""
    return _first_elements(jnp.stack(_blocks(seed, purpose, index, step, count), axis=-1), count)


def uniform(seed: int, purpose: Purpose, index: Words, step: int | Words, shape: Sequence[int] = ()) -> Array:
    """Uniform numbers in [0, 1): float32 (N, *shape), equal to numpy's."""
    return _unit(bits(seed, purpose, index, step, math.prod(shape))).reshape(-1, *shape)


def normal(seed: int, purpose: Purpose, index: Words, step: int | Words, shape: Sequence[int]) -> Array:
    """Standard normal numbers: float32 (N, *shape), within 1e-6 of numpy's."""
    count = math.prod(shape)
    x0, x1 = _blocks(seed, purpose, index, step, count)  # (N, B)
    radius = jnp.sqrt(-2.0 * jnp.log(_unit(x0) + np.float32(2.0**-24)))  # exact: a 24-bit integer plus one, scaled
    angle = _unit(x1) * np.float32(2 * math.pi)
    pairs = jnp.stack([radius * jnp.cos(angle), radius * jnp.sin(angle)], axis=-1)  # (N, B, 2)
    return _first_elements(pairs, count).reshape(-1, *shape)


def integers(seed: int, purpose: Purpose, index: Words, step: int | Words, high: int) -> Array:
    """One integer in [0, high) for each index: int32 (N,), equal to numpy's. 1 <= high <= 2**31."""
    reference._check_high(high)
    upper, lower = bits(seed, purpose, index, step, 2).T  # (N,) each
    # The highest 32 of the 96 bits of (upper 2**32 + lower) x high.
    product_high, product_low = _product(upper, high)
    total = product_low + _product(lower, high)[0]
    carry = total < product_low  # the sum has overflowed 32 bits
    return (product_high + carry).astype(jnp.int32)


def _product(x: Array, factor: int) -> tuple[Array, Array]:
    """High and low word of the 64-bit product of uint32 x and a factor of at most 2**31, from halves of 16 bits."""
    mask, half = np.uint32(0xFFFF), np.uint32(16)
    f0, f1 = np.uint32(factor & 0xFFFF), np.uint32(factor >> 16)
    x0, x1 = x & mask, x >> half
    # The two middle products are added one after the other, so that no sum reaches 2**32: (2**16 - 1)**2 + 2**16 - 1.
    middle = x1 * f0 + (x0 * f0 >> half)
    second_middle = x0 * f1 + (middle & mask)
    high = x1 * f1 + (middle >> half) + (second_middle >> half)
    return high, x * np.uint32(factor)  # uint32 keeps the low word


def _unit(x: Array) -> Array:
    """The upper 24 bits as float32 in [0, 1)."""
    return (x >> np.uint32(8)).astype(jnp.float32) * np.float32(2.0**-24)


def _first_elements(pairs: Array, count: int) -> Array:
    """The first `count` numbers of each sample: (N, count), from the two numbers of each of B blocks, (N, B, 2)."""
    return pairs.reshape(len(pairs), 2 * pairs.shape[1])[:, :count]


def _blocks(seed: int, purpose: Purpose, index: Words, step: int | Words, count: int) -> tuple[Array, Array]:
    """Word 0 and word 1 of the first B = ceil(count / 2) blocks of each sample: uint32 (N, B) each."""
    reference._check_count(count)
    step = words(reference._checked_step(step)) if isinstance(step, int) else step
    seed_high, seed_low = (jnp.asarray(word) for word in reference._split64(reference._checked_seed(seed)))
    step_high, step_low = (jnp.asarray(word).reshape(-1) for word in step)  # (1,) or (N,)
    purpose_key = threefry2x32(seed_high, seed_low, jnp.uint32(purpose), step_high)
    key0, key1 = threefry2x32(*purpose_key, jnp.asarray(index.high), jnp.asarray(index.low))  # (N,)
    block = jnp.arange((count + 1) // 2, dtype=jnp.uint32)  # (B,)
    return threefry2x32(key0[:, None], key1[:, None], block, step_low[:, None])
