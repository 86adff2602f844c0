"""Variance components against draws with known variances, and the number of seeds against simulated tests."""

import numpy as np
import pytest
from scipy import stats

from results.variances import components, seeds_needed


def draws(random, training, sampling, seeds=5, samplings=5, mean=50.0):
    effects = random.normal(0, np.sqrt(training), (seeds, 1))
    return mean + effects + random.normal(0, np.sqrt(sampling), (seeds, samplings))


def test_components_by_hand():
    # two seeds with means 10 and 14, values one apart: within 0.5, between 2 * 8 = 16
    found = components([[9.5, 10.5], [13.5, 14.5]])
    assert (found.mean, found.sampling, found.training) == (12, 0.5, pytest.approx((16 - 0.5) / 2))
    assert found.training_cv == pytest.approx(np.sqrt(7.75) / 12)
    ratios = [(16 / 0.5 / stats.f.ppf(share, 1, 2) - 1) / 2 for share in (0.975, 0.025)]
    assert [found.ratio_low, found.ratio_high] == pytest.approx([max(ratios[0], 0), ratios[1]])


@pytest.mark.parametrize("values", [[], [[1.0, 2.0]], [[1.0], [2.0]], [[1.0, 2.0], [1.0]], [[1.0, 1.0], [2.0, 2.0]]])
def test_what_cannot_be_told(values):
    assert components(values) is None


@pytest.mark.parametrize(("training", "sampling"), [(4.0, 1.0), (0.25, 1.0), (0.0, 1.0)])
def test_components_are_right_on_average_and_the_interval_covers(training, sampling):
    random = np.random.default_rng(1)
    found = [components(draws(random, training, sampling).tolist()) for _ in range(1000)]
    assert np.mean([each.sampling for each in found]) == pytest.approx(sampling, rel=0.03)
    if training > 1:  # of small ones, the zeros in place of negative values raise the mean
        assert np.mean([each.training for each in found]) == pytest.approx(training, rel=0.08)
    covered = np.mean([each.ratio_low <= training / sampling <= each.ratio_high for each in found])
    # at 0 the lower end never misses, for it is not below 0
    assert 0.93 < covered < 0.995


@pytest.mark.parametrize(("difference", "deviation"), [(1.0, 1.0), (2.0, 1.0), (1.0, 2.0)])
def test_that_many_seeds_find_the_difference_and_one_less_does_not(difference, deviation):
    n = seeds_needed(difference, deviation)
    random = np.random.default_rng(0)

    def found(n):
        a = random.normal(0, deviation, (20_000, n))
        b = random.normal(difference, deviation, (20_000, n))
        return (stats.ttest_ind(a, b, axis=1).pvalue < 0.05).mean()

    assert found(n) > 0.79
    assert found(n - 1) < 0.805


def test_extremes_of_the_number_of_seeds():
    assert seeds_needed(1.0, 0.0) == seeds_needed(1.0, 0.01) == 2
    assert seeds_needed(0.001, 1.0) is None
