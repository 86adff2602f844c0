"""Threefry-2x32 for torch tensors on any device: the functions of `threefry_numpy`, with the same numbers.

Bits, uniforms and integers equal numpy's; normals are within 1e-6 of them (float32 elementary functions). Results are on
the device of `index`. torch does not have unsigned arithmetic on all devices, so words are stored as int32 bit patterns:
two's complement overflows in the same way, and right shifts are masked because they copy the sign.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from harness.randomness import threefry_numpy as reference
from harness.randomness.threefry_numpy import PARITY, ROTATIONS, Purpose

CHUNK = 1 << 15  # blocks at a time on a CPU: three uint32 buffers of 128 KiB fit in the second-level cache


def threefry2x32(
    key0: torch.Tensor,  # int32 bit pattern, any shape
    key1: torch.Tensor,  # int32, broadcasts with key0
    counter0: torch.Tensor,  # int32, broadcasts with the key
    counter1: torch.Tensor,  # int32
) -> tuple[torch.Tensor, torch.Tensor]:
    """The 20-round block function. Returns two int32 tensors (bit patterns) of the broadcast shape."""
    shape = torch.broadcast_shapes(key0.shape, key1.shape, counter0.shape, counter1.shape)
    # high: the bits of x1 that a rotation moves to the low end
    x0, x1, high = (torch.empty(shape, dtype=torch.int32, device=key0.device) for _ in range(3))
    x0.copy_(counter0 + key0)
    x1.copy_(counter1 + key1)
    keys = (key0, key1, key0 ^ key1 ^ PARITY)
    for group in range(5):
        for rotation in ROTATIONS[group % 2]:
            x0.add_(x1)
            torch.bitwise_right_shift(x1, 32 - rotation, out=high)
            high.bitwise_and_((1 << rotation) - 1)
            x1.bitwise_left_shift_(rotation)
            x1.bitwise_xor_(high)
            x1.bitwise_xor_(x0)
        x0.add_(keys[(group + 1) % 3])
        x1.add_(keys[(group + 2) % 3] + (group + 1))
    return x0, x1


def bits(seed: int, purpose: Purpose, index: torch.Tensor, step: int | torch.Tensor, count: int) -> torch.Tensor:
    """Random words: int64 (N, count) with values 0 ... 2**32 - 1, on the device of `index`.

    index: integer tensor (N,). step: one int or an integer tensor (N,). Ranges and errors as in the reference.
    """
    words = _words(seed, purpose, index, step, count)
    return words.to(torch.int64).bitwise_and_(0xFFFFFFFF)


def uniform(
    seed: int, purpose: Purpose, index: torch.Tensor, step: int | torch.Tensor, shape: Sequence[int] = ()
) -> torch.Tensor:
    """Uniform numbers in [0, 1): float32 (N, *shape), equal to the reference's."""
    return _unit(_words(seed, purpose, index, step, math.prod(shape))).reshape(len(index), *shape)


def normal(
    seed: int, purpose: Purpose, index: torch.Tensor, step: int | torch.Tensor, shape: Sequence[int]
) -> torch.Tensor:
    """Standard normal numbers: float32 (N, *shape), within 1e-6 of the reference's."""
    count = math.prod(shape)
    pairs = (count + 1) // 2
    out = torch.empty((len(index), pairs, 2), dtype=torch.float32, device=index.device)
    for rows, columns, x0, x1 in _blocks(seed, purpose, index, step, count):
        u1 = _unit(x0).add_(2.0**-24)  # exact: a 24-bit integer plus one, scaled
        radius = u1.log_().mul_(-2.0).sqrt_()
        angle = _unit(x1).mul_(2 * math.pi)  # torch rounds the scalar to float32 first
        chunk = out[rows, columns]
        torch.mul(radius, torch.cos(angle), out=chunk[..., 0])
        torch.mul(radius, angle.sin_(), out=chunk[..., 1])
    return _first_elements(out, count).reshape(len(out), *shape)


def integers(seed: int, purpose: Purpose, index: torch.Tensor, step: int | torch.Tensor, high: int) -> torch.Tensor:
    """One integer in [0, high) for each index: int64 (N,), equal to the reference's. 1 <= high <= 2**31."""
    reference._check_high(high)
    words = bits(seed, purpose, index, step, 2)  # (N, 2)
    return (words[:, 0] * high + ((words[:, 1] * high) >> 32)) >> 32


