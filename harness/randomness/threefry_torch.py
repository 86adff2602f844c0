"""Threefry-2x32 for torch tensors on any device: the functions of `threefry_numpy`, with the same numbers.

Bits, uniforms and integers equal numpy's; normals are within 1e-6 of them (float32 elementary functions). Seeds, indices
and steps are on the host, where the keys of the samples are derived: an accelerator gets them in one copy, for which the
host need not wait. torch does not have unsigned arithmetic on all devices, so words are stored as int32 bit patterns: two's
complement overflows in the same way, and right shifts are masked because they copy the sign.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from harness.frameworks.torch_transfer import to_device
from harness.randomness import threefry_numpy as reference
from harness.randomness.threefry_numpy import PARITY, ROTATIONS, Purpose

CHUNK = 1 << 15  # blocks at a time on a CPU: three uint32 buffers of 128 KiB fit in the second-level cache
STEPS_NUMBERS = 1 << 20  # normal numbers that an accelerator draws at once for several steps: 4 MiB
CPU = torch.device("cpu")


def threefry2x32(
    key0: torch.Tensor,  # int32 bit pattern, any shape
    key1: torch.Tensor,  # int32, broadcasts with key0
    counter0: torch.Tensor,  # int32, broadcasts with the key
    counter1: torch.Tensor,  # int32
) -> tuple[torch.Tensor, torch.Tensor]:
    """The 20-round block function. Returns two int32 tensors (bit patterns) of the broadcast shape."""
    starts = torch.stack(torch.broadcast_tensors(counter0 + key0, counter1 + key1))
    injections = torch.stack(torch.broadcast_tensors(*_injections(key0, key1))).unflatten(0, (5, 2))
    x0, x1 = _low_words(_rounds(starts.to(torch.int64).bitwise_and_(0xFFFFFFFF), injections))
    return x0, x1


def _injections(key0: Any, key1: Any) -> list[Any]:
    """What is added to word 0 and to word 1 after each 4 of the 20 rounds: 10 tensors or arrays as the keys are."""
    keys = (key0, key1, key0 ^ key1 ^ PARITY)
    return [each for group in range(5) for each in (keys[(group + 1) % 3], keys[(group + 2) % 3] + (group + 1))]


def _rounds(wide: torch.Tensor, injections: torch.Tensor) -> torch.Tensor:
    """The 20 rounds on words int64 (2, N, ...) from 0 to 2**32 - 1, in place.

    injections: of `_injections`, int32 (5, 2, N, ...), broadcasts with the words.

    Four kernels a round: launching them is what takes the time on a GPU. A word lies in the lower half of 64 bits, so that
    a shift to the left keeps the bits that a rotation brings back at the low end.
    """
    if not wide.numel():
        return wide  # torch gives what is empty strides that `view` refuses
    words = _low_words(wide)
    x0, x1 = words
    for group in range(5):
        for rotation in ROTATIONS[group % 2]:
            x0.add_(x1)
            shifted = (wide[1] << rotation).view(torch.int32).unflatten(-1, (-1, 2))  # (..., 2): low and high half
            torch.bitwise_xor(shifted[..., 0], shifted[..., 1], out=x1)
            x1.bitwise_xor_(x0)
        words.add_(injections[group])
    return wide


def _low_words(wide: torch.Tensor) -> torch.Tensor:
    """The lower halves of int64 numbers as int32 bit patterns, a view. Every accelerator stores them first."""
    return wide.view(torch.int32)[..., ::2]


def bits(
    seed: int,
    purpose: Purpose,
    index: torch.Tensor,
    step: int | torch.Tensor,
    count: int,
    device: torch.device = CPU,
) -> torch.Tensor:
    """Random words: int64 (N, count) with values 0 ... 2**32 - 1, on `device`.

    index: integer tensor (N,) on the CPU. step: one int or such a tensor. Ranges and errors as in the reference.
    """
    words = _words(seed, purpose, index, step, count, device)
    return words.to(torch.int64).bitwise_and_(0xFFFFFFFF)


def uniform(
    seed: int,
    purpose: Purpose,
    index: torch.Tensor,
    step: int | torch.Tensor,
    shape: Sequence[int] = (),
    device: torch.device = CPU,
) -> torch.Tensor:
    """Uniform numbers in [0, 1): float32 (N, *shape) on `device`, equal to the reference's."""
    return _unit(_words(seed, purpose, index, step, math.prod(shape), device)).reshape(len(index), *shape)


