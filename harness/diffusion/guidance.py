"""Guidance: its scale, the rule by which two predictions become one, and the interval of noise levels where it applies.

Source of the interval: Kynkaanniemi et al. 2024, arXiv:2404.07724. The noise level of a row of a sampler's plan is sigma =
s / a of x_t = a x_0 + s eps: EDM's sigma, in which the paper states its intervals, and for other processes the noise
relative to the image. It falls from row to row. Both ends of an interval belong to it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from harness import registry
from harness.diffusion.guidance_rules import RULE_NAME, GuidanceRule
from harness.errors import shown
from harness.io.text import read_number

INTERVAL_FORM = "LOW-HIGH, as in 0.1-0.8 (0.1- has no upper end, -0.8 no lower one)"
_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"


def extrapolated(conditional: Any, unconditional: Any, scale: float, *_: Any) -> Any:
    """unconditional + scale (conditional - unconditional): classifier-free guidance, and autoguidance by a weaker network.

    Arrays of torch or jax; further arguments of `GuidanceRule.combine` are not used. Predicted images are linear in the
    output, so outputs of one kind of prediction, of one network or of two, may be combined in their place.
    """
    return unconditional + scale * (conditional - unconditional)


@dataclass(frozen=True)
class Guidance:
    """Guidance, as --cfg states it: 1.5, 1.5@0.1-0.8 with an interval of sigma, or 1.5:NAME with a package's rule."""

    scale: float  # 1: no guidance
    interval: str = ""  # of sigma, as from `interval_text`; "": guidance at all noise levels
    rule: str = ""  # name of a `GuidanceRule`; "": classifier-free guidance, or autoguidance

    def __str__(self) -> str:
        return repr(self.scale) + self._suffix

    @property
    def short(self) -> str:
        """As `str`, with six digits of the scale and 2 for 2.0: for names and tables."""
        return f"{self.scale:g}{self._suffix}"

    @property
    def _suffix(self) -> str:
        return (f":{self.rule}" if self.rule else "") + (f"@{self.interval}" if self.interval else "")

    @property
    def custom_rule(self) -> GuidanceRule | None:
        """The rule of a package; None: classifier-free guidance. Raises UserError if it is not installed."""
        return registry.guidance_rules.get(self.rule) if self.rule else None

    @property
    def evaluations(self) -> int:
        """Network evaluations of a guided row. Raises UserError as `custom_rule`."""
        rule = self.custom_rule
        return 2 if rule is None else rule.evaluations

    @property
    def needs_null_label(self) -> bool:
        """Whether the network is evaluated without a label too. Raises UserError as `custom_rule`."""
        return self.scale != 1 and self.evaluations == 2


NO_GUIDANCE = Guidance(1.0)


def read_guidance(value: Any) -> Guidance:
    """Guidance from a number, or from text SCALE[:RULE][@LOW-HIGH], as in 1.5@0.1-0.8.

    Raises ValueError for other text, and for a rule or an interval beside the scale 1. Other scales are not checked, and
    neither is whether the rule is installed.
    """
    if isinstance(value, Guidance):
        return value
    text, at, interval = value.partition("@") if isinstance(value, str) else (value, "", "")
    scale_text, colon, rule = text.partition(":") if isinstance(text, str) else (text, "", "")
    scale = read_number(scale_text)
    if colon and not re.fullmatch(RULE_NAME, rule):
        raise ValueError(f"{shown(value)}: {shown(rule)} is no name of a guidance rule: give SCALE:NAME")
    interval = interval_text(*read_interval(interval)) if at else ""
    if scale == 1 and (colon or at):
        what = "interval of noise levels" if at else "rule"
        raise ValueError(f"{shown(value)}: the scale 1 is no guidance, so it has no {what}")
    return Guidance(scale, interval, rule)


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
