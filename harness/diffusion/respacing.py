"""Selection of the original timesteps that a sampler uses (openai/guided-diffusion respace.py, space_timesteps)."""

from __future__ import annotations

import numpy as np

from harness.errors import UserError


def space_timesteps(original_steps: int, spacing: int | str) -> np.ndarray:
    """Selected timesteps out of 0 ... original_steps - 1: int64 (S,), ascending.

    spacing: a count, 250 or "250": evenly spaced, with both ends, rounded half to even; several counts, "10,10,20": one
    count for each of that many equal sections; "ddim50": the integer stride from 0 that gives 50 steps, which leaves out
    the last timestep (Song et al. 2021). Raises UserError for a spacing that does not fit.
    """
    text = str(spacing)
    if text.startswith("ddim"):
        return _whole_stride(original_steps, _count(text.removeprefix("ddim"), text), text)
    counts = [_count(part, text) for part in text.split(",")]
    size, extra = divmod(original_steps, len(counts))
    kept, start = [], 0
    for section, count in enumerate(counts):
        length = size + (section < extra)
        if count > length:
            raise UserError(f"sampling steps {text!r} do not fit: {count} steps of only {length} timesteps")
        stride = 1.0 if count == 1 else (length - 1) / (count - 1)
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride  # a running sum of floats, as in the source: k * stride would round differently
        start += length
    return np.array(kept, dtype=np.int64)


def _whole_stride(original_steps: int, count: int, text: str) -> np.ndarray:
    for stride in range(1, original_steps + 1):
        kept = np.arange(0, original_steps, stride, dtype=np.int64)
        if len(kept) == count:
            return kept
    raise UserError(
        f"sampling steps {text!r} do not fit: no whole stride takes {count} of {original_steps} timesteps; "
        f"give {count} without 'ddim' for rounded strides"
    )


def _count(part: str, text: str) -> int:
    if not (part.isascii() and part.strip().isdigit() and int(part) > 0):
        raise UserError(f"sampling steps {text!r} are not understood: give a count (250), a list (10,10,20) or ddim50")
    return int(part)
