"""Selection of the original timesteps that a sampler uses (openai/guided-diffusion respace.py, space_timesteps)."""

from __future__ import annotations

import re

import numpy as np

from harness.errors import UserError, shown

WHOLE_STRIDE = "whole-stride"
SECTIONS = re.compile(r"[0-9]{1,6}(:[0-9]{1,6})+")  # counts of steps, joined by colons


def space_timesteps(original_steps: int, spacing: int | str) -> np.ndarray:
    """Selected timesteps out of 0 ... original_steps - 1: int64 (S,), ascending.

    spacing is one of:
    - a count, 250 or "250": evenly spaced with both ends, rounded half to even;
    - several counts, "10,10,20": the timesteps are divided into as many equal sections, with a count for each;
    - "ddim50": multiples of the smallest integer stride that gives 50 steps (Song et al. 2021). They begin at 0 and
      usually leave out the last timestep.
    Raises UserError for a spacing that does not fit.
    """
    text = str(spacing)
    if text.startswith("ddim"):
        return _whole_stride(original_steps, _count(text.removeprefix("ddim"), text), text)
    counts = [_count(part, text) for part in text.split(",")]
    size, extra = divmod(original_steps, len(counts))  # the first `extra` sections are longer by one
    timesteps, start = [], 0
    for section, count in enumerate(counts):
        length = size + (1 if section < extra else 0)
        if count > length:
            raise UserError(f"sampling steps {text!r} do not fit: {count} steps of only {length} timesteps")
        stride = 1.0 if count == 1 else (length - 1) / (count - 1)  # a count of 1 takes the first timestep alone
        position = 0.0
        for _ in range(count):
            timesteps.append(start + round(position))
            position += stride  # a running sum of floats, as in the source: k * stride would round differently
        start += length
    return np.array(timesteps, dtype=np.int64)


def respacing(steps: int, spacing: str) -> int | str | None:
    """The spacing of `space_timesteps` for sampler steps and a --spacing; None for one of another kind.

    spacing: "" or "respaced"; "whole-stride", which is guided-diffusion's ddimN; or counts of steps for equal sections of
    the timesteps, as in "10:10:20". UserError for counts whose sum is not `steps`.
    """
    if spacing in ("", "respaced"):
        return steps
    if spacing == WHOLE_STRIDE:
        return f"ddim{steps}"
    if match := re.fullmatch(r"ddim([0-9]+)", spacing):
        raise UserError(f"the spacing {shown(spacing)} is --sampling-steps {match[1]} --spacing {WHOLE_STRIDE} here")
    if not SECTIONS.fullmatch(spacing):
        return None
    total = sum(map(int, spacing.split(":")))
    if total != steps:
        raise UserError(
            f"the spacing {shown(spacing)} has {total} timesteps, and the sampler takes {steps}: change one of them (dpm++-2s "
            "takes two for each step of --sampling-steps)"
        )
    return spacing.replace(":", ",")


def _whole_stride(original_steps: int, count: int, text: str) -> np.ndarray:
    """The `count` timesteps 0, c, 2c, ... of the smallest integer stride c that gives so many. text: for the error."""
    for stride in range(1, original_steps + 1):
        timesteps = np.arange(0, original_steps, stride, dtype=np.int64)
        if len(timesteps) == count:
            return timesteps
    raise UserError(
        f"sampling steps {text!r} do not fit: no whole stride takes {count} of {original_steps} timesteps; "
        f"for rounded strides give {count} without 'ddim', or without the spacing {WHOLE_STRIDE}"
    )


def _count(part: str, text: str) -> int:
    """The positive integer in `part`, which is a part of the spacing `text`."""
    if not (part.isascii() and part.strip().isdigit() and int(part) > 0):
        raise UserError(f"sampling steps {text!r} are not understood: give a count (250), a list (10,10,20) or ddim50")
    return int(part)
