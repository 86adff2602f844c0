"""Statistics of scaling: power laws with intervals, correlation, the Pareto frontier, interpolation of curves.

A power law is y = floor + factor * x ** exponent. Without a floor it is a straight line in log-log space, fitted by ordinary
least squares, with the closed-form intervals of linear regression (Student's t with n - 2 degrees of freedom). With a floor,
ln y is fitted by least squares too, and intervals are those of the profile likelihood (t with n - 3 degrees). Both assume
that ln y scatters equally, normally and independently about the law. `power_law` takes a floor where the corrected
Akaike criterion of six points or more asks for one.

Outside the range of its points (`PowerLaw.reaches`) a law extrapolates. A Frechet distance has a floor (its bias at N, and
what no larger model reaches), and a law without one predicts values below it however narrow its interval: of 95 % intervals
ten times beyond the points, 0 to 27 % cover. So only a law with a floor may be extrapolated (`PowerLaw.extrapolates`).
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from statistics import NormalDist, fmean

import numpy as np

from results.experiments import student_t

FEWEST = 4  # points that a power law needs, so that two degrees of freedom are left for its scatter
FEWEST_WITH_FLOOR = 6  # points that the corrected Akaike criterion needs with a floor
CONFIDENCE = 0.95
_GRID = 40  # exponents and floors of one search
_STEEPEST, _FLATTEST = -6.0, -0.01  # exponents of a law with a floor


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PowerLaw:
    """A fitted law y = floor + factor * x ** exponent."""

    exponent: float
    low: float  # lower end of the exponent's 95 % interval
    high: float  # upper end
    factor: float
    floor: float = 0.0  # 0: the law has none
    n: int  # number of points
    left_out: int = 0  # points with x or y not above 0, which have no logarithm
    scatter: float  # standard deviation of ln y about the law, n - 2 degrees of freedom (n - 3 with a floor)
    bend: float | None = None  # p-value of a curve in log-log space (of a law without a floor); None: not tested
    lowest: float  # smallest x of the points
    highest: float  # largest x
    mean: float  # mean of ln x over the points
    spread: float  # sum of squares of ln x about its mean
    likely: np.ndarray | None = (
        None  # with a floor: (P, 3), the laws (floor, factor, exponent) on the edge of the region
    )
    # whose projections are 95 % intervals

    @property
    def extrapolates(self) -> bool:
        """Whether the law may be read outside the range of its points."""
        return self.floor > 0

    @property
    def degrees(self) -> int:
        """Degrees of freedom of the scatter."""
        return self.n - (3 if self.floor > 0 else 2)

    def at(self, x: float) -> float:
        """The value of the law at x."""
        return self.floor + self.factor * x**self.exponent

    def interval(self, x: float) -> tuple[float, float]:
        """95 % interval of the law at x."""
        return self._interval(x, extra_variance=0.0)

    def prediction(self, x: float) -> tuple[float, float]:
        """95 % interval of a new measurement at x."""
        return self._interval(x, extra_variance=1.0)

    def reaches(self, x: float) -> bool:
        """Whether x lies in the range of the points."""
        return self.lowest <= x <= self.highest

    def _interval(self, x: float, *, extra_variance: float) -> tuple[float, float]:
        """95 % interval at x. extra_variance: of a new measurement about the law, in units of scatter**2."""
        student = student_t(self.degrees)
        if self.likely is not None:
            values = np.log(self.likely[:, 0] + self.likely[:, 1] * x ** self.likely[:, 2])
            centre, new = math.log(self.at(x)), student * self.scatter * math.sqrt(extra_variance)
            below, above = max(centre - float(values.min()), 0.0), max(float(values.max()) - centre, 0.0)
            return math.exp(centre - math.hypot(below, new)), math.exp(centre + math.hypot(above, new))
        error = self.scatter * math.sqrt(extra_variance + 1 / self.n + (math.log(x) - self.mean) ** 2 / self.spread)
        factor = math.exp(student * error)
        return self.at(x) / factor, self.at(x) * factor


def power_law(xs: Sequence[float], ys: Sequence[float]) -> PowerLaw | None:
    """The law fitted to the points with x and y above 0; None if they are fewer than FEWEST, or all at one x."""
    points = [(math.log(x), math.log(y)) for x, y in zip(xs, ys, strict=True) if x > 0 and y > 0]
    if len(points) < FEWEST:
        return None
    n = len(points)
    mean_x, mean_y = math.fsum(x for x, _ in points) / n, math.fsum(y for _, y in points) / n
    spread = math.fsum((x - mean_x) ** 2 for x, _ in points)
    if spread < 1e-12:  # one x; by rounding, the sum is not exactly 0
        return None
    exponent = math.fsum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    offset = mean_y - exponent * mean_x
    residual = math.fsum((y - offset - exponent * x) ** 2 for x, y in points)
    scatter = math.sqrt(residual / (n - 2))
    half = student_t(n - 2) * scatter / math.sqrt(spread)
    law = PowerLaw(
        exponent=exponent,
        low=exponent - half,
        high=exponent + half,
        factor=math.exp(offset),
        n=n,
        left_out=len(xs) - n,
        scatter=scatter,
        bend=_bend([x - mean_x for x, _ in points], [y for _, y in points], residual),
        lowest=math.exp(min(x for x, _ in points)),
        highest=math.exp(max(x for x, _ in points)),
        mean=mean_x,
        spread=spread,
    )
    return _with_floor(law, np.array(points), residual) or law


def _bend(xs: Sequence[float], ys: Sequence[float], residual: float) -> float | None:
    """p-value of the square in a regression of y on x and x**2; None where it has no degree of freedom or no meaning.

    residual: sum of squares about the straight line.
    """
    from scipy.special import fdtrc

    degrees = len(xs) - 3
    if degrees < 1 or len({round(x, 9) for x in xs}) < 3 or residual <= 1e-20 * len(xs):
        return None
    design = np.stack([np.ones(len(xs)), np.array(xs), np.array(xs) ** 2], axis=1)
    solution = np.linalg.lstsq(design, np.array(ys), rcond=None)[0]
    curved = float(np.sum((np.array(ys) - design @ solution) ** 2))
    if curved <= 1e-12 * residual:
        return 0.0
    return float(fdtrc(1, degrees, max(residual - curved, 0.0) / curved * degrees))


def _with_floor(law: PowerLaw, points: np.ndarray, residual: float) -> PowerLaw | None:
    """The law with a floor, if the corrected Akaike criterion prefers it to `law`; else None.

    points: (n, 2), ln x and ln y. residual: sum of squares about `law`. Only falling laws can have a floor.
    """
    n = len(points)
    if n < FEWEST_WITH_FLOOR or law.exponent >= 0 or residual <= 1e-20 * n or len(np.unique(points[:, 0])) < 4:
        return None
    x, y = points[:, 0] - law.mean, points[:, 1]
    lowest = math.exp(y.min())
    # A grid of exponents and of floors as shares of the lowest y, searched twice: of all, and around the best.
    exponents = -np.geomspace(-_FLATTEST, -_STEEPEST, _GRID)
    shares = np.linspace(0.0, 1.2, _GRID)
    for _ in range(4):
        sums, _, _ = _profile(x, y, exponents, shares * lowest)
        e, f = np.unravel_index(int(np.argmin(sums)), sums.shape)
        exponents, shares = _around(exponents, int(e)), _around(shares, int(f))
    sums, factors, _ = _profile(x, y, exponents, shares * lowest)
    e, f = np.unravel_index(int(np.argmin(sums)), sums.shape)
    best, floor, exponent, factor = float(sums[e, f]), float(shares[f] * lowest), float(exponents[e]), factors[e, f]

    def criterion(sum_of_squares: float, parameters: int) -> float:
        k = parameters + 1  # the scatter is one more
        return n * math.log(max(sum_of_squares, 1e-300) / n) + 2 * k + 2 * k * (k + 1) / (n - k - 1)

    if floor <= 0 or criterion(best, 3) >= criterion(residual, 2):
        return None
    likely = _region(x, y, best * (1 + student_t(n - 3) ** 2 / (n - 3)), (floor, exponent), lowest)
    # factors are at the mean of ln x; of x itself they are multiplied by exp(-exponent * mean)
    likely[:, 1] *= np.exp(-likely[:, 2] * law.mean)
    return dataclasses.replace(
        law,
        exponent=exponent,
        low=min(float(likely[:, 2].min()), exponent),
        high=max(float(likely[:, 2].max()), exponent),
        factor=float(factor * math.exp(-exponent * law.mean)),
        floor=floor,
        scatter=math.sqrt(best / (n - 3)),
        bend=None,
        likely=likely,
    )


def _around(grid: np.ndarray, place: int) -> np.ndarray:
    """As many evenly spaced values from two places before `place` in the ascending grid to two after it."""
    low, high = max(place - 2, 0), min(place + 2, len(grid) - 1)
    return np.linspace(float(grid[low]), float(grid[high]), len(grid))


def _region(x: np.ndarray, y: np.ndarray, most: float, best: tuple[float, float], lowest: float) -> np.ndarray:
    """(P, 3): laws (floor, factor, exponent) whose sum of squares is `most`: the edge of their confidence region.

    x: centred ln x. best: floor and exponent of the best law. lowest: smallest y. Floors are at least 0.
    """
    # first the range of floors and exponents in the region, then a fine grid in it
    exponents = -np.geomspace(-_FLATTEST, -_STEEPEST, 2 * _GRID)
    exponents = np.sort(np.append(exponents, best[1]))
    floors = np.sort(np.append(np.linspace(0.0, 1.2 * lowest, 2 * _GRID), best[0]))
    for _ in range(2):
        sums, _, _ = _profile(x, y, exponents, floors)
        inside = sums <= most
        rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
        span = [
            (values[max(found[0] - 1, 0)], values[min(found[-1] + 1, len(values) - 1)])
            for values, found in ((exponents, rows), (floors, columns))
        ]
        exponents = np.sort(np.append(np.linspace(*span[0], 2 * _GRID), best[1]))
        floors = np.sort(np.append(np.linspace(*span[1], 2 * _GRID), best[0]))
    sums, factors, curvature = _profile(x, y, exponents, floors)
    e, f = np.nonzero(sums <= most)
    # At each floor and exponent, the factors whose sum of squares is `most`: to second order in the factor's logarithm.
    reach = np.sqrt((most - sums[e, f]) / curvature[e, f])
    laws = [np.stack([floors[f], factors[e, f] * np.exp(side * reach), exponents[e]], axis=1) for side in (-1, 1)]
    return np.concatenate(laws)


def _profile(
    x: np.ndarray, y: np.ndarray, exponents: np.ndarray, floors: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each exponent and floor, the least sum of squares of y - ln(floor + factor exp(exponent x)) over factors.

    Returns (sums, factors, curvature of the sum in ln factor, halved), each (exponents, floors); Gauss-Newton steps.
    """
    power = np.exp(exponents[:, None, None] * x)  # (E, 1, n)
    floor = floors[None, :, None]  # (1, F, 1)
    log_factor = np.full((len(exponents), len(floors), 1), float(np.mean(y)))
    for step in range(9):
        raised = np.exp(log_factor) * power
        value = floor + raised
        error, slope = y - np.log(value), raised / value  # slope: of ln value in ln factor
        curvature = np.sum(slope * slope, axis=2, keepdims=True)
        if step < 8:
            log_factor = log_factor + np.clip(np.sum(slope * error, axis=2, keepdims=True) / (curvature + 1e-12), -2, 2)
    return np.sum(error * error, axis=2), np.exp(log_factor[..., 0]), curvature[..., 0] + 1e-12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Correlation:
    """Pearson's r of n points with its 95 % interval by Fisher's z; no interval (None) below 4 points or if |r| is 1."""

    r: float
    low: float | None
    high: float | None
    n: int