def _words(seed: int, purpose: Purpose, index: torch.Tensor, step: int | torch.Tensor, count: int) -> torch.Tensor:
    """Random words as int32 bit patterns (N, count)."""
    words = torch.empty((len(index), (count + 1) // 2, 2), dtype=torch.int32, device=index.device)
    for rows, columns, x0, x1 in _blocks(seed, purpose, index, step, count):
        words[rows, columns, 0] = x0
        words[rows, columns, 1] = x1
    return _first_elements(words, count)


def _unit(words: torch.Tensor) -> torch.Tensor:
    """The upper 24 bits as float32 in [0, 1). words: int32 bit patterns, so the shift copies the sign and is masked."""
    return (words >> 8).bitwise_and_(0xFFFFFF).to(torch.float32).mul_(2.0**-24)


def _first_elements(pairs: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` numbers of each sample: (N, count), from the two numbers of each of B blocks, (N, B, 2)."""
    return pairs.reshape(len(pairs), 2 * pairs.shape[1])[:, :count]


def _blocks(
    seed: int, purpose: Purpose, index: torch.Tensor, step: int | torch.Tensor, count: int
) -> Iterator[tuple[slice, slice, torch.Tensor, torch.Tensor]]:
    """The blocks in chunks: yields (rows, columns, word 0, word 1), with words int32 (rows, columns).

    rows: slice of the N samples. columns: slice of the ceil(count / 2) blocks of each. On a CPU a chunk has about CHUNK
    blocks; elsewhere there is one chunk.
    """
    reference._check_count(count)
    if not isinstance(step, torch.Tensor):
        step = reference._checked_step(step)
    elif step.shape != index.shape:
        raise TypeError(f"index must be (N,) and step an int or (N,), got {tuple(index.shape)} and {tuple(step.shape)}")
    samples, pairs = len(index), (count + 1) // 2
    if _uses_numpy(index):
        host_step = step.numpy() if isinstance(step, torch.Tensor) else step
        host_key0, host_key1, host_step_low = reference._sample_keys(seed, purpose, index.numpy(), host_step)
        width = max(1, min(pairs, CHUNK))  # blocks of each sample in a chunk; at least 1, for count 0
        height = max(1, CHUNK // width)  # samples in a chunk
        for left in range(0, pairs, width):
            host_block = np.arange(left, min(left + width, pairs), dtype=np.uint32)
            for top in range(0, samples, height):
                rows = slice(top, top + height)
                words = reference.threefry2x32(host_key0[rows], host_key1[rows], host_block, host_step_low[rows])
                x0, x1 = (torch.from_numpy(word.view(np.int32)) for word in words)
                yield rows, slice(left, left + width), x0, x1  # a slice may end beyond its axis
        return
    if not isinstance(step, torch.Tensor):
        step = torch.tensor([step], device=index.device)
    key0, key1, step_low = _sample_keys(seed, purpose, index, step)
    block = torch.arange(pairs, device=index.device).to(torch.int32)
    yield slice(0, samples), slice(0, pairs), *threefry2x32(key0, key1, block, step_low)


def _sample_keys(
    seed: int, purpose: Purpose, index: torch.Tensor, step: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Word 0 and word 1 of the sample keys, int32 (N, 1), and the low word of step, on the device of `index`.

    step: (N,), with a low word (N, 1); or (1,) if all samples share it, with a low word (1, 1).
    """
    seed_bits = torch.from_numpy(np.atleast_1d(reference._checked_seed(seed)).view(np.int64)).to(index.device)
    step_high, step_low = _split64(step)
    purpose_key = threefry2x32(*_split64(seed_bits), torch.full_like(step_high, int(purpose)), step_high)
    key0, key1 = threefry2x32(*purpose_key, *_split64(index))
    return key0[:, None], key1[:, None], step_low[:, None]


def _uses_numpy(index: torch.Tensor) -> bool:
    """Whether numpy computes the words. On a CPU its integer operations take a third of the time of torch's."""
    return index.device.type == "cpu"


def _split64(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low word of 64-bit integers as int32 bit patterns; a cast to int32 keeps the low 32 bits."""
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"index and step must be integers, got {value.dtype}")
    value = value.to(torch.int64)
    return (value >> 32).to(torch.int32), value.to(torch.int32)
