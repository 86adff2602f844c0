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
RETRAINING = 3.2  # how many times as large the noise of training again is as that of sampling again (arXiv:2606.20536)
SEEDS_RULE = (
    "training seeds on both sides: win or loss where the 95 % interval of the difference of the means over training "
    "seeds (Welch, Satterthwaite's degrees of freedom) does not contain 0; the verdict is about the two experiments"
)
SAMPLING_RULE = (
    "one training seed on a side: win or loss where the difference exceeds the root of the sum of the squared 95 % "
    "half-widths of sampling; the verdict is about these checkpoints, not about the backbones. Training again moves a "
    "Frechet distance about 3 times as far as sampling again does (arXiv:2606.20536), so the last column has the verdict "
    f"at {RETRAINING} times that noise"
)
RULE = (
    f"{SEEDS_RULE}. {SAMPLING_RULE}. Lines are tested one by one: of twenty ties one shows a win or a loss by chance."
)
Cell = tuple[str, str | None, str, ComparableKey]  # (metric, mode, way of sampling, comparable key)
Cells = dict[Cell, "Group"]


@dataclass(frozen=True, kw_only=True)
class Group:
    """The records of one side for one metric and one way of sampling, by checkpoint.

    Checkpoints of one training seed count as one seed, and their values are averaged: they differ in low bits or in the
    machine.
    """

    checkpoints: tuple[tuple[Record, ...], ...]  # for each checkpoint its records, one for each sampling seed

    @functools.cached_property
    def records(self) -> tuple[Record, ...]:
        """The records of all checkpoints."""
        return tuple(record for checkpoint in self.checkpoints for record in checkpoint)

    @functools.cached_property
    def seeds(self) -> tuple[tuple[tuple[Record, ...], ...], ...]:
        """[training seed][checkpoint][sampling seed] -> record. A checkpoint of unknown seed counts as a seed of its own."""
        by_seed: dict[object, list[tuple[Record, ...]]] = {}
        for index, checkpoint in enumerate(self.checkpoints):
            training = checkpoint[0].training  # the same seed in all records of a checkpoint
            seed = None if training is None else training.seed
            by_seed.setdefault(("unknown", index) if seed is None else seed, []).append(checkpoint)
        return tuple(map(tuple, by_seed.values()))

    @functools.cached_property
    def means(self) -> list[float]:
        """For each training seed, the mean over its checkpoints of their means over sampling seeds."""
        return [
            checkpoints[0][0].value  # a shortcut: fmean of a single value is that value, but slow
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
        """Number of images of each record's sample set."""
        return self.records[0].n

    def sampling_half_width(self, *, upward: bool) -> float | None:
        """95 % half-width of `value` from the randomness of sampling; None where a record has no interval.

        For a checkpoint with several sampling seeds it follows from their spread, for any other from its record's
        interval. Intervals of shares, such as precision, are not symmetric. upward: take the side above the value,
        as in a comparison with a higher value; False: the side below it.
        """
        # The half-width of a mean of independent values is the root of the sum of their squared half-widths, divided by
        # their number: first over the checkpoints of a seed, then over the seeds.
        seed_half_widths = []
        for checkpoints in self.seeds:
            half_widths = [half for records in checkpoints if (half := _half_width(records, upward=upward)) is not None]
            if len(half_widths) < len(checkpoints):
                return None
            seed_half_widths.append(math.hypot(*half_widths) / len(half_widths))
        return math.hypot(*seed_half_widths) / len(seed_half_widths)


def _half_width(records: Sequence[Record], *, upward: bool) -> float | None:
    """`Group.sampling_half_width` of one checkpoint, whose records differ in the sampling seed."""
    if len(records) > 1:
        standard_error = math.sqrt(variance([record.value for record in records]) / len(records))
        return student_t(len(records) - 1) * standard_error
    (record,) = records
    if record.low is None or record.high is None:
        return None
    return record.high - record.value if upward else record.value - record.low


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The verdict on A against B in one metric.

    verdict: "win", "loss", "tie" or "unknown" for A; unknown where an interval is missing, or where the metric's direction
    is unknown. largest_tie: the largest absolute difference that is a tie; None where an interval is missing.
    degrees_of_freedom: of the test over training seeds; None where training seeds were not compared.
    scope: "training seeds" or "these checkpoints", that is, what the verdict is about.
    if_trained_again: the verdict if the noise is RETRAINING times as large, as it is when both sides are trained again;
    None where several training seeds were compared, or where the verdict is unknown.
    """

    metric: str
    sampling: str  # how the images were sampled (`sampling_text`); names both ways if the sides differ
    a: Group
    b: Group
    difference: float  # a - b
    largest_tie: float | None
    degrees_of_freedom: float | None
    scope: str
    verdict: str
    if_trained_again: str | None


def compare(a: Iterable[Record], b: Iterable[Record]) -> list[Verdict]:
    """The verdicts on A for every metric and sampling setting that both sides have, in a fixed order.

    Records are compared only where data set, resolution, N, suite, features and reference agree. If the two sides share
    no sampling setting, a metric is compared at two different ones: for each number of steps, at the settings with that
    number, if each side has exactly one such setting; or, if this gives no pair for any metric, at the only setting of
    each side. The verdict's `sampling` then names both settings.
    Raises UserError where a side is ambiguous (records of one metric and one way of sampling differ in more than seeds,
    say in training length), and where the sides have nothing in common.
    """
    left, right = _cells(a, "A"), _cells(b, "B")
    common = sorted(set(left) & set(right), key=lambda cell: (rank(cell[0]), str(cell)))
    if common:
        return [verdict_of(cell[0], cell[2], left[cell], right[cell]) for cell in common]
    pairs = _pairs_of_settings(left, right, by_steps=True) or _pairs_of_settings(left, right, by_steps=False)
    if not pairs:
        raise UserError(f"A and B have no measurement that may be compared: {_reason_not_comparable(left, right)}")
    return [verdict_of(metric, text, x, y) for metric, text, x, y in pairs]


def within_noise(a: Record, b: Record) -> bool | None:
    """Whether two measurements of one metric tie, given the noise of sampling; None where an interval is missing.

    They tie if the gap is at most the root of the sum of two squared half-widths: the upper half of the lower value's
    interval, and the lower half of the higher value's. This is the rule of `compare` for one training seed.
    """
    lower, upper = (a, b) if a.value <= b.value else (b, a)
    above_lower, below_upper = _half_width([lower], upward=True), _half_width([upper], upward=False)
    if above_lower is None or below_upper is None:
        return None
    return upper.value - lower.value <= math.hypot(above_lower, below_upper)


def differing(a: Record, b: Record) -> dict[str, tuple[object, object]]:
    """Settings of training and sampling in which two records differ: name, as "training steps" -> (value of a, of b).

    Seeds, hashes, Gflops and batch sizes are left out, as is a setting that one of the records does not state.
    """
    skipped = {  # `images` too, because it is steps x batch
        "seed", "checkpoint_sha256", "samples_sha256", "settings_hash", "recipe_hash", "gflops_per_image", "gflops",
        "evaluations_mean", "evaluations_max",
        "decoder_gflops", "images", "micro_batch", "batch",
    }  # fmt: skip
    differences: dict[str, tuple[object, object]] = {}
    for part in ("training", "sampling"):
        part_a, part_b = getattr(a, part), getattr(b, part)
        if part_a is None or part_b is None:
            continue
        for field in dataclasses.fields(part_a):
            values = (getattr(part_a, field.name), getattr(part_b, field.name))
            if field.name not in skipped and None not in values and values[0] != values[1]:
                differences[f"{part} {field.name}".replace("_", " ")] = values
    return differences


def _pairs_of_settings(left: Cells, right: Cells, *, by_steps: bool) -> list[tuple[str, str, Group, Group]]:
    """(metric, text of both sampling settings, A, B) for each metric that both sides measured at exactly one setting.

    by_steps: settings are counted for each number of sampling steps, so a metric has a pair for each number of which
    both sides have exactly one setting.
    """

    def by_metric(cells: Cells) -> dict[tuple, list[tuple[str, Group]]]:
        """(metric, mode, comparable key, steps or None) -> (sampling setting, group) of each setting."""
        settings: dict[tuple, list[tuple[str, Group]]] = {}
        for (metric, mode, setting, key), group in cells.items():
            sampling = group.records[0].sampling
            steps = sampling.steps if sampling and by_steps else None
            settings.setdefault((metric, mode, key, steps), []).append((setting, group))
        return settings

    of_a, of_b = by_metric(left), by_metric(right)
    pairs = []
    for entry in sorted(set(of_a) & set(of_b), key=lambda entry: (rank(entry[0]), str(entry))):
        if len(of_a[entry]) == len(of_b[entry]) == 1:
            (setting_a, a), (setting_b, b) = of_a[entry][0], of_b[entry][0]
            pairs.append((entry[0], f"{setting_a} against {setting_b}", a, b))
    return pairs


def _cells(records: Iterable[Record], side: str) -> Cells:
    """The groups of one side. side: "A" or "B", for messages. UserError where a cell's records differ in more than seeds."""
    cells: dict[Cell, dict[str, Record]] = {}  # cell -> record id -> record, so that copies of a record count once
    for record in records:
        mode = record.evaluation.mode if record.evaluation else None
        cell = (record.metric, mode, sampling_text(record), comparable_key(record))
        cells.setdefault(cell, {})[record.id] = record
    return {cell: _group(list(by_id.values()), side) for cell, by_id in cells.items()}


def _group(records: list[Record], side: str) -> Group:
    """The records of a cell as a group. UserError if they differ in more than seeds, or if two have the same seeds."""
    first = records[0]
    for other in records[1:]:
        if experiment_key(first) == experiment_key(other):
            continue
        steps = [record.training.steps if record.training else None for record in (first, other)]
        if steps[0] != steps[1]:
            what, remedy = f"training steps {steps[0]} and {steps[1]}", "narrow it with --step"
        else:
            what, remedy = f"{first.system} and {other.system}", "name one run, or one record file"
            if differences := differing(first, other):
                name, (value, other_value) = differences.popitem()  # the last one; one is enough for the message
                what = f"{name} {value} and {other_value}"
        raise UserError(f"{side} holds two results for {first.metric} at {sampling_text(first)} ({what}); {remedy}")
    if len({_seeds(record) for record in records}) != len(records):
        raise UserError(
            f"{side} holds two results for {first.metric} at {sampling_text(first)} with the same seeds; name one run, or "
            "one record file"
        )
    return _group_of_checkpoints(_by_checkpoint(records))


def group_of(records: Iterable[Record]) -> Group:
    """The records of one experiment as a group. If several have the same seeds, the one with the smallest id is taken."""
    by_seeds: dict[tuple, Record] = {}
    for record in sorted(records, key=lambda record: record.id):
        by_seeds.setdefault(_seeds(record), record)
    return _group_of_checkpoints(_by_checkpoint(by_seeds.values()))


def _by_checkpoint(records: Iterable[Record]) -> dict[tuple, list[Record]]:
    """`_checkpoint_key` -> records."""
    checkpoints: dict[tuple, list[Record]] = {}
    for record in records:
        checkpoints.setdefault(_checkpoint_key(record), []).append(record)
    return checkpoints


def _checkpoint_key(record: Record) -> tuple:
    """(training seed, sha256 of the checkpoint); (None, None) where the training is not known."""
    return (record.training.seed, record.training.checkpoint_sha256) if record.training else (None, None)


def _seeds(record: Record) -> tuple:
    """(`_checkpoint_key`, sampling seed): different for any two records of one group."""
    return (_checkpoint_key(record), record.sampling.seed if record.sampling else None)


def _group_of_checkpoints(checkpoints: dict[tuple, list[Record]]) -> Group:
    """The group of these checkpoints (`_checkpoint_key` -> records), in the order of their keys."""
    ordered = sorted(checkpoints.items(), key=lambda item: str(item[0]))  # as text, because keys may hold None
    return Group(checkpoints=tuple(tuple(records) for _, records in ordered))


def experiment_key(record: Record) -> tuple:
    """A key that is equal for records of one experiment, that is, for those that differ only in seeds.

    It leaves out metric and value, seeds, hashes of checkpoints and samples, and batch sizes that move only low bits. Its
    last entry is the sampling; the others are the training.
    """
    return (
        record.system,
        record.backbone,
        record.framework,
        record.protocol,
        record.protocol_version,
        record.training and _training_key(record.training),
        record.sampling and _sampling_key(record.sampling.without_counts),
    )


def _fields_except(part: type, *names: str) -> operator.attrgetter:
    """A function from a `part` (Training or Sampling) to the tuple of its fields other than `names`."""
    return operator.attrgetter(*(field.name for field in dataclasses.fields(part) if field.name not in names))


_training_key = _fields_except(Training, "seed", "checkpoint_sha256", "micro_batch")
_sampling_key = _fields_except(Sampling, "seed", "samples_sha256", "batch")


def sampling_text(record: Record) -> str:
    """How the images were sampled, in words, as `ddim-50, eta 0.5`. Records are compared where this text is equal."""
    settings = record.sampling
    if settings is None or settings.sampler is None:
        return "samples as given"
    words = [settings.sampler if settings.steps is None else f"{settings.sampler}-{settings.steps}"]
    if settings.eta:
        words.append(f"eta {settings.eta:g}")
    if settings.is_guided:
        scale = "scale not stated" if settings.guidance is None else settings.guidance.short
        words.append(
            f"guidance {scale} ({settings.guidance_channels})" if settings.guidance_channels else f"guidance {scale}"
        )
    if settings.precision not in (None, "float32"):
        words.append(settings.precision)
    return ", ".join(words)


def verdict_of(metric: str, sampling: str, a: Group, b: Group) -> Verdict:
    """The verdict on two groups of one metric: by SEEDS_RULE if both have several training seeds, else by SAMPLING_RULE.

    sampling: the text of `Verdict.sampling`.
    """
    difference = a.value - b.value
    higher_is_better = shared_direction((*a.records, *b.records))

    def verdict_at(largest_tie: float) -> str:
        """The verdict on A if `largest_tie` is the largest absolute difference that is a tie."""
        if higher_is_better is None:
            return "unknown"
        if abs(difference) <= largest_tie:
            return "tie"
        return "win" if (difference > 0) == higher_is_better else "loss"

    largest_tie = degrees_of_freedom = if_trained_again = None
    verdict, scope = "unknown", "these checkpoints"
    if min(len(a.seeds), len(b.seeds)) > 1:
        scope = "training seeds"
        largest_tie, degrees_of_freedom = _welch(a.means, b.means)
        verdict = verdict_at(largest_tie)
    else:
        # of each interval the side towards the other value
        half_a, half_b = a.sampling_half_width(upward=difference < 0), b.sampling_half_width(upward=difference > 0)
        if half_a is not None and half_b is not None:
            largest_tie = math.hypot(half_a, half_b)
            verdict = verdict_at(largest_tie)
            if_trained_again = None if higher_is_better is None else verdict_at(RETRAINING * largest_tie)
    return Verdict(
        metric=metric, sampling=sampling, a=a, b=b, difference=difference, largest_tie=largest_tie,
        degrees_of_freedom=degrees_of_freedom, scope=scope, verdict=verdict, if_trained_again=if_trained_again,
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def student_t(degrees: float) -> float:
    """The 97.5 % quantile of Student's t. degrees: degrees of freedom, above 0, not necessarily an integer."""
    from scipy.special import stdtrit  # what scipy.stats.t.ppf calls; scipy.stats takes a second to import

    return float(stdtrit(degrees, CONFIDENCE))


def _welch(a: list[float], b: list[float]) -> tuple[float, float]:
    """(95 % half-width, degrees of freedom) of mean(a) - mean(b), for samples of unequal variances (Welch 1947)."""
    # (squared standard error of the mean, number of values) of each sample
    squared_errors = [(variance(values) / len(values), len(values)) for values in (a, b)]
    total = sum(squared for squared, _ in squared_errors)
    if total == 0:  # the seed changes nothing
        return 0.0, math.inf
    degrees = total**2 / sum(squared**2 / (count - 1) for squared, count in squared_errors)
    return student_t(degrees) * math.sqrt(total), degrees


def _reason_not_comparable(left: Cells, right: Cells) -> str:
    """Why no cell of one side may be compared with one of the other, by the example of the first group of each."""
    names = ("data set", "resolution", "N", "suite", "features", "reference")  # of the items of `comparable_key`
    if not left or not right:
        return f"{'A' if not left else 'B'} holds no records"
    record_a, record_b = next(iter(left.values())).records[0], next(iter(right.values())).records[0]
    for name, value_a, value_b in zip(names, comparable_key(record_a), comparable_key(record_b), strict=True):
        if value_a != value_b:
            return f"{name} is {value_a} in A and {value_b} in B"
    return "they share no metric at the same sampler and steps"
