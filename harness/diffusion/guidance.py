"""The scale of classifier-free guidance, and the interval of noise levels in which it is applied.

Source: Kynkaanniemi et al. 2024, arXiv:2404.07724. The noise level of a row of a sampler's plan is sigma = s / a of
x_t = a x_0 + s eps: EDM's sigma, in which the paper states its intervals, and for other processes the noise relative to
the image. It falls from row to row. Both ends of an interval belong to it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from harness.errors import shown
from harness.io.text import read_number

INTERVAL_FORM = "LOW-HIGH, as in 0.1-0.8 (0.1- has no upper end, -0.8 no lower one)"
_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance, as --cfg states it: 1.5, or 1.5@0.1-0.8 with an interval of sigma."""

    scale: float  # 1: no guidance
    interval: str = ""  # of sigma, as from `interval_text`; "": guidance at all noise levels

    def __str__(self) -> str:
        return repr(self.scale) + (f"@{self.interval}" if self.interval else "")

    @property
    def short(self) -> str:
        """As `str`, with six digits of the scale and 2 for 2.0: for names and tables."""
        return f"{self.scale:g}" + (f"@{self.interval}" if self.interval else "")


def read_guidance(value: Any) -> Guidance:
    """Guidance from a number, or from text of the form SCALE or SCALE@LOW-HIGH, as in 1.5@0.1-0.8.

    Raises ValueError for other text, and for an interval beside the scale 1. Other scales are not checked.
    """
    if isinstance(value, Guidance):
        return value
    scale_text, at, interval = value.partition("@") if isinstance(value, str) else (value, "", "")
    scale = read_number(scale_text)
    if not at:
        return Guidance(scale)
    low, high = read_interval(interval)
    if scale == 1:
        raise ValueError(f"{shown(value)}: the scale 1 is no guidance, so it has no interval of noise levels")
    return Guidance(scale, interval_text(low, high))


def below_one(scale: float) -> str:
    """Why a scale of guidance below 1 is refused, for messages."""
    return (
        f"guidance scale {scale:g} is below 1; 1 samples with the labels and without guidance, larger scales guide, and "
        "smaller ones (0: without labels) are not supported"
    )


def read_interval(text: str) -> tuple[float, float]:
    """(low, high) of LOW-HIGH; an end that is left out is 0 or infinity. Raises ValueError for other text."""
    ends = re.fullmatch(rf"\s*({_NUMBER})?\s*-\s*({_NUMBER})?\s*", text)
    if ends is None:
        raise ValueError(f"{shown(text)} is not an interval of noise levels: give {INTERVAL_FORM}")
    low, high = float(ends[1] or 0), float(ends[2] or math.inf)
    if ends[2] and math.isinf(high) or math.isinf(low):
        raise ValueError(
            f"{shown(text)}: an end of an interval of noise levels is a finite number; leave it out instead"
        )
    if low > high:
        raise ValueError(f"{shown(text)}: the lower end of an interval of noise levels comes first, as in 0.1-0.8")
    if (low, high) == (0.0, math.inf):
        raise ValueError(f"{shown(text)} holds all noise levels: leave the interval out")
    return low, high


def interval_text(low: float, high: float) -> str:
    """The interval in the one form that identities and records have: equal intervals have equal texts."""
    low_text, high_text = (repr(float(end)).removesuffix(".0") for end in (low, high))
    return f"{low_text}-{'' if math.isinf(high) else high_text}"
