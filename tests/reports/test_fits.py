"""Statistics of scaling against known laws, against numpy, and their intervals against simulation."""

import math

import numpy as np
import pytest

from reports.fits import FEWEST, correlation, frontier, interpolate, power_law


def test_a_known_law_is_recovered_exactly():
    xs = [0.5, 2.0, 7.0, 31.0, 118.6]
    law = power_law(xs, [150 * x**-0.37 for x in xs])
    assert law.exponent == pytest.approx(-0.37, abs=1e-12) and law.factor == pytest.approx(150, rel=1e-12)
    assert law.scatter == pytest.approx(0, abs=1e-12) and law.low == pytest.approx(law.high)
    assert law.at(10.0) == pytest.approx(150 * 10**-0.37)
    assert law.reaches(0.5) and law.reaches(118.6) and not law.reaches(0.49) and not law.reaches(119)


def test_the_fit_is_that_of_numpy_and_its_interval_that_of_the_textbook():
    rng = np.random.default_rng(3)
    xs = rng.uniform(0.3, 120, 12)
    ys = 138 * xs**-0.36 * np.exp(rng.normal(0, 0.2, 12))
    law = power_law(list(xs), list(ys))
    (slope, offset), covariance = np.polyfit(np.log(xs), np.log(ys), 1, cov=True)
    assert law.exponent == pytest.approx(slope) and law.factor == pytest.approx(math.exp(offset))
    student = 2.228138851964939  # 97.5 % quantile at 10 degrees of freedom
    assert law.high - law.exponent == pytest.approx(student * math.sqrt(covariance[0, 0]))
    x = 30.0
    spread = math.sqrt(np.array([math.log(x), 1]) @ covariance @ np.array([math.log(x), 1]))
    assert law.interval(x)[1] == pytest.approx(law.at(x) * math.exp(student * spread))
    wide = math.sqrt(spread**2 + law.scatter**2)
    assert law.prediction(x) == pytest.approx(
        (law.at(x) / math.exp(student * wide), law.at(x) * math.exp(student * wide))
    )


def test_intervals_cover_what_they_say():
    """Of 2,000 studies of 5 points with a known law, 95 % have each interval over the truth (binomial: 94.0 to 96.0)."""
    rng = np.random.default_rng(0)
    xs, new = [1.0, 3.0, 10.0, 30.0, 100.0], 50.0
    hits = np.zeros(3)
    for _ in range(2000):
        law = power_law(xs, [80 * x**-0.4 * math.exp(rng.normal(0, 0.15)) for x in xs])
        truth, seen = 80 * new**-0.4, 80 * new**-0.4 * math.exp(rng.normal(0, 0.15))
        low, high = law.interval(new)
        below, above = law.prediction(new)
        hits += [law.low <= -0.4 <= law.high, low <= truth <= high, below <= seen <= above]
    assert (abs(hits / 2000 - 0.95) < 0.0147).all()  # 3 standard errors


def with_floor(rng, xs, floor=5.0, scatter=0.03):
    return [(floor + 60 * x**-0.5) * math.exp(rng.normal(0, scatter)) for x in xs]


def test_a_floor_is_found_and_its_predictions_far_beyond_cover():
    """12 points with a floor of 5: of laws without one, 0 to 27 % of predictions ten times beyond covered; seen to fail so."""
    rng, xs, beyond, trials = np.random.default_rng(3), list(np.geomspace(0.3, 120, 12)), 1200.0, 30
    found = covered = truths = 0
    for _ in range(trials):
        law = power_law(xs, with_floor(rng, xs))
        seen = (5 + 60 * beyond**-0.5) * math.exp(rng.normal(0, 0.03))
        low, high = law.prediction(beyond)
        below, above = law.interval(beyond)
        found += law.extrapolates
        covered += law.extrapolates and low <= seen <= high
        truths += law.extrapolates and below <= 5 + 60 * beyond**-0.5 <= above
    assert found > 0.9 * trials and covered > 0.79 * found and truths > 0.79 * found  # 95 %, less 4 standard errors
    assert law.low <= law.exponent <= law.high and law.floor < law.at(beyond) < law.at(120.0)


