"""Threefry-2x32 with 20 rounds in numpy: the reference for the implementations in torch and JAX.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); constants as in Random123's threefry.h.

Key schedule, three applications of the block function E(key, counter), all words uint32:

    purpose key = E((seed >> 32, seed), (purpose, step >> 32))
    sample key  = E(purpose key, (index >> 32, index))
    word 2b, 2b+1 = E(sample key, (b, step))

E is a bijection of its counter, so within one seed and purpose two different (index, step) below 2**32 steps can
never read the same block, for any 64-bit index and up to 2**33 words; steps from 2**32 on, other purposes and
other seeds change the key by a hash (a chance of 2**-64 for each pair of keys).
The two words of a block are adjacent, so a shorter draw is a prefix of a longer one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike

from harness.errors import UserError

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))  # Random123 threefry.h, R_32x2; alternate every 4 rounds
PARITY = 0x1BD11BDA  # third key word is key0 ^ key1 ^ PARITY (SKEIN_KS_PARITY32)
MAX_WORDS = 2**33  # a 32-bit block counter, two words a block
MAX_INTEGER = 2**31  # bound of `integers`: word * high must stay below 2**63
_MASK = 0xFFFFFFFF


class Purpose(IntEnum):
    """The use of a random number. These values are part of every recorded experiment: never change or reuse one."""

    INITIAL_NOISE = 1  # x_T of sample `index`
    STEP_NOISE = 2  # noise of sample `index` at plan step `step`
    TRAINING_NOISE = 3  # epsilon of the training example
    TIMESTEP = 4  # diffusion timestep of the training example
    FLIP = 5  # horizontal flip of the training example
    POSTERIOR = 6  # draw from the autoencoder's posterior
    LABEL_DROPOUT = 7  # label replaced by the null label
    NETWORK_DROPOUT = 8  # dropout inside a network
    DATA_ORDER = 9  # order of the data set in an epoch
    SAMPLE_LABEL = 10  # class label of sample `index`
    INITIALISATION = 11  # initial weights
    EVALUATION = 12  # subsets and splits of metrics
    CONDITIONING_NOISE = 13  # noise on the low-resolution input of an upsampler
    CONDITIONING_LEVEL = 14  # its standard deviation for the training example
    UPSAMPLER_NOISE = 15  # x_T and step noise of an upsampler of a cascade
    END_TIME = 16  # end of the step of the training example, for networks of two times


def threefry2x32(
    key0: np.ndarray,  # uint32, any shape
    key1: np.ndarray,  # uint32, broadcasts with key0
    counter0: np.ndarray,  # uint32, broadcasts with the key
    counter1: np.ndarray,  # uint32
) -> tuple[np.ndarray, np.ndarray]:
    """The 20-round block function. Returns two uint32 arrays of the broadcast shape (at least one-dimensional)."""
    key0, key1, counter0, counter1 = (
        np.atleast_1d(np.asarray(a, dtype=np.uint32)) for a in (key0, key1, counter0, counter1)
    )
    keys = (key0, key1, key0 ^ key1 ^ np.uint32(PARITY))
    shape = np.broadcast_shapes(key0.shape, key1.shape, counter0.shape, counter1.shape)
    x0 = np.empty(shape, np.uint32)
    x1 = np.empty(shape, np.uint32)
    high = np.empty(shape, np.uint32)  # the bits of x1 that a rotation moves to the low end
    np.add(counter0, key0, out=x0)
    np.add(counter1, key1, out=x1)
    for group in range(5):
        for rotation in ROTATIONS[group % 2]:
            x0 += x1
            np.right_shift(x1, np.uint32(32 - rotation), out=high)
            x1 <<= np.uint32(rotation)
            x1 |= high
            x1 ^= x0
        x0 += keys[(group + 1) % 3]
        x1 += keys[(group + 2) % 3]
        x1 += np.uint32(group + 1)
    return x0, x1


def bits(seed: int, purpose: Purpose, index: ArrayLike, step: ArrayLike, count: int) -> np.ndarray:
    """Random words: uint32 (N, count).

    seed: 0 <= seed < 2**64. index: integers (N,). step: one int or integers (N,). Both are 0 <= . < 2**63; the values of
    arrays are not checked. Raises UserError for a seed, step or count out of range, TypeError for arrays that are not
    integers.
    """
    x0, x1 = _blocks(seed, purpose, index, step, count)
    words = np.empty((*x0.shape, 2), np.uint32)  # (N, B, 2)
    words[..., 0] = x0
    words[..., 1] = x1
    return _first_elements(words, count)


def uniform(seed: int, purpose: Purpose, index: ArrayLike, step: ArrayLike, shape: Sequence[int] = ()) -> np.ndarray:
    """Uniform numbers in [0, 1): float32 (N, *shape), multiples of 2**-24. Arguments and errors as in `bits`."""
    words = bits(seed, purpose, index, step, math.prod(shape))
    return ((words >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)).reshape(len(words), *shape)


def normal(seed: int, purpose: Purpose, index: ArrayLike, step: ArrayLike, shape: Sequence[int]) -> np.ndarray:
    """Standard normal numbers: float32 (N, *shape), by Box and Muller. Arguments and errors as in `bits`.

    From words w0, w1 of a block: u1 = ((w0 >> 8) + 1) 2**-24 in (0, 1], angle = float32(2 pi) * ((w1 >> 8) 2**-24)
    in float32; the two numbers are sqrt(-2 ln u1) times cos(angle) and sin(angle). Largest magnitude: 5.77.
    """
    count = math.prod(shape)
    x0, x1 = _blocks(seed, purpose, index, step, count)  # (N, B)
    u1 = ((x0 >> np.uint32(8)) + np.uint32(1)).astype(np.float32) * np.float32(2.0**-24)
    angle = (x1 >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24) * np.float32(2 * math.pi)
    # The elementary functions are computed in float64 and rounded once, so that the bits do not depend on numpy's SIMD path.
    radius = np.sqrt(-2.0 * np.log(u1.astype(np.float64)))
    angle = angle.astype(np.float64)
    out = np.empty((*x0.shape, 2), np.float32)
    out[..., 0] = radius * np.cos(angle)
    out[..., 1] = radius * np.sin(angle)
    return _first_elements(out, count).reshape(len(out), *shape)


def integers(seed: int, purpose: Purpose, index: ArrayLike, step: ArrayLike, high: int) -> np.ndarray:
    """One integer in [0, high) for each index: int64 (N,). Raises UserError for high outside 1 ... 2**31.

    floor(w high / 2**64) of a 64-bit word w (multiply-shift): the probabilities of two values differ by at most a factor
    of 1 + 2**-33.
    """
    _check_high(high)
    words = bits(seed, purpose, index, step, 2).astype(np.int64)  # (N, 2)
    return (words[:, 0] * high + ((words[:, 1] * high) >> 32)) >> 32


def permutation(seed: int, purpose: Purpose, epoch: int, n: int) -> np.ndarray:
    """The order of n items in an epoch: a permutation of 0 ... n - 1, int64 (n,).

    It is the stable argsort of n random 64-bit words (index = epoch, step = 0).
    """
    words = bits(seed, purpose, [epoch], 0, 2 * n).reshape(n, 2).astype(np.uint64)
    return np.argsort((words[:, 0] << np.uint64(32)) | words[:, 1], kind="stable").astype(np.int64)


def _first_elements(pairs: np.ndarray, count: int) -> np.ndarray:
    """The first `count` numbers of each sample: (N, count), from the two numbers of each of B blocks, (N, B, 2)."""
    return pairs.reshape(len(pairs), 2 * pairs.shape[1])[:, :count]


def _blocks(
    seed: int, purpose: Purpose, index: ArrayLike, step: ArrayLike, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Word 0 and word 1 of the first B = ceil(count / 2) blocks of each sample: uint32 (N, B) each."""
    _check_count(count)
    key0, key1, step_low = _sample_keys(seed, purpose, index, step)
    return threefry2x32(key0, key1, np.arange((count + 1) // 2, dtype=np.uint32), step_low)


def _sample_keys(
    seed: int, purpose: Purpose | np.ndarray, index: ArrayLike, step: ArrayLike
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Word 0 and word 1 of the sample keys, and the low word of step: uint32 (N, 1) each.

    purpose: one for all samples, or uint32 (N,).
    The high word of step is in the sample key; the low word is left for the counter (key schedule in the file's head).
    """
    step = np.asarray(_checked_step(step) if isinstance(step, int) else step)
    index = np.asarray(index)
    if index.ndim != 1 or step.shape not in ((), index.shape):
        raise TypeError(f"index must be (N,) and step an int or (N,), got {index.shape} and {step.shape}")
    step_high, step_low = _split64(step)
    purpose_key = threefry2x32(*_split64(_checked_seed(seed)), np.asarray(purpose, np.uint32), step_high)
    key0, key1 = threefry2x32(*purpose_key, *_split64(index))
    return key0[:, None], key1[:, None], np.broadcast_to(step_low.reshape(-1, 1), (len(index), 1))


def _split64(value: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """High and low word of 64-bit integers: uint32 arrays of the same shape."""
    value = np.asarray(value)
    if value.dtype.kind not in "iu":
        raise TypeError(f"index and step must be integers, got {value.dtype}")
    value = value.astype(np.uint64)
    return (value >> np.uint64(32)).astype(np.uint32), (value & np.uint64(_MASK)).astype(np.uint32)


def _checked_seed(seed: int) -> np.uint64:
    """`seed` as a uint64, which `_split64` takes. Raises UserError if it is out of range."""
    if not 0 <= seed < 2**64:
        raise UserError(f"seed {seed} is out of range: give an integer from 0 to 2**64 - 1")
    return np.uint64(seed)


def _checked_step(step: int) -> int:
    """`step` as it is. Raises UserError if it is out of range."""
    if not 0 <= step < 2**63:
        raise UserError(f"random step {step} is out of range: give an integer from 0 to 2**63 - 1")
    return step


def _check_count(count: int) -> None:
    """Raise UserError for a negative count, or for more words per sample than the block counter can number."""
    if not 0 <= count <= MAX_WORDS:
        raise UserError(f"{count} random words for each sample are out of range: give 0 to 2**33")


def _check_high(high: int) -> None:
    """Raise UserError for an upper bound that `integers` cannot compute with."""
    if not 1 <= high <= MAX_INTEGER:
        raise UserError(f"upper bound {high} of random integers is out of range: give an integer from 1 to 2**31")
