"""Is the difference real: win, loss or tie between two sides, metric by metric.

A side is a set of records. Its records of one metric and one way of sampling that differ in seeds alone form a group:
sample sets of one checkpoint (sampling seeds) and checkpoints of one experiment (training seeds).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, variance

from harness.errors import UserError
from results.metrics import rank, shared_direction
from results.records import ComparableKey, Record, Sampling, Training, comparable_key

CONFIDENCE = 0.975  # two-sided 95 %
SEEDS_RULE = (
    "training seeds on both sides: win or loss where the 95 % interval of the difference of the means over training "
    "seeds (Welch, Satterthwaite's degrees of freedom) does not contain 0; the verdict is about the two experiments"
)
SAMPLING_RULE = (
    "one training seed on a side: win or loss where the difference exceeds the root of the sum of the squared 95 % "
    "half-widths of sampling; the verdict is about these checkpoints, not about the backbones. Training again moves a "
    "Frechet distance about 3 times as far as sampling again does (arXiv:2606.20536), so the last column has the verdict "
    "at 3.2 times that noise"
)
RULE = (
    f"{SEEDS_RULE}. {SAMPLING_RULE}. Lines are tested one by one: of twenty ties one shows a win or a loss by chance."
)
Cell = tuple[str, str | None, str, ComparableKey]  # (metric, mode, way of sampling, comparable key)
Cells = dict[Cell, "Group"]
RETRAINING = 3.2  # ratio of the noise of training again to the noise of sampling again (arXiv:2606.20536)


@dataclass(frozen=True, kw_only=True)
class Group:
    """The records of one side for one metric and one way of sampling, by checkpoint.

    Checkpoints of one training seed count as one: they differ in low bits or in the machine, and are averaged.
    """

    checkpoints: tuple[tuple[Record, ...], ...]

    @functools.cached_property
    def records(self) -> tuple[Record, ...]:
        return tuple(record for checkpoint in self.checkpoints for record in checkpoint)

    @functools.cached_property
    def seeds(self) -> tuple[tuple[tuple[Record, ...], ...], ...]:
        """The checkpoints of each training seed; a checkpoint whose seed is not known counts as a seed."""
        found: dict[object, list[tuple[Record, ...]]] = {}
        for place, checkpoint in enumerate(self.checkpoints):
            training = checkpoint[0].training
            known = training is not None and training.seed is not None
            found.setdefault(training.seed if training and known else ("unknown", place), []).append(checkpoint)
        return tuple(map(tuple, found.values()))

    @functools.cached_property
    def means(self) -> list[float]:
        """The mean of each training seed over its checkpoints, each of which is a mean over its sampling seeds."""
        return [
            checkpoints[0][0].value
            if len(checkpoints) == len(checkpoints[0]) == 1
            else fmean(fmean(record.value for record in checkpoint) for checkpoint in checkpoints)
            for checkpoints in self.seeds
        ]

    @functools.cached_property
    def value(self) -> float:
        """The mean over training seeds."""
        return fmean(self.means)

    @property
    def n(self) -> int:
        """Number of images that each record measured."""
        return self.records[0].n

    def sampling_half_width(self, *, upward: bool) -> float | None:
        """95 % half-width of the value over the draw of the samples; None where a record has no interval.

        A checkpoint with several sampling seeds has it from their spread, any other from its record's interval, on the
        side that faces the other value (`upward`: the other value is higher): intervals of shares are not symmetric.
        """
        halves = []
        for checkpoints in self.seeds:
            found = [half for records in checkpoints if (half := _half_width(records, upward=upward)) is not None]
            if len(found) < len(checkpoints):
                return None
            halves.append(math.hypot(*found) / len(found))
        return math.hypot(*halves) / len(halves)


def _half_width(records: Sequence[Record], *, upward: bool) -> float | None:
    """`Group.sampling_half_width` of one checkpoint."""
    if len(records) > 1:
        spread = math.sqrt(variance([record.value for record in records]) / len(records))
        return student_t(len(records) - 1) * spread
    (record,) = records
    if record.low is None or record.high is None:
        return None
    return record.high - record.value if upward else record.value - record.low


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Win, loss or tie of A in one metric; unknown where an interval is missing, or where nobody knows the direction.

    noise: the largest difference that is a tie. degrees: degrees of freedom of the test over training seeds.
    scope: "training seeds" or "these checkpoints". again: the verdict that would be left if both sides were trained
    again, by the rule of thumb; None where several training seeds were compared, or where the verdict is unknown.
    """

    metric: str
    sampling: str  # the way of sampling, of both sides
    a: Group
    b: Group
    difference: float  # a - b
    noise: float | None
    degrees: float | None
    scope: str
    verdict: str
    again: str | None


