"""Is the difference real: win, loss or tie between two sides, metric by metric.

A side is a set of records. Its records of one metric and one way of sampling that differ in seeds alone form a group:
sample sets of one checkpoint (sampling seeds) and checkpoints of one experiment (training seeds).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import variance
from typing import Any

from harness.errors import UserError
from results.experiments import (
    Group,
    Noise,
    by_checkpoint,
    experiment_key,
    group_of_checkpoints,
    interval_noise,
    sampling_text,
    seeds_of,
    student_t,
    welch,
)
from results.metrics import rank, shared_direction
from results.records import ComparableKey, Record, comparable_key
from results.simultaneous import widening

# Of FID on ImageNet at 256 pixels, measured on several hundred SiT networks (arXiv:2606.20536): how many times as far
# training again moves it as one sampling again does, and its coefficient of variation over training seeds.
RETRAINING = 3.2
RETRAINING_CV = 0.013
SEEDS_RULE = (
    "training seeds on both sides: win or loss where the 95 % interval of the difference of the means over training "
    "seeds (Welch, Satterthwaite's degrees of freedom) does not contain 0; the verdict is about the two experiments"
)
SAMPLING_RULE = (
    "one training seed on a side: win or loss where the difference exceeds the root of the sum of the squared 95 % "
    "half-widths of sampling (of several sampling seeds: from their spread and their intervals together); the verdict is "
    "about these checkpoints, not about the backbones. Training again moves a value further; the last column has the "
    "verdict with that noise: the spread of the training seeds where one side has several (taken for both sides), for FID "
    f"on ImageNet at 256 pixels the larger of {RETRAINING} times the noise of one sampling and of {100 * RETRAINING_CV:g} % "
    "of the value (measured on SiT, arXiv:2606.20536), else unknown: train more seeds"
)
RULE = (
    f"{SEEDS_RULE}. {SAMPLING_RULE}. Lines are tested one by one: of twenty ties one shows a win or a loss by chance."
)
Cell = tuple[str, str | None, str, ComparableKey]  # (metric, mode, way of sampling, comparable key)
Cells = dict[Cell, "Group"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The verdict on A against B in one metric.

    verdict: "win", "loss", "tie" or "unknown" for A; unknown where an interval is missing, or where the metric's direction
    is unknown. largest_tie: the largest absolute difference that is a tie; None where an interval is missing.
    degrees_of_freedom: of the test over training seeds; None where training seeds were not compared.
    scope: "training seeds" or "these checkpoints", that is, what the verdict is about.
    if_trained_again: the verdict with the noise of training both sides again (`SAMPLING_RULE`); "unknown" where that
    noise is neither measured nor published, unless the sides tie already by the noise of sampling. None where several
    training seeds were compared, or where the verdict is unknown.
    training_noise: where the noise of training comes from: "seeds" of both sides or of one, "published" (`RETRAINING`), or
    None where it is not known.
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
    training_noise: str | None = None


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


def within_noise(a: Record, b: Record, systems: int = 2) -> bool | None:
    """Whether two measurements of one metric tie, given the noise of sampling; None where an interval is missing.

    They tie if the gap is at most the root of the sum of two squared half-widths: the upper half of the lower value's
    interval, and the lower half of the higher value's. This is the rule of `compare` for one training seed. systems: how
    many are compared at once, of which these are two; the noise is then wider (`results.simultaneous`).
    """
    lower, upper = (a, b) if a.value <= b.value else (b, a)
    above_lower, below_upper = interval_noise(lower, upward=True), interval_noise(upper, upward=False)
    if above_lower is None or below_upper is None:
        return None
    noise = math.hypot(above_lower.half_width, below_upper.half_width)
    return upper.value - lower.value <= noise * widening(systems, min(above_lower.degrees, below_upper.degrees))


def differing(a: Record, b: Record) -> dict[str, tuple[object, object]]:
    """Settings of training and sampling in which two records differ: name, as "training steps" -> (value of a, of b).

    The hashes of the training data are among them, and so are the protocol and its version. Seeds, other hashes, Gflops and
    batch sizes are left out, as is a setting that one of the records does not state.
    """
    skipped = {  # `images` too, because it is steps x batch
        "seed", "checkpoint_sha256", "samples_sha256", "settings_hash", "recipe_hash", "gflops_per_image", "gflops", "auxiliary_gflops",
        "forward_gflops",
        "evaluations_mean", "evaluations_max",
        "decoder_gflops", "images", "micro_batch", "batch", "forked_at", "parent_sha256",
    }  # fmt: skip
    if a.backbone != b.backbone:
        skipped.add("plugins_sha256")  # the code of two networks
    differences: dict[str, tuple[object, object]] = {}
    for name in ("protocol", "protocol_version"):
        values = (getattr(a, name), getattr(b, name))
        if None not in values and values[0] != values[1]:
            differences[name.replace("_", " ")] = values
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
    first = next((each for each in records if each.training and each.training.dataset_sha256), records[0])
    for other in records:
        if _same_experiment(first, other):
            continue
        if _differ_in_unknown_seeds(first, other):
            raise UserError(
                f"{side} holds two checkpoints for {first.metric} at {sampling_text(first)} whose training seed is not known, "
                "so they cannot count as seeds of one experiment; name one run, or one record file"
            )
        steps = [record.training.steps if record.training else None for record in (first, other)]
        if steps[0] != steps[1]:
            what, remedy = f"training steps {steps[0]} and {steps[1]}", "narrow it with --step"
        else:
            what, remedy = f"{first.system} and {other.system}", "name one run, or one record file"
            if differences := differing(first, other):
                name, (value, other_value) = differences.popitem()  # the last one; one is enough for the message
                what = f"{name} {value} and {other_value}"
        raise UserError(f"{side} holds two results for {first.metric} at {sampling_text(first)} ({what}); {remedy}")
    if len({seeds_of(record) for record in records}) != len(records):
        raise UserError(
            f"{side} holds two results for {first.metric} at {sampling_text(first)} with the same seeds; name one run, or "
            "one record file"
        )
    return group_of_checkpoints(by_checkpoint(records))


def _same_experiment(a: Record, b: Record) -> bool:
    """Whether two records have one `experiment_key`. Training data and code of plug-ins count as equal where one
    record does not state them, as older records do not."""
    if a.training and b.training and None in (a.training.dataset_sha256, b.training.dataset_sha256):
        a, b = (_without(each, "dataset_sha256", "latents_sha256") for each in (a, b))
    if a.training and b.training and None in (a.training.plugins_sha256, b.training.plugins_sha256):
        a, b = (_without(each, "plugins_sha256") for each in (a, b))
    return experiment_key(a) == experiment_key(b)


def _differ_in_unknown_seeds(a: Record, b: Record) -> bool:
    """Whether two records are of one experiment, but of two checkpoints whose training seeds are not known."""
    if a.training is None or b.training is None or (a.training.seed, b.training.seed) != (None, None):
        return False
    return _same_experiment(_without(a, "checkpoint_sha256"), _without(b, "checkpoint_sha256"))


def _without(record: Record, *names: str) -> Record:
    """A copy of the record without these fields of its training."""
    assert record.training is not None
    unknown: dict[str, Any] = dict.fromkeys(names)
    return dataclasses.replace(record, training=dataclasses.replace(record.training, **unknown))


def verdict_of(metric: str, sampling: str, a: Group, b: Group, systems: int = 2) -> Verdict:
    """The verdict on two groups of one metric: by SEEDS_RULE if both have several training seeds, else by SAMPLING_RULE.

    sampling: the text of `Verdict.sampling`. systems: how many experiments are compared at once, of which these are two;
    the noise is then wider (`results.simultaneous`).
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

    largest_tie = degrees_of_freedom = if_trained_again = training_noise = None
    verdict, scope = "unknown", "these checkpoints"
    if min(len(a.seeds), len(b.seeds)) > 1:
        scope = "training seeds"
        welch = _welch(a, b)
        if welch is not None:
            largest_tie, degrees_of_freedom = welch[0] * widening(systems, welch[1]), welch[1]
            training_noise = "seeds"
            verdict = verdict_at(largest_tie)
    elif (noises := _facing(a, b, Group.sampling_noise)) is not None:
        degrees = min(noise.degrees for noise in noises)
        largest_tie = math.hypot(*(noise.half_width for noise in noises)) * widening(systems, degrees)
        verdict = verdict_at(largest_tie)
        if higher_is_better is not None:
            retrained = _largest_tie_if_trained_again(a, b, noises, systems)
            if retrained is not None:
                if_trained_again = verdict_at(max(retrained, largest_tie))
                training_noise = "seeds" if max(len(a.seeds), len(b.seeds)) > 1 else "published"
            else:
                if_trained_again = "tie" if verdict == "tie" else "unknown"
    return Verdict(
        metric=metric, sampling=sampling, a=a, b=b, difference=difference, largest_tie=largest_tie,
        degrees_of_freedom=degrees_of_freedom, scope=scope, verdict=verdict, if_trained_again=if_trained_again,
        training_noise=training_noise,
    )  # fmt: skip