def normal(
    seed: int,
    purpose: Purpose,
    index: torch.Tensor,
    step: int | torch.Tensor,
    shape: Sequence[int],
    device: torch.device = CPU,
) -> torch.Tensor:
    """Standard normal numbers: float32 (N, *shape) on `device`, within 1e-6 of the reference's."""
    count = math.prod(shape)
    if not _uses_numpy(device):
        reference._check_count(count)
        words = to_device(key_words(seed, purpose, index, step), device)
        return _normal_of_words(words, count).reshape(len(index), *shape)
    out = torch.empty((len(index), (count + 1) // 2, 2), dtype=torch.float32)
    for rows, columns, x0, x1 in _blocks(seed, purpose, index, step, count, device):
        radius, angle = _radius(_unit(x0)), _unit(x1).mul_(2 * math.pi)  # torch rounds the scalar to float32 first
        chunk = out[rows, columns]
        torch.mul(radius, torch.cos(angle), out=chunk[..., 0])
        torch.mul(radius, angle.sin_(), out=chunk[..., 1])
    return _first_elements(out, count).reshape(len(out), *shape)


def integers(
    seed: int,
    purpose: Purpose,
    index: torch.Tensor,
    step: int | torch.Tensor,
    high: int,
    device: torch.device = CPU,
) -> torch.Tensor:
    """One integer in [0, high) for each index: int64 (N,) on `device`, equal to the reference's. 1 <= high <= 2**31."""
    reference._check_high(high)
    words = bits(seed, purpose, index, step, 2, device)  # (N, 2)
    return (words[:, 0] * high + ((words[:, 1] * high) >> 32)) >> 32


class StepNormals:
    """`normal` of N samples at many steps that have one upper word: keys are derived, and copied to the device, once.

    On an accelerator, small draws are made for several steps at once, in as many kernels as for one.
    first_step: the first of these steps.
    """

    def __init__(self, seed: int, purpose: Purpose, index: torch.Tensor, first_step: int, device: torch.device):
        self._where, self._first_step = (seed, purpose, index), first_step
        self._words: torch.Tensor | None = None
        self._steps, self._drawn = range(0), torch.empty(0)  # (S, N, count), of these steps from the first one on
        if not _uses_numpy(device):
            self._words = to_device(key_words(seed, purpose, index, first_step), device)

    def __call__(self, step: int, shape: Sequence[int]) -> torch.Tensor:
        """float32 (N, *shape) on the device."""
        if self._words is None:
            return normal(*self._where, step, shape)
        assert step >> 32 == self._first_step >> 32, (step, self._first_step)
        samples, count, step = self._words.shape[1], math.prod(shape), step - self._first_step
        if step not in self._steps or self._drawn.shape[2] != count:
            self._steps = range(step, step + max(1, STEPS_NUMBERS // max(1, samples * count)))
            self._drawn = _normal_of_words(self._words, count, self._steps).unflatten(0, (len(self._steps), samples))
        return self._drawn[self._steps.index(step)].reshape(samples, *shape)


class JointNormals:
    """`normal` at step 0 for several purposes. On an accelerator one call of the block function draws all that are left.

    A smaller draw than the first is a prefix of it, so what is drawn for all has the size of the first. purposes: in the
    order in which they are asked for; some may not be. words: int32 (12, P N, 1) on the CPU, the keys; (0,) where numpy
    draws. The caller copies them to the device, together with other things, and gives them back by `use`.
    """

    def __init__(self, seed: int, purposes: Sequence[Purpose], index: torch.Tensor, device: torch.device):
        self._seed, self._purposes, self._index = seed, tuple(purposes), index
        self.words = torch.empty(0, dtype=torch.int32)
        if not _uses_numpy(device):
            of_rows = np.repeat(np.array(self._purposes, np.uint32), len(index))
            self.words = key_words(seed, of_rows, index.repeat(len(self._purposes)), 0)
        self._drawn: dict[Purpose, torch.Tensor] = {}

    def use(self, words: torch.Tensor) -> None:
        """Draw with `words`, those of this object on a device, and on that device."""
        self.words = words

    def __call__(self, purpose: Purpose, shape: Sequence[int]) -> torch.Tensor:
        """float32 (N, *shape)."""
        if not len(self.words):
            return normal(self._seed, purpose, self._index, 0, shape)
        count = math.prod(shape)
        if purpose not in self._drawn or self._drawn[purpose].shape[1] < count:
            first = self._purposes.index(purpose)
            drawn = _normal_of_words(self.words[:, first * len(self._index) :], count)  # (R N, count)
            self._drawn = dict(zip(self._purposes[first:], drawn.split(len(self._index)), strict=True))
        return self._drawn.pop(purpose)[:, :count].reshape(len(self._index), *shape)


def key_words(seed: int, purpose: Purpose | np.ndarray, index: torch.Tensor, step: int | torch.Tensor) -> torch.Tensor:
    """All that the blocks of N samples need of keys and steps: int32 (12, N, 1), on the CPU as `index` is.

    They are the words that block 0 begins with, and `_injections`. purpose: one for all samples, or uint32 (N,).
    """
    host_step = step.numpy() if isinstance(step, torch.Tensor) else step
    key0, key1, step_low = reference._sample_keys(seed, purpose, index.numpy(), host_step)
    words = np.stack([key0, key1 + step_low, *_injections(key0, key1)])
    return torch.from_numpy(words.view(np.int32))


def _words(
    seed: int, purpose: Purpose, index: torch.Tensor, step: int | torch.Tensor, count: int, device: torch.device
) -> torch.Tensor:
    """Random words as int32 bit patterns (N, count)."""
    words = torch.empty((len(index), (count + 1) // 2, 2), dtype=torch.int32, device=device)
    for rows, columns, x0, x1 in _blocks(seed, purpose, index, step, count, device):
        words[rows, columns, 0] = x0
        words[rows, columns, 1] = x1
    return _first_elements(words, count)


def _normal_of_words(words: torch.Tensor, count: int, steps: range = range(1)) -> torch.Tensor:
    """float32 (S N, count) by the words (12, N, 1) of `key_words` on a device; `steps` as of `_all_blocks`."""
    u1, u2 = (_all_blocks(words, count, steps) >> 8).to(torch.float32).mul_(2.0**-24)  # (N, B) each, in [0, 1)
    pairs = torch.polar(_radius(u1), u2.mul_(2 * math.pi))  # torch rounds the scalar to float32 first
    return _first_elements(torch.view_as_real(pairs), count)


def _radius(u: torch.Tensor) -> torch.Tensor:
    """Box and Muller's radius, of multiples of 2**-24 in [0, 1), float32, which it overwrites."""
    return u.add_(2.0**-24).log_().mul_(-2.0).sqrt_()  # the sum is exact: a 24-bit integer plus one, scaled


def _unit(words: torch.Tensor) -> torch.Tensor:
    """The upper 24 bits as float32 in [0, 1). words: int32 bit patterns, so the shift copies the sign and is masked."""
    return (words >> 8).bitwise_and_(0xFFFFFF).to(torch.float32).mul_(2.0**-24)


def _first_elements(pairs: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` numbers of each sample: (N, count), from the two numbers of each of B blocks, (N, B, 2)."""
    return pairs.reshape(len(pairs), 2 * pairs.shape[1])[:, :count]


def _blocks(
    seed: int, purpose: Purpose, index: torch.Tensor, step: int | torch.Tensor, count: int, device: torch.device
) -> Iterator[tuple[slice, slice, torch.Tensor, torch.Tensor]]:
    """The blocks in chunks: yields (rows, columns, word 0, word 1), with words int32 (rows, columns).

    rows: slice of the N samples. columns: slice of the ceil(count / 2) blocks of each. On a CPU a chunk has about CHUNK
    blocks; elsewhere there is one chunk.
    """
    reference._check_count(count)
    samples, pairs = len(index), (count + 1) // 2
    if not _uses_numpy(device):
        words = to_device(key_words(seed, purpose, index, step), device)
        x0, x1 = _low_words(_all_blocks(words, count))
        yield slice(0, samples), slice(0, pairs), x0, x1
        return
    host_step = step.numpy() if isinstance(step, torch.Tensor) else step
    key0, key1, step_low = reference._sample_keys(seed, purpose, index.numpy(), host_step)
    width = max(1, min(pairs, CHUNK))  # blocks of each sample in a chunk; at least 1, for count 0
    height = max(1, CHUNK // width)  # samples in a chunk
    for left in range(0, pairs, width):
        block = np.arange(left, min(left + width, pairs), dtype=np.uint32)
        for top in range(0, samples, height):
            rows = slice(top, top + height)
            drawn = reference.threefry2x32(key0[rows], key1[rows], block, step_low[rows])
            x0, x1 = (torch.from_numpy(word.view(np.int32)) for word in drawn)
            yield rows, slice(left, left + width), x0, x1  # a slice may end beyond its axis


def _all_blocks(words: torch.Tensor, count: int, steps: range = range(1)) -> torch.Tensor:
    """The two words of the first B = ceil(count / 2) blocks of S N samples: int64 (2, S N, B), from their `key_words`.

    steps: counted from the step of the key words; their number is S, and the samples of one step are adjacent.
    """
    samples, pairs, device = words.shape[1], (count + 1) // 2, words.device
    wide = torch.zeros((2, len(steps), samples, pairs), dtype=torch.int64, device=device)
    start = _low_words(wide)
    start.copy_(words[:2, None])
    start[0].add_(torch.arange(pairs, dtype=torch.int32, device=device))
    if steps != range(1):
        start[1].add_(torch.arange(steps.start, steps.stop, dtype=torch.int32, device=device)[:, None, None])
    return _rounds(wide, words[2:].unflatten(0, (5, 2, 1))).flatten(1, 2)


def _uses_numpy(device: torch.device) -> bool:
    """Whether numpy computes the words. On a CPU its integer operations take a third of the time of torch's."""
    return device.type == "cpu"
