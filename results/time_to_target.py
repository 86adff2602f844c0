"""Time to target: the training compute, and the hours on one device, after which a metric first reaches a value.

A run that was evaluated after several training steps (`--evaluate-at`) gives a curve for each training seed. Between two
marks the curve is a straight line in log compute and, for a metric like a Frechet distance, in the log of the metric:
distances fall as power laws of compute (DiT paper, Figure 9), which are straight there, so that a power law is
interpolated without error. Metrics that can be 0 or below, and those where higher is better, have a linear scale. Outside
its marks no curve is extended: a seed that does not reach the target is "not reached" (censored at the end of its
training), and one that has reached it at its first mark took at most that long.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, variance

from harness.errors import UserError
from results.experiments import ALONG_TRAINING, experiment_key, group_of, sampling_text, student_t, welch
from results.metrics import higher_is_better, known, shared_direction
from results.records import ComparableKey, Record, comparable_key

SECONDS_AN_HOUR = 3600.0
MAX_ORDERS = 200_000  # assignments of seeds to sides that the exact test counts
LEVEL = 0.05
RULE = (
    "training compute until the metric first reaches the target, between marks by straight lines in log compute against "
    "the {scale} of the metric, never beyond the marks; win or loss where the 95 % interval of the ratio, from the spread "
    "of the logs over training seeds (Welch), does not contain 1. Where a seed does not reach the target, or has reached it "
    "at its first mark, an exact rank test over seeds that counts it as such (Gehan) at 5 %. Two training seeds on each "
    "side are the least."
)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A value of a metric, to be reached from the worse side."""

    metric: str
    value: float

    def __str__(self) -> str:
        return f"{self.metric}={self.value:g}"


def read_target(text: object) -> Target:
    """The target that "fd=60" names. ValueError for other text and for a metric that is not known."""
    if isinstance(text, Target):
        return text
    name, sign, number = str(text).partition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not sign or not math.isfinite(value):
        raise ValueError(f"{text!r} is not METRIC=VALUE, as in fd=60")
    name = name.strip()
    if known(name) is None:
        raise ValueError(f"unknown metric {name!r}; see `harness list metrics`")
    return Target(metric=name, value=value)


@dataclass(frozen=True, kw_only=True)
class Point:
    """A mark of a curve: the mean over sampling seeds. seconds: of the training until then; None: not recorded."""

    gflops: float  # of the training until then
    value: float
    seconds: float | None
    device: str | None


@dataclass(frozen=True, kw_only=True)
class Reach:
    """When one training seed reached the target: between `low` and `high` Gflops of training.

    low == high: interpolated between two marks. low 0: reached at the first mark or before. high inf: not reached within
    the training, which ended at `low`. best: the best value of all marks. seconds: at the interpolated compute.
    """

    seed: int
    low: float
    high: float
    best: float
    seconds: float | None = None
    device: str | None = None

    @property
    def exact(self) -> bool:
        return self.low == self.high


@dataclass(frozen=True, kw_only=True)
class TimeToTarget:
    """Of one system, over its training seeds.

    gflops: geometric mean; low, high: its 95 % interval over the seeds (Student's t of the logs). All three are None
    unless all seeds have an interpolated time; the interval also with one seed. hours: the same of the hours on `device`;
    None where a seed's time is not recorded or was taken on another device.
    """

    system: str
    seeds: tuple[Reach, ...]
    gflops: float | None
    low: float | None
    high: float | None
    hours: float | None
    hours_low: float | None
    hours_high: float | None
    device: str | None
    best: float  # of all seeds and marks

    @property
    def text(self) -> str:
        """`reached`, `not reached (best 71.2)`, `not reached by 1 of 3 seeds (best 58.2)`, or `reached before the first mark`."""
        missed = sum(math.isinf(each.high) for each in self.seeds)
        if missed:
            part = "" if missed == len(self.seeds) else f" by {missed} of {len(self.seeds)} seeds"
            return f"not reached{part} (best {self.best:.4g})"
        return "reached" if self.gflops is not None else "reached before the first mark; --evaluate-at earlier steps"


@dataclass(frozen=True, kw_only=True)
class TargetVerdict:
    """Which of two systems needs less training compute for the target.

    ratio: compute of A over compute of B, with its 95 % interval; None where a time is only bounded. verdict: "win" (A
    needs less), "loss", "tie" or "unknown". reason: a sentence on a verdict that is unknown or comes from the rank test.
    hours_ratio: as ratio, of the hours, if both were taken on one device.
    """

    target: Target
    sampling: str
    a: TimeToTarget
    b: TimeToTarget
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None
    hours_ratio: float | None
    verdict: str
    reason: str
    log_scale: bool


