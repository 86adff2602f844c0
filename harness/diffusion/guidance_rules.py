"""What a package states of its rule of guidance. A module of its own, because the registry of the rules needs the type."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from harness.errors import shown

RULE_NAME = r"[A-Za-z0-9][A-Za-z0-9._+-]*"  # what a name may be, so that SCALE:RULE@LOW-HIGH can be read


@dataclass(frozen=True, kw_only=True)
class GuidanceRule:
    """A rule of guidance that a package brings, as an item of the entry points `harness.guidance`.

    combine: function of (conditional, unconditional, scale, sigma, the module of the arrays) that returns the guided image
    float32 (N, C, H, W). The first two are the images D predicted with the label and without it, of the same form and not
    yet clamped. scale: a float. sigma: the noise level of the row, a float or a scalar array, which may be infinite. The
    module is torch or jax.numpy, so plain arithmetic runs in both. Only rows that are guided call it.
    evaluations: of the network in a guided row: 2, or 1 for a rule without `unconditional`, which then is None.
    """

    name: str
    summary: str = ""
    combine: Callable[[Any, Any, float, Any, Any], Any]
    evaluations: int = 2

    def __post_init__(self) -> None:
        if not re.fullmatch(RULE_NAME, self.name):
            raise ValueError(f"{shown(self.name)} is no name of a guidance rule: letters, digits and . _ + - alone")
        if self.evaluations not in (1, 2):
            raise ValueError(f"guidance rule {self.name}: evaluations is 1 or 2, not {shown(self.evaluations)}")