def correlation(xs: Sequence[float], ys: Sequence[float]) -> Correlation | None:
    """Pearson's correlation with its interval; None for fewer than 3 points, or if x or y is constant."""
    n = len(xs)
    if n < 3:
        return None
    mean_x, mean_y = math.fsum(xs) / n, math.fsum(ys) / n
    xx = math.fsum((x - mean_x) ** 2 for x in xs)
    yy = math.fsum((y - mean_y) ** 2 for y in ys)
    if not (xx > 0 and yy > 0):
        return None
    r = math.fsum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / math.sqrt(xx * yy)
    r = max(-1.0, min(1.0, r))  # rounding can exceed 1, where atanh below is not defined
    if n < 4 or abs(r) == 1:
        return Correlation(r=r, low=None, high=None, n=n)
    half = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) / math.sqrt(n - 3)
    return Correlation(r=r, low=math.tanh(math.atanh(r) - half), high=math.tanh(math.atanh(r) + half), n=n)


def frontier(points: Iterable[tuple[float, float]], better: str) -> list[int]:
    """Indices of the points (cost, quality) for which no other point is at least as cheap and as good; cheapest first.

    better: "lower" or "higher": which qualities are better. Of equal points only the first is on the frontier.
    """
    sign = -1.0 if better == "higher" else 1.0  # sign * quality: lower is better
    order = sorted(enumerate(points), key=lambda pair: (pair[1][0], sign * pair[1][1], pair[0]))
    kept, best = [], math.inf
    for index, (_, quality) in order:
        if sign * quality < best:
            best = sign * quality
            kept.append(index)
    return kept


def interpolate(xs: Sequence[float], ys: Sequence[float], x: float) -> float | None:
    """The value at x of the curve through the points (x ascending and above 0), interpolated linearly in log x.

    Linear in log y if all ys are above 0, else in y. None outside the range of the points.
    """
    if not xs or not xs[0] <= x <= xs[-1]:
        return None
    same = [y for place, y in zip(xs, ys, strict=True) if place == x]
    if same:  # a point of the curve; of several at one x the mean
        return fmean(same)
    is_log = all(y > 0 for y in ys)
    heights = [math.log(y) if is_log else y for y in ys]
    left = max(index for index, place in enumerate(xs) if place < x)
    share = math.log(x / xs[left]) / math.log(xs[left + 1] / xs[left])
    height = heights[left] + share * (heights[left + 1] - heights[left])
    return math.exp(height) if is_log else height