def _facing(a: Group, b: Group, measure: Callable[..., Noise | None]) -> tuple[Noise, Noise] | None:
    """`measure(group, upward=...)` of both groups, on the side towards the other value; None if one is not known.

    Of equal values, neither side is that towards the other: the wider counts.
    """
    found = []
    for group, other in ((a, b), (b, a)):
        gap = other.value - group.value
        sides = [measure(group, upward=upward) for upward in (True, False) if (gap >= 0 if upward else gap <= 0)]
        known = [side for side in sides if side is not None]
        if not known:
            return None
        found.append(max(known, key=lambda side: side.half_width))
    return found[0], found[1]


def _largest_tie_if_trained_again(a: Group, b: Group, noises: tuple[Noise, Noise], systems: int) -> float | None:
    """The largest tie with the noise of training both sides again, of which one or both have one training seed.

    noises: of sampling, of both sides. None where the noise of training is neither measured nor published.
    """
    seeded, noise, other_noise = (a, noises[0], noises[1]) if len(a.seeds) > len(b.seeds) else (b, noises[1], noises[0])
    if (count := len(seeded.seeds)) > 1:
        # The other side is one more training, as noisy as the seeds of this one. What the seeds scatter by includes the
        # noise of sampling each of them; where the other side was sampled less often, its excess is added.
        spread = variance(seeded.means)
        excess = max(other_noise.squared_error - count * noise.squared_error, 0.0)
        degrees = float(count - 1)
        return student_t(degrees) * math.sqrt(spread * (1 + 1 / count) + excess) * widening(systems, degrees)
    if not all(_has_published_noise(record) for record in (*a.records, *b.records)):
        return None
    drawn = _facing(a, b, Group.noise_of_one_sampling)
    if drawn is None:
        return None
    trained = [
        max(RETRAINING * noise.half_width, student_t(math.inf) * RETRAINING_CV * abs(group.value))
        for group, noise in zip((a, b), drawn, strict=True)
    ]
    sampled = [noise.half_width for noise in noises]
    return math.hypot(*trained, *sampled) * widening(systems, min(noise.degrees for noise in noises))


