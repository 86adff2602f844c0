"""Experiments: records that differ in seeds alone, as one group with its mean and the noise of sampling.

A group has the checkpoints of one experiment (training seeds), and for each its sample sets (sampling seeds).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, variance

from results.records import Record, Sampling, Training

CONFIDENCE = 0.975  # two-sided 95 %
BINOMIAL = ("clopper-pearson", "jeffreys")  # methods of intervals whose width needs no estimated variance
JACKKNIFE_DEGREES = 19  # of a jackknife of 20 blocks, also where a record does not state its method
KNOWN = 1000  # degrees of freedom of a binomial interval: so many that its variance counts as known
SMALL_P = 0.005  # below it in either tail, the spread over sampling seeds contradicts the intervals of the records
ALONG_TRAINING = ("steps", "images", "gflops", "auxiliary_gflops")  # fields of Training that grow along a training


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

    def sampling_noise(self, *, upward: bool) -> Noise | None:
        """The noise of `value` from the randomness of sampling; None where a record has no interval.

        For a checkpoint with several sampling seeds it follows from their spread and their intervals together, for any
        other from its record's interval. Intervals of shares, such as precision, are not symmetric. upward: take the side
        above the value, as in a comparison with a higher value; False: the side below it.
        """
        # The half-width of a mean of independent values is the root of the sum of their squared half-widths, divided by
        # their number: first over the checkpoints of a seed, then over the seeds.
        seed_half_widths, degrees = [], math.inf
        for checkpoints in self.seeds:
            noises = [noise for records in checkpoints if (noise := _noise(records, upward=upward)) is not None]
            if len(noises) < len(checkpoints):
                return None
            seed_half_widths.append(math.hypot(*(noise.half_width for noise in noises)) / len(noises))
            degrees = min(degrees, *(noise.degrees for noise in noises))
        return Noise(half_width=math.hypot(*seed_half_widths) / len(seed_half_widths), degrees=degrees)

    def noise_of_one_sampling(self, *, upward: bool) -> Noise | None:
        """As `sampling_noise`, that of one sampling of one checkpoint, on average over the checkpoints.

        Unlike that of `value`, it does not shrink with the number of sampling seeds.
        """
        squares, degrees = [], math.inf
        for records in self.checkpoints:
            noise = _noise(records, upward=upward)
            if noise is None:
                return None
            squares.append(noise.half_width**2 * len(records))
            degrees = min(degrees, noise.degrees)
        return Noise(half_width=math.sqrt(fmean(squares)), degrees=degrees)


@dataclass(frozen=True, kw_only=True)
class Noise:
    """A 95 % half-width, and the degrees of freedom of the standard error in it; inf: it is known."""

    half_width: float
    degrees: float

    @property
    def squared_error(self) -> float:
        """The squared standard error."""
        return (self.half_width / student_t(self.degrees)) ** 2


def _noise(records: Sequence[Record], *, upward: bool) -> Noise | None:
    """The noise of the mean of one checkpoint's records, which differ in the sampling seed, as `Group.sampling_noise`.

    The spread over k sampling seeds and the intervals of their records estimate the same variance of one sampling, the
    spread with k - 1 degrees of freedom and each jackknife with 19. Both are pooled, weighted by their degrees: alone, the
    spread of two seeds, with Student's t of 12.7, would be worth less than the interval of one. Where three seeds or more
    contradict the intervals (F test at 1 %, two-sided), the intervals are wrong, and the spread counts alone.
    """
    singles = [single for record in records if (single := interval_noise(record, upward=upward)) is not None]
    if len(records) == 1:
        return singles[0] if singles else None
    spread, degrees = variance([record.value for record in records]), float(len(records) - 1)
    if len(singles) == len(records):
        within_degrees = math.fsum(single.degrees for single in singles)
        within = math.fsum(single.degrees * single.squared_error for single in singles) / within_degrees
        if not (len(records) > 2 and _contradict(spread, degrees, within, within_degrees)):
            spread = (degrees * spread + within_degrees * within) / (degrees + within_degrees)
            degrees += within_degrees
    return Noise(half_width=student_t(degrees) * math.sqrt(spread / len(records)), degrees=degrees)


def interval_noise(record: Record, *, upward: bool) -> Noise | None:
    """The noise of one record by its interval; None without one."""
    if record.low is None or record.high is None:
        return None
    blocks = re.search(r"jackknife-(\d+)", record.interval or "")
    if blocks:
        degrees = max(int(blocks[1]) - 1, 1)
    elif record.interval in BINOMIAL:
        degrees = KNOWN
    else:
        degrees = JACKKNIFE_DEGREES
    return Noise(half_width=record.high - record.value if upward else record.value - record.low, degrees=float(degrees))


def _contradict(spread: float, degrees: float, within: float, within_degrees: float) -> bool:
    """Whether two variances, spread and within, with these degrees of freedom, differ by an F test at 1 %, two-sided."""
    from scipy.special import fdtr

    if within == 0:
        return spread > 0
    share = float(fdtr(degrees, within_degrees, spread / within))
    return not SMALL_P <= share <= 1 - SMALL_P


def group_of(records: Iterable[Record]) -> Group:
    """The records of one experiment as a group. If several have the same seeds, the one with the smallest id is taken."""
    by_seeds: dict[tuple, Record] = {}
    for record in sorted(records, key=lambda record: record.id):
        by_seeds.setdefault(seeds_of(record), record)
    return group_of_checkpoints(by_checkpoint(by_seeds.values()))


def by_checkpoint(records: Iterable[Record]) -> dict[tuple, list[Record]]:
    """`_checkpoint_key` -> records."""
    checkpoints: dict[tuple, list[Record]] = {}
    for record in records:
        checkpoints.setdefault(_checkpoint_key(record), []).append(record)
    return checkpoints


def _checkpoint_key(record: Record) -> tuple:
    """(training seed, sha256 of the checkpoint); (None, None) where the training is not known."""
    return (record.training.seed, record.training.checkpoint_sha256) if record.training else (None, None)


def seeds_of(record: Record) -> tuple:
    """(`_checkpoint_key`, sampling seed): different for any two records of one group."""
    return (_checkpoint_key(record), record.sampling.seed if record.sampling else None)


def group_of_checkpoints(checkpoints: dict[tuple, list[Record]]) -> Group:
    """The group of these checkpoints (`_checkpoint_key` -> records), in the order of their keys."""
    ordered = sorted(checkpoints.items(), key=lambda item: str(item[0]))  # as text, because keys may hold None
    return Group(checkpoints=tuple(tuple(records) for _, records in ordered))


def experiment_key(record: Record) -> tuple:
    """A key that is equal for records of one experiment, that is, for those that differ only in seeds.

    It leaves out metric and value, seeds, hashes of checkpoints and samples, and batch sizes that move only low bits. Its
    last entry is the sampling; the others are the training. Checkpoints whose training seed is not known are experiments
    of their own, because they may be the same seed, or differ in more than seeds.
    """
    training = record.training
    return (
        record.system,
        record.backbone,
        record.framework,
        record.protocol,
        record.protocol_version,
        training and (*_training_key(training), training.checkpoint_sha256 if training.seed is None else None),
        record.sampling and _sampling_key(record.sampling.without_counts),
    )


def _fields_except(part: type, *names: str) -> operator.attrgetter:
    """A function from a `part` (Training or Sampling) to the tuple of its fields other than `names`."""
    return operator.attrgetter(*(field.name for field in dataclasses.fields(part) if field.name not in names))


_training_key = _fields_except(Training, "seed", "checkpoint_sha256", "micro_batch", "forked_at", "parent_sha256")


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


@functools.lru_cache(maxsize=4096)
def student_t(degrees: float, quantile: float = CONFIDENCE) -> float:
    """A quantile of Student's t, by default that of 97.5 %. degrees: of freedom, above 0, not necessarily an integer; inf: of
    a normal."""
    from scipy.special import ndtri, stdtrit  # what scipy.stats.t.ppf calls; scipy.stats takes a second to import

    return float(ndtri(quantile) if math.isinf(degrees) else stdtrit(degrees, quantile))


def welch(squared_errors: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(95 % half-width, degrees of freedom) of a difference of two means, of unequal variances (Welch 1947, Satterthwaite).

    squared_errors: of each mean, with its degrees of freedom.
    """
    total = math.fsum(squared for squared, _ in squared_errors)
    if total == 0:  # neither the seed nor sampling changes anything
        return 0.0, math.inf
    degrees = total**2 / sum(squared**2 / each for squared, each in squared_errors)
    return student_t(degrees) * math.sqrt(total), degrees