def compare_to_target(a: Iterable[Record], b: Iterable[Record], target: Target) -> list[TargetVerdict]:
    """The verdict for every way of sampling that both sides have. UserError where a side is ambiguous or has no curve."""
    left, right = (_curves_of_side(records, target, side) for records, side in ((a, "A"), (b, "B")))
    if not set(left) & set(right):
        raise UserError(
            f"A and B have no way of sampling in common for {target.metric}, or differ in N, features or reference"
        )
    found = []
    for cell in sorted(set(left) & set(right), key=str):
        sides = (left[cell], right[cell])
        records = [record for side in sides for record in side]
        log = log_scale(records, target.value)
        higher = shared_direction(records)
        if higher is None:
            raise UserError(f"it is not known whether higher or lower values of {target.metric} are better")
        times = [time_to_target(side, target.value, higher=higher, log=log) for side in sides]
        found.append(_verdict(target, cell[0], times[0], times[1], log))
    return found


def log_scale(records: Iterable[Record], target: float) -> bool:
    """Whether the metric of these records is interpolated in its log: lower is better, and nothing is 0 or below."""
    records = list(records)
    return target > 0 and not any(higher_is_better(record) or record.value <= 0 for record in records)


def curves(records: Iterable[Record]) -> dict[int, list[Point]]:
    """Training seed -> the marks of its curve, by compute. records: of one system, metric and way of sampling.

    Records without training seed or compute are left out. Several sampling seeds of a mark are averaged.
    """
    marks: dict[tuple[int, float], list[Record]] = {}
    for record in records:
        training = record.training
        if training is not None and training.seed is not None and training.gflops:
            marks.setdefault((training.seed, training.gflops), []).append(record)
    found: dict[int, list[Point]] = {}
    for (seed, gflops), members in sorted(marks.items()):
        about = members[0].environment
        seconds, device = (about.training_seconds, about.training_device) if about else (None, None)
        found.setdefault(seed, []).append(
            Point(gflops=gflops, value=group_of(members).value, seconds=seconds, device=device)
        )
    return found


def reach(seed: int, points: Sequence[Point], target: float, *, higher: bool, log: bool) -> Reach:
    """When the curve first reaches the target. points: at least one, by compute."""
    sign = -1.0 if higher else 1.0
    best = sign * min(sign * point.value for point in points)
    first = next((index for index, point in enumerate(points) if sign * point.value <= sign * target), None)
    if first is None:
        return Reach(seed=seed, low=points[-1].gflops, high=math.inf, best=best)
    after = points[first]
    if first == 0:
        if after.value == target:
            return Reach(
                seed=seed, low=after.gflops, high=after.gflops, best=best, seconds=after.seconds, device=after.device
            )
        return Reach(seed=seed, low=0.0, high=after.gflops, best=best)
    before = points[first - 1]

    def scale(value: float) -> float:
        return math.log(value) if log else value

    share = (scale(target) - scale(before.value)) / (scale(after.value) - scale(before.value))
    gflops = math.exp(math.log(before.gflops) + share * (math.log(after.gflops) - math.log(before.gflops)))
    seconds = device = None
    if before.seconds is not None and after.seconds is not None and before.device == after.device:
        # Seconds go linearly with compute: every step costs the same.
        part = (gflops - before.gflops) / (after.gflops - before.gflops)
        seconds, device = before.seconds + part * (after.seconds - before.seconds), after.device
    return Reach(seed=seed, low=gflops, high=gflops, best=best, seconds=seconds, device=device)


def time_to_target(records: Sequence[Record], target: float, *, higher: bool, log: bool) -> TimeToTarget:
    """The time to target over the training seeds of one system. records: as for `curves`; UserError where none has a curve."""
    by_seed = curves(records)
    if not by_seed:
        raise UserError(
            f"{records[0].system}: no record states its training seed and compute, which a time to target needs"
        )
    seeds = tuple(reach(seed, points, target, higher=higher, log=log) for seed, points in by_seed.items())
    sign = -1.0 if higher else 1.0
    gflops = _mean([each.low for each in seeds]) if all(each.exact for each in seeds) else (None, None, None)
    devices = {each.device for each in seeds}
    hours: tuple[float | None, float | None, float | None] = (None, None, None)
    device = None
    if gflops[0] is not None and len(devices) == 1 and None not in devices:
        hours = _mean([(each.seconds or 0.0) / SECONDS_AN_HOUR for each in seeds])
        device = devices.pop()
    return TimeToTarget(
        system=records[0].system, seeds=seeds, gflops=gflops[0], low=gflops[1], high=gflops[2],
        hours=hours[0], hours_low=hours[1], hours_high=hours[2], device=device,
        best=sign * min(sign * each.best for each in seeds),
    )  # fmt: skip