def _has_published_noise(record: Record) -> bool:
    """Whether the noise of training is published for this measurement: RETRAINING and RETRAINING_CV."""
    return (record.metric, record.dataset, record.resolution) == ("fid", "imagenet", 256)


def _welch(a: Group, b: Group) -> tuple[float, float] | None:
    """(95 % half-width, degrees of freedom) of a.value - b.value, for seeds of unequal variances (Welch 1947).

    Seeds that all have one value, as a share of 0 or 1, do not show that training has no noise: if the variance of a side is
    0, the noise of sampling takes its place. None where that is not known either.
    """
    # (squared standard error of the mean, degrees of freedom) of each side
    squared_errors = [(variance(group.means) / len(group.means), len(group.means) - 1.0) for group in (a, b)]
    if any(squared == 0 for squared, _ in squared_errors):
        noises = _facing(a, b, Group.sampling_noise)
        if noises is None:
            return None
        squared_errors = [
            own if own[0] > 0 else (noise.squared_error, noise.degrees)
            for own, noise in zip(squared_errors, noises, strict=True)
        ]
    return welch(squared_errors)


def _reason_not_comparable(left: Cells, right: Cells) -> str:
    """Why no cell of one side may be compared with one of the other, by the example of the first group of each."""
    # of the items of `comparable_key`
    names = ("data set", "resolution", "N", "suite", "suite version", "features", "reference")
    if not left or not right:
        return f"{'A' if not left else 'B'} holds no records"
    record_a, record_b = next(iter(left.values())).records[0], next(iter(right.values())).records[0]
    for name, value_a, value_b in zip(names, comparable_key(record_a), comparable_key(record_b), strict=True):
        if value_a != value_b:
            return f"{name} is {value_a} in A and {value_b} in B"
    return "they share no metric at the same sampler and steps"
