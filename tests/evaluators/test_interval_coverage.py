"""Do 95 % intervals cover? 200 sets are drawn; the truth is the estimator's mean over many more sets of the same size."""

import numpy as np
import pytest

from evaluators import frechet, inception_score, kernel_distance, precision_recall
from evaluators.intervals import Estimate, assign_blocks, block_sums, interval
from evaluators.statistics import statistics

N, SETS = 160, 200
REFERENCE = np.random.RandomState(1).randn(240, 8)
REFERENCE_STATISTICS = statistics(REFERENCE)
WIDE_REFERENCE = np.random.RandomState(2).randn(240, 90)  # more dimensions than samples
CLASSES = np.random.RandomState(3).randn(8, 10)

CASES = {
    # name: (dimensions, scale, shift, further sets for the truth, estimator)
    "fd": (8, 1.2, 0.3, 300, lambda x, b: frechet.estimate(x, REFERENCE_STATISTICS, b)),
    "kid": (8, 1.2, 0.3, 800, lambda x, b: kernel_distance.estimate(x, REFERENCE, b)),
    "kid-equal": (8, 1.0, 0.0, 800, lambda x, b: kernel_distance.estimate(x, REFERENCE, b)),
    "is": (8, 1.2, 0.3, 800, lambda x, b: inception_score.estimate(x @ CLASSES, b)),
    "precision": (8, 1.2, 0.3, 200, lambda x, b: precision_recall.estimate(x, REFERENCE, b)[0]),
    "recall": (8, 1.2, 0.3, 200, lambda x, b: precision_recall.estimate(x, REFERENCE, b)[1]),
    "recall-narrow": (8, 0.7, 0.0, 200, lambda x, b: precision_recall.estimate(x, REFERENCE, b)[1]),
}


@pytest.mark.parametrize("case", CASES)
def test_interval_covers_the_expectation_in_90_to_99_percent(case):
    dim, scale, shift, more, estimator = CASES[case]
    r = np.random.RandomState(5)
    block = assign_blocks(N)
    draws = [estimator(scale * r.randn(N, dim) + shift, block) for _ in range(SETS + more)]
    truth = np.mean([e.value for e in draws])
    bars = [interval(e) for e in draws[:SETS]]
    covered = np.mean([bar.low <= truth <= bar.high for bar in bars])
    assert 0.90 <= covered <= 0.99, covered


def test_interval_of_fewer_samples_than_dimensions_covers():
    r = np.random.RandomState(5)
    n, reference, block = 60, statistics(WIDE_REFERENCE), assign_blocks(60)
    draws = [frechet.estimate(1.1 * r.randn(n, 90) + 0.1, reference, block) for _ in range(SETS)]
    truth = np.mean([e.value for e in draws])
    covered = np.mean([bar.low <= truth <= bar.high for bar in map(interval, draws)])
    assert 0.90 <= covered <= 0.99, covered


def test_interval_of_a_mean_is_students():
    x = np.random.RandomState(0).randn(20)
    sums = x.sum() - block_sums(x, np.arange(20))
    bar = interval(Estimate(value=x.mean(), left_out=sums / 19))
    assert bar.method == "jackknife-20"
    assert (bar.low + bar.high) / 2 == pytest.approx(x.mean(), abs=1e-12)
    assert bar.high - x.mean() == pytest.approx(2.093024 * x.std(ddof=1) / np.sqrt(20), rel=1e-6)


def test_a_share_of_0_or_1_has_the_binomial_interval():
    bar = interval(Estimate(value=0.0, left_out=np.zeros(20), trials=1000))
    assert (bar.low, bar.method) == (0.0, "clopper-pearson")
    assert (1 - bar.high) ** 1000 == pytest.approx(0.025, rel=1e-9)
    bar = interval(Estimate(value=1.0, left_out=np.ones(20), trials=1000))
    assert bar.high == 1.0 and bar.low == pytest.approx(0.996318, abs=1e-6)


def test_no_interval_where_the_blocks_agree():
    bar = interval(Estimate(value=0.1, left_out=0.1 * np.repeat([1, 1 + 1e-16], 10)))
    assert (bar.low, bar.high, bar.method) == (None, None, "none")


@pytest.mark.parametrize("n", [1, 19, 20, 1000, 1797])
def test_blocks_are_balanced_and_fixed(n):
    block = assign_blocks(n)
    counts = np.bincount(block)
    assert len(counts) == min(n, 20) and counts.max() - counts.min() <= 1
    np.testing.assert_array_equal(block, assign_blocks(n))
    if n == 1000:
        for labels in (np.arange(n) % 10, np.arange(n) // 100):  # no block is a class
            assert all(len(np.unique(labels[block == b])) >= 8 for b in range(20))
