"""How much of the spread is whose: variances over training seeds and over sampling seeds, and the seeds that they ask for.

A value is modelled as mean + effect of the training seed + effect of the sampling (random effects, one-way layout: sampling
seeds within training seeds; Searle, Casella and McCulloch, "Variance Components", 1992, ch. 3). The two components are the
analysis of variance's, which are unbiased; one below 0 is 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, variance

LEVEL = 0.95
POWER = 0.8  # chance that a difference which is there is found
ALPHA = 0.05  # chance that a difference which is not there is found; two-sided
MAX_SEEDS = 1000


@dataclass(frozen=True, kw_only=True)
class Components:
    """Variances of one system in one metric.

    training: the variance over training seeds of a checkpoint's true value. sampling: of one sampling of a checkpoint.
    ratio_low, ratio_high: 95 % interval of training / sampling, exact for normal effects (F distribution). seeds: training
    seeds. samplings: sampling seeds of each.
    """

    mean: float
    training: float
    sampling: float
    ratio_low: float
    ratio_high: float
    seeds: int
    samplings: int

    @property
    def training_cv(self) -> float:
        """Standard deviation over training seeds as a share of the mean."""
        return math.sqrt(self.training) / abs(self.mean)

    @property
    def sampling_cv(self) -> float:
        """Standard deviation over samplings of one checkpoint as a share of the mean."""
        return math.sqrt(self.sampling) / abs(self.mean)

    def seeds_needed(self, difference: float) -> int | None:
        """Training seeds of each of two systems, each sampled once, with which Welch's test finds a relative difference.

        difference: of the means, as a share of the mean. None: more than MAX_SEEDS.
        """
        return seeds_needed(difference * abs(self.mean), math.sqrt(self.training + self.sampling))


def components(values: Sequence[Sequence[float]]) -> Components | None:
    """The variances of values[training seed][sampling seed], with equally many sampling seeds; None where they cannot be told.

    They cannot with fewer than two seeds of either kind, or where a checkpoint's values are all equal.
    """
    from scipy.special import fdtri

    seeds, samplings = len(values), len(values[0]) if values else 0
    if seeds < 2 or samplings < 2 or any(len(each) != samplings for each in values):
        return None
    within = fmean(variance(each) for each in values)  # mean square within training seeds
    if within == 0:
        return None
    means = [fmean(each) for each in values]
    between = samplings * variance(means)  # mean square between training seeds
    degrees = (seeds - 1, seeds * (samplings - 1))
    tail = (1 - LEVEL) / 2
    # between / within, over (1 + samplings * ratio), has an F distribution
    low, high = ((between / within / float(fdtri(*degrees, share)) - 1) / samplings for share in (1 - tail, tail))
    return Components(
        mean=fmean(means), training=max((between - within) / samplings, 0.0), sampling=within,
        ratio_low=max(low, 0.0), ratio_high=max(high, 0.0), seeds=seeds, samplings=samplings,
    )  # fmt: skip


def seeds_needed(difference: float, deviation: float) -> int | None:
    """The seeds of each of two systems, at least 2, with which the test of equal means has POWER at level ALPHA.

    difference: of the true means. deviation: standard deviation of one seed's value, the same for both systems. The test is
    two-sided Student's with 2 n - 2 degrees of freedom, which Welch's is for equal variances. None: more than MAX_SEEDS.
    """
    from scipy.special import nctdtr, stdtrit

    if deviation == 0:
        return 2

    def power(n: int) -> float:
        degrees, shift = 2 * n - 2, difference / deviation * math.sqrt(n / 2)
        limit = float(stdtrit(degrees, 1 - ALPHA / 2))
        return 1 - float(nctdtr(degrees, shift, limit)) + float(nctdtr(degrees, shift, -limit))

    # Many seeds: the normal approximation says where to begin, a few below the answer.
    about = 2 * (deviation / difference * 2.8) ** 2
    if about > 2 * MAX_SEEDS:
        return None
    first = max(2, int(0.9 * about) - 2)
    return next((n for n in range(first, MAX_SEEDS + 1) if power(n) >= POWER), None)
