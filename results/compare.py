"""Is the difference real: win, loss or tie between two sets of records, metric by metric."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from harness.errors import Refusal
from results.records import Record, comparable_key

RULE = (
    "tie: the difference is at most the root of the sum of the squared half-widths of the two 95 % intervals. "
    "The intervals cover the draw of the samples, so with one training seed a side the verdict is about these two "
    "checkpoints, not about the two backbones: training again moves a Frechet distance more than sampling again does"
)
ORDER = ("fid", "fd", "sfid", "kid", "is", "precision", "recall", "copies")  # as in the tables
LOWER_IS_BETTER = frozenset({"fd", "fid", "sfid", "kid", "copies", "loss_mse", "loss_vb"})


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """`verdict` is A's: win, loss, tie, or unknown where an interval is missing. `noise` is the tie's limit."""

    metric: str
    sampling: str  # what both sides were sampled with
    a: Record
    b: Record
    difference: float  # a - b
    noise: float | None
    verdict: str


def compare(a: Iterable[Record], b: Iterable[Record]) -> list[Verdict]:
    """Verdicts for every metric and sampling setting that both sides have, in a fixed order.

    Records are compared only where data set, resolution, N, suite, features and reference agree. A side with two
    records for the same cell (say, of two training lengths) is ambiguous and refused, as is having nothing in common.
    """
    left, right = _cells(a, "A"), _cells(b, "B")
    common = sorted(set(left) & set(right), key=lambda cell: (_rank(cell[0]), str(cell)))
    if not common:
        raise Refusal(f"A and B have no measurement that may be compared: {_why(left, right)}")
    return [_verdict(left[cell], right[cell]) for cell in common]


def _rank(metric: str) -> int:
    return ORDER.index(metric) if metric in ORDER else len(ORDER)


def _cells(records: Iterable[Record], side: str) -> dict[tuple, Record]:
    cells: dict[tuple, Record] = {}
    for record in records:
        mode = record.evaluation.mode if record.evaluation else None
        cell = (record.metric, mode, _sampling(record), comparable_key(record))
        other = cells.setdefault(cell, record)
        if other.id != record.id:
            steps = [each.training.steps if each.training else None for each in (other, record)]
            remedy = "narrow it with --step" if steps[0] != steps[1] else "name one run, or one record file"
            raise Refusal(
                f"{side} holds two results for {record.metric} at {_sampling(record)} (training steps {steps[0]} and "
                f"{steps[1]}); {remedy}"
            )
    return cells


def _sampling(record: Record) -> str:
    drawn = record.sampling
    if drawn is None or drawn.sampler is None:
        return "samples as given"
    words = [f"{drawn.sampler}-{drawn.steps}"]
    if drawn.eta:
        words.append(f"eta {drawn.eta:g}")
    if drawn.guidance_scale not in (None, 1.0) or drawn.guidance_channels == "classifier":
        words.append(f"guidance {drawn.guidance_scale:g} ({drawn.guidance_channels})")
    if drawn.precision not in (None, "float32"):
        words.append(drawn.precision)
    if drawn.seed:
        words.append(f"sampling seed {drawn.seed}")
    return ", ".join(words)


def _verdict(a: Record, b: Record) -> Verdict:
    difference = a.value - b.value
    noise = None
    verdict = "unknown"
    if a.low is not None and b.low is not None:
        # Each side's half-width towards the other: intervals of shares are not symmetric.
        half_a = (a.value - a.low) if difference > 0 else (a.high - a.value)
        half_b = (b.high - b.value) if difference > 0 else (b.value - b.low)
        noise = math.hypot(half_a, half_b)
        better = difference < 0 if a.metric in LOWER_IS_BETTER else difference > 0
        verdict = "tie" if abs(difference) <= noise else "win" if better else "loss"
    return Verdict(
        metric=a.metric, sampling=_sampling(a), a=a, b=b, difference=difference, noise=noise, verdict=verdict
    )  # fmt: skip


def _why(left: dict[tuple, Record], right: dict[tuple, Record]) -> str:
    names = ("data set", "resolution", "N", "suite", "features", "reference")
    if not left or not right:
        return f"{'A' if not left else 'B'} holds no records"
    one, other = next(iter(left.values())), next(iter(right.values()))
    for name, x, y in zip(names, comparable_key(one), comparable_key(other), strict=True):
        if x != y:
            return f"{name} is {x} in A and {y} in B"
    return "they share no metric at the same sampler and steps"