def compare(a: Iterable[Record], b: Iterable[Record]) -> list[Verdict]:
    """Verdicts for every metric and sampling setting that both sides have, in a fixed order.

    Records are compared only where data set, resolution, N, suite, features and reference agree. Where the two sides
    share no way of sampling, but each has a single one (with the same steps, or at all), those are compared, and the
    verdict's `sampling` names both.
    Raises UserError where a side is ambiguous (records of one metric and one way of sampling differ in more than seeds,
    say in training length), and where the sides have nothing in common.
    """
    left, right = _cells(a, "A"), _cells(b, "B")
    common = sorted(set(left) & set(right), key=lambda cell: (rank(cell[0]), str(cell)))
    if common:
        return [verdict_of(cell[0], cell[2], left[cell], right[cell]) for cell in common]
    pairs = _one_way_each(left, right, by_steps=True) or _one_way_each(left, right, by_steps=False)
    if not pairs:
        raise UserError(f"A and B have no measurement that may be compared: {_why(left, right)}")
    return [verdict_of(metric, text, x, y) for metric, text, x, y in pairs]


def within_noise(a: Record, b: Record) -> bool | None:
    """Whether two measurements of one metric tie given the noise of sampling; None where an interval is missing.

    The rule for one training seed: they tie where the gap is at most the root of the sum of the squared half-widths on
    the sides that face each other.
    """
    lower, upper = (a, b) if a.value <= b.value else (b, a)
    above, below = _half_width([lower], upward=True), _half_width([upper], upward=False)
    if above is None or below is None:
        return None
    return upper.value - lower.value <= math.hypot(above, below)


def differing(a: Record, b: Record) -> dict[str, tuple[object, object]]:
    """Name -> both values of the settings in which two records differ: no seeds, no hashes, nothing that sets compute."""
    skipped = {
        "seed", "checkpoint_sha256", "samples_sha256", "settings_hash", "recipe_hash", "gflops_per_image", "gflops",
        "decoder_gflops", "images", "micro_batch", "batch",
    }  # fmt: skip
    found: dict[str, tuple[object, object]] = {}
    for part in ("training", "sampling"):
        one, other = getattr(a, part), getattr(b, part)
        if one is None or other is None:
            continue
        for field in dataclasses.fields(one):
            values = (getattr(one, field.name), getattr(other, field.name))
            if field.name not in skipped and None not in values and values[0] != values[1]:
                found[f"{part} {field.name}".replace("_", " ")] = values
    return found


def _one_way_each(left: Cells, right: Cells, *, by_steps: bool) -> list[tuple[str, str, Group, Group]]:
    """(metric, text, A, B) where each side has exactly one way of sampling; with `by_steps`, one of each step count."""
    sides = []
    for side in (left, right):
        found: dict[tuple, list[tuple[str, Group]]] = {}
        for (metric, mode, sampling, key), group in side.items():
            drawn = group.records[0].sampling
            steps = (drawn.steps if drawn else None) if by_steps else None
            found.setdefault((metric, mode, key, steps), []).append((sampling, group))
        sides.append(found)
    pairs = []
    for cell in sorted(set(sides[0]) & set(sides[1]), key=lambda cell: (rank(cell[0]), str(cell))):
        if len(sides[0][cell]) == len(sides[1][cell]) == 1:
            ((one, x),), ((other, y),) = sides[0][cell], sides[1][cell]
            pairs.append((cell[0], f"{one} against {other}", x, y))
    return pairs


def _cells(records: Iterable[Record], side: str) -> Cells:
    cells: dict[Cell, dict[str, Record]] = {}
    for record in records:
        mode = record.evaluation.mode if record.evaluation else None
        cell = (record.metric, mode, sampling_text(record), comparable_key(record))
        cells.setdefault(cell, {})[record.id] = record
    return {cell: _group(list(found.values()), side) for cell, found in cells.items()}


def _group(records: list[Record], side: str) -> Group:
    """The records of a cell as a group; UserError where they differ in more than seeds."""
    first = records[0]
    for other in records[1:]:
        if experiment(first) == experiment(other):
            continue
        steps = [each.training.steps if each.training else None for each in (first, other)]
        if steps[0] != steps[1]:
            what, remedy = f"training steps {steps[0]} and {steps[1]}", "narrow it with --step"
        else:
            what, remedy = f"{first.system} and {other.system}", "name one run, or one record file"
            for name, values in differing(first, other).items():
                what = f"{name} {values[0]} and {values[1]}"
        raise UserError(f"{side} holds two results for {first.metric} at {sampling_text(first)} ({what}); {remedy}")
    checkpoints = _by_checkpoint(records)
    seeds = [record.sampling.seed if record.sampling else None for found in checkpoints.values() for record in found]
    pairs = list(zip((key for key, found in checkpoints.items() for _ in found), seeds, strict=True))
    if len(set(pairs)) != len(pairs):
        raise UserError(
            f"{side} holds two results for {first.metric} at {sampling_text(first)} with the same seeds; name one run, or "
            "one record file"
        )
    return _as_group(checkpoints)


