"""References and budgets for matched compute, parsed from text such as dit-xl-2@400k and 1e12."""

from __future__ import annotations

import math
from dataclasses import dataclass

from harness.diffusion.guidance import Guidance, below_one, read_guidance
from harness.io.text import COUNT_EXAMPLES, count


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What a run is matched to: a backbone with its training steps, or with one or several numbers of sampler steps."""

    backbone: str
    steps: tuple[int, ...]
    guidance_scale: float = 1.0  # of sampling; 1 = no guidance
    guidance_interval: str = ""  # of noise levels; "": guidance at all

    def name(self, steps: int) -> str:
        """The reference with `steps`, as on the command line: dit-xl-2@400000, dit-xl-2@250@cfg1.5."""
        return f"{self.backbone}@{steps}{self._guidance_text}"

    def __str__(self) -> str:
        return f"{self.backbone}@{','.join(map(str, self.steps))}{self._guidance_text}"

    @property
    def _guidance_text(self) -> str:
        guidance = Guidance(self.guidance_scale, self.guidance_interval)
        return f"@cfg{guidance.short}" if guidance.scale != 1 else ""


def parse_reference(text: object) -> Reference:
    """A reference from BACKBONE@STEPS, as in dit-xl-2@400k. Raises `ValueError` for other text."""
    if isinstance(text, Reference):
        if len(text.steps) != 1 or text.guidance_scale != 1:
            raise ValueError(f"{str(text)!r} is not of the form BACKBONE@STEPS, as in dit-xl-2@400k")
        return text
    name, at, steps = str(text).rpartition("@")
    if not (name and at and "@" not in name):
        raise ValueError(f"{text!r} is not of the form BACKBONE@STEPS, as in dit-xl-2@400k")
    return Reference(backbone=name, steps=(_steps(steps, text),))


def parse_sampling_reference(text: object) -> Reference:
    """A reference from BACKBONE@STEPS[,STEPS...][@cfgSCALE[@LOW-HIGH]], as in dit-xl-2@250@cfg1.5.

    Raises `ValueError` for other text.
    """
    if isinstance(text, Reference):
        return text
    name, *rest = str(text).split("@")
    wrong_form = ValueError(f"{text!r} is not of the form BACKBONE@STEPS[,STEPS][@cfgSCALE], as in dit-xl-2@250@cfg1.5")
    if not name or len(rest) not in (1, 2, 3) or len(rest) > 1 and not rest[1].startswith("cfg"):
        raise wrong_form
    try:
        scale = float(rest[1].removeprefix("cfg")) if len(rest) > 1 else 1.0
    except ValueError:
        raise wrong_form from None
    if not math.isfinite(scale):
        raise ValueError(f"{text!r}: a guidance scale is a finite number of at least 1 (1: no guidance)")
    if scale < 1:
        raise ValueError(f"{text!r}: {below_one(scale)}")
    steps = sorted({_steps(each.strip(), text) for each in rest[0].split(",")})
    guidance = read_guidance(f"{scale}@{rest[2]}") if len(rest) == 3 else Guidance(scale)
    return Reference(
        backbone=name, steps=tuple(steps), guidance_scale=guidance.scale, guidance_interval=guidance.interval
    )


def parse_budget(text: object) -> float:
    """Gflops from text such as 1e12, 3.2e9, 0.5 or 400k. Raises `ValueError` for other text."""
    word = str(text)
    factor = {"k": 1e3, "m": 1e6}.get(word[-1:].lower(), 1)
    try:
        budget = float(word[:-1] if factor > 1 else word) * factor
    except ValueError:
        budget = math.nan
    if not (math.isfinite(budget) and budget > 0):
        raise ValueError(f"{word!r} is not a number of Gflops above 0, such as 1e12, 3.2e9 or 400k")
    return budget


def _steps(text: str, reference: object) -> int:
    """A number of steps from text; `reference` is the whole text, for messages."""
    try:
        steps = count(text)
    except ValueError:
        raise ValueError(f"{reference!r}: {text!r} is not a count such as {COUNT_EXAMPLES}") from None
    if steps < 1:
        raise ValueError(f"{reference!r}: steps must be at least 1")
    return steps