def test_where_there_is_no_floor_none_is_taken():
    """So such a law is not extrapolated, rarely by mistake, and its bend is significant in 5 %."""
    rng, xs, trials = np.random.default_rng(4), list(np.geomspace(0.3, 120, 12)), 30
    laws = [power_law(xs, with_floor(rng, xs, floor=0.0, scatter=0.1)) for _ in range(trials)]
    assert sum(law.extrapolates for law in laws) <= 0.05 * trials + 3
    assert sum(law.bend is not None and law.bend < 0.05 for law in laws) <= 0.05 * trials + 5


def test_few_points_on_a_floor_show_their_lack_of_fit():
    xs = [0.3, 2.0, 12.0, 70.0, 400.0]
    law = power_law(xs, with_floor(np.random.default_rng(5), xs, scatter=0.01))
    assert not law.extrapolates and law.bend < 0.01  # too few for a floor, enough to see that the line bends
    assert (
        power_law(xs[:4], [9, 6, 5, 4.5]).bend is not None and power_law(xs, [150 * x**-0.4 for x in xs]).bend is None
    )


def test_points_without_a_logarithm_are_counted():
    law = power_law([1, 2, 3, 4, 5, 0], [5, 4, 3, 2.5, -1, 3])
    assert (law.n, law.left_out) == (4, 2)


def test_too_little_for_a_law():
    assert power_law([1, 2, 3], [3, 2, 1]) is None and FEWEST == 4
    assert power_law([1, 2, 3, 0], [4, 3, 2, 1]) is None and power_law([1, 2, 3, 4], [4, 3, 2, -1]) is None
    assert power_law([5, 5, 5, 5], [4, 3, 2, 1]) is None


def test_correlation():
    rng = np.random.default_rng(1)
    xs = rng.normal(size=20)
    ys = 0.6 * xs + rng.normal(size=20)
    found = correlation(list(xs), list(ys))
    assert found.r == pytest.approx(np.corrcoef(xs, ys)[0, 1])
    assert math.atanh(found.high) - math.atanh(found.r) == pytest.approx(1.959963984540054 / math.sqrt(17))
    assert math.atanh(found.r) - math.atanh(found.low) == pytest.approx(1.959963984540054 / math.sqrt(17))
    assert correlation([1, 2], [1, 2]) is None and correlation([1, 1, 1], [1, 2, 3]) is None
    line = correlation([1, 2, 3, 4], [2, 4, 6, 8])
    assert (line.r, line.low, line.high) == (1.0, None, None)


def test_frontier():
    points = [(3, 5), (1, 9), (2, 9), (4, 5), (2, 7), (5, 1), (2, 7)]
    assert frontier(points, "lower") == [1, 4, 0, 5]
    assert frontier([(cost, -quality) for cost, quality in points], "higher") == [1, 4, 0, 5]
    assert frontier([], "lower") == []


def test_curves_are_read_between_their_points_and_never_beyond():
    xs = [1.0, 10.0, 1000.0]
    assert interpolate(xs, [100 * x**-0.5 for x in xs], 50.0) == pytest.approx(100 * 50**-0.5)
    assert interpolate(xs, [-1.0, 0.0, 1.0], 100.0) == pytest.approx(0.5)
    assert interpolate(xs, xs, 0.9) is None and interpolate(xs, xs, 1001) is None and interpolate([], [], 1) is None
    assert interpolate([2.0], [3.0], 2.0) == 3.0 and interpolate(xs, xs, 1000.0) == pytest.approx(1000.0)


def test_two_points_of_equal_budget_are_their_mean():
    """They divided by zero."""
    assert interpolate([1.0, 1.0, 10.0], [4.0, 6.0, 1.0], 1.0) == 5.0
    assert interpolate([1.0, 10.0, 10.0], [4.0, 1.0, 3.0], 10.0) == 2.0
    assert interpolate([1.0, 10.0, 10.0, 100.0], [4.0, 1.0, 3.0, 3.0], 50.0) == pytest.approx(3.0)
    assert interpolate([7.0, 7.0], [4.0, 5.0], 7.0) == 4.5