def group_of(records: Iterable[Record]) -> Group:
    """The records of one experiment as a group; of several with the same seeds, the first by id is taken."""
    seeds: dict[tuple, Record] = {}
    for record in sorted(records, key=lambda record: record.id):
        seeds.setdefault((_checkpoint(record), record.sampling.seed if record.sampling else None), record)
    return _as_group(_by_checkpoint(seeds.values()))


def _by_checkpoint(records: Iterable[Record]) -> dict[tuple, list[Record]]:
    checkpoints: dict[tuple, list[Record]] = {}
    for record in records:
        checkpoints.setdefault(_checkpoint(record), []).append(record)
    return checkpoints


def _checkpoint(record: Record) -> tuple:
    return (record.training.seed, record.training.checkpoint_sha256) if record.training else (None, None)


def _as_group(checkpoints: dict[tuple, list[Record]]) -> Group:
    ordered = sorted(checkpoints.items(), key=lambda item: str(item[0]))
    return Group(checkpoints=tuple(tuple(found) for _, found in ordered))


def experiment(record: Record) -> tuple:
    """Equal for records of one group: everything but seeds, values, what follows from seeds, and what moves low bits."""
    return (
        record.system,
        record.backbone,
        record.framework,
        record.protocol,
        record.protocol_version,
        record.training and _trained(record.training),
        record.sampling and _drawn(record.sampling),
    )


def _but(part: type, *names: str) -> operator.attrgetter:
    """A function that returns all fields of a part of a record but these."""
    return operator.attrgetter(*(field.name for field in dataclasses.fields(part) if field.name not in names))


_trained = _but(Training, "seed", "checkpoint_sha256", "micro_batch")
_drawn = _but(Sampling, "seed", "samples_sha256", "batch")


def sampling_text(record: Record) -> str:
    """How the images were sampled, in words: equal for both sides of a comparison."""
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
    return ", ".join(words)


def verdict_of(metric: str, sampling: str, a: Group, b: Group) -> Verdict:
    """The verdict on two groups of one metric, by the rule of training seeds where both have several."""
    difference = a.value - b.value
    higher_is_better = shared_direction((*a.records, *b.records))

    def within(noise: float) -> str:
        if higher_is_better is None:
            return "unknown"
        if abs(difference) <= noise:
            return "tie"
        return "win" if (difference > 0) == higher_is_better else "loss"

    noise = degrees = again = None
    verdict, scope = "unknown", "these checkpoints"
    if min(len(a.seeds), len(b.seeds)) > 1:
        scope = "training seeds"
        noise, degrees = _welch(a.means, b.means)
        verdict = within(noise)
    else:
        half_a, half_b = a.sampling_half_width(upward=difference < 0), b.sampling_half_width(upward=difference > 0)
        if half_a is not None and half_b is not None:
            noise = math.hypot(half_a, half_b)
            verdict = within(noise)
            again = None if higher_is_better is None else within(RETRAINING * noise)
    return Verdict(
        metric=metric, sampling=sampling, a=a, b=b, difference=difference, noise=noise, degrees=degrees, scope=scope,
        verdict=verdict, again=again,
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def student_t(degrees: float) -> float:
    """The 97.5 % quantile of Student's t for `degrees` > 0 of freedom, not only whole ones."""
    from scipy.special import stdtrit  # what scipy.stats.t.ppf calls; scipy.stats takes a second to import

    return float(stdtrit(degrees, CONFIDENCE))


def _welch(a: list[float], b: list[float]) -> tuple[float, float]:
    """95 % half-width and degrees of freedom of the difference of two means of unequal variances (Welch 1947)."""
    parts = [(variance(each) / len(each), len(each)) for each in (a, b)]
    total = sum(part for part, _ in parts)
    if total == 0:  # seeds that change nothing
        return 0.0, math.inf
    degrees = total**2 / sum(part**2 / (count - 1) for part, count in parts)
    return student_t(degrees) * math.sqrt(total), degrees


def _why(left: Cells, right: Cells) -> str:
    names = ("data set", "resolution", "N", "suite", "features", "reference")
    if not left or not right:
        return f"{'A' if not left else 'B'} holds no records"
    one, other = next(iter(left.values())).records[0], next(iter(right.values())).records[0]
    for name, x, y in zip(names, comparable_key(one), comparable_key(other), strict=True):
        if x != y:
            return f"{name} is {x} in A and {y} in B"
    return "they share no metric at the same sampler and steps"