def _mean(values: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """(geometric mean, low, high) of the 95 % interval of the mean of the logs; no interval for one value."""
    if any(value <= 0 for value in values):
        return None, None, None
    logs = [math.log(value) for value in values]
    mean = fmean(logs)
    if len(logs) < 2:
        return math.exp(mean), None, None
    half = student_t(len(logs) - 1) * math.sqrt(variance(logs) / len(logs))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def _verdict(target: Target, sampling: str, a: TimeToTarget, b: TimeToTarget, log: bool) -> TargetVerdict:
    ratio = low = high = hours = None
    if a.gflops is not None and b.gflops is not None:
        ratio = a.gflops / b.gflops
    if a.hours is not None and b.hours is not None and a.device == b.device:
        hours = a.hours / b.hours
    single = [side for side, each in (("A", a), ("B", b)) if len(each.seeds) < 2]
    if single:
        verdict = "unknown"
        reason = f"{' and '.join(single)}: one training seed, and training again moves the time; train more seeds"
    elif ratio is not None:
        sides = [[math.log(each.low) for each in side.seeds] for side in (a, b)]
        parts = [(variance(logs) / len(logs), len(logs) - 1) for logs in sides]
        half, _ = welch(parts)
        low, high = ratio * math.exp(-half), ratio * math.exp(half)
        verdict, reason = ("win" if high < 1 else "loss" if low > 1 else "tie"), ""
    else:
        verdict, reason = _rank_verdict(a, b)
    return TargetVerdict(
        target=target, sampling=sampling, a=a, b=b, ratio=ratio, ratio_low=low, ratio_high=high, hours_ratio=hours,
        verdict=verdict, reason=reason, log_scale=log,
    )  # fmt: skip


def _rank_verdict(a: TimeToTarget, b: TimeToTarget) -> tuple[str, str]:
    """(verdict, reason) where times are only bounded: Gehan's generalised Wilcoxon test, exact over assignments of seeds."""
    if not any(each.exact or each.low == 0 for each in (*a.seeds, *b.seeds)):
        return "unknown", "neither side reaches the target within its training"
    everyone = [*a.seeds, *b.seeds]
    scores = [sum(_earlier(other, each) - _earlier(each, other) for other in everyone) for each in everyone]
    found = sum(scores[: len(a.seeds)])  # below 0: A is earlier
    count = math.comb(len(everyone), len(a.seeds))
    if count <= MAX_ORDERS:
        sums = [sum(each) for each in itertools.combinations(scores, len(a.seeds))]
        p = sum(abs(each) >= abs(found) for each in sums) / count
    else:
        n = len(everyone)
        spread = math.fsum(score**2 for score in scores) * len(a.seeds) * len(b.seeds) / (n * (n - 1))
        p = math.erfc(abs(found) / math.sqrt(2 * spread)) if spread else 1.0
    reason = f"some times are only bounded; exact rank test over seeds, p = {p:.2g}"
    if p <= LEVEL:
        return ("win" if found < 0 else "loss"), reason
    if 2 / count > LEVEL:
        reason += f" (of so few seeds it is at least {2 / count:.2g}; with 4 on each side it can be 0.029)"
    return "tie" if found == 0 else "unknown", reason


def _earlier(one: Reach, other: Reach) -> bool:
    """Whether one seed certainly reached the target before the other."""
    return one.high < other.low or (one.high == other.low and not other.exact)


def _curves_of_side(
    records: Iterable[Record], target: Target, side: str
) -> dict[tuple[str, str | None, ComparableKey], list[Record]]:
    """(way of sampling, mode, comparable key) -> the records of one system. UserError for two systems in one cell."""
    cells: dict[tuple[str, str | None, ComparableKey], dict[tuple, list[Record]]] = {}
    for record in records:
        if record.metric != target.metric or record.training is None:
            continue
        mode = record.evaluation.mode if record.evaluation else None
        cell = (sampling_text(record), mode, comparable_key(record))
        cells.setdefault(cell, {}).setdefault(_curve_key(record), []).append(record)
    if not cells:
        raise UserError(
            f"{side} has no record of {target.metric} of a training; `harness run --evaluate-at` makes several"
        )
    for (sampling, _, _), systems in cells.items():
        if len(systems) > 1:
            names = sorted(members[0].system for members in systems.values())
            what = (
                " and ".join(dict.fromkeys(names))
                if len(set(names)) > 1
                else f"{len(systems)} experiments of {names[0]}"
            )
            raise UserError(f"{side} holds {what} at {sampling}; name the folder of one experiment, with all its seeds")
    return {cell: next(iter(systems.values())) for cell, systems in cells.items()}


def _curve_key(record: Record) -> tuple:
    """`experiment_key` without what grows along a training."""
    assert record.training is not None
    training = dataclasses.replace(record.training, **dict.fromkeys(ALONG_TRAINING))
    return experiment_key(dataclasses.replace(record, training=training))
