"""Statistics of scaling: power laws with intervals, correlation, the Pareto frontier, interpolation of curves.

Power laws are straight lines in log-log space, fitted by ordinary least squares. Their intervals are the closed-form ones
of linear regression (Student's t with n - 2 degrees of freedom), which assume that ln y scatters equally, normally and
independently about the line. Outside the range of its points (`PowerLaw.reaches`) a law extrapolates.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from statistics import NormalDist

from results.compare import student_t

FEWEST = 4  # points that a power law needs, so that two degrees of freedom are left for its scatter
CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """A fitted law y = factor * x ** exponent."""

    exponent: float
    low: float  # lower end of the exponent's 95 % interval
    high: float  # upper end
    factor: float
    n: int  # number of points
    scatter: float  # standard deviation of ln y about the line, n - 2 degrees of freedom
    lowest: float  # smallest x of the points
    highest: float  # largest x
    mean: float  # mean of ln x over the points
    spread: float  # sum of squares of ln x about its mean

    def at(self, x: float) -> float:
        """The value of the law at x."""
        return self.factor * x**self.exponent

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
        error = self.scatter * math.sqrt(extra_variance + 1 / self.n + (math.log(x) - self.mean) ** 2 / self.spread)
        factor = math.exp(student_t(self.n - 2) * error)
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
    scatter = math.sqrt(math.fsum((y - offset - exponent * x) ** 2 for x, y in points) / (n - 2))
    half = student_t(n - 2) * scatter / math.sqrt(spread)
    return PowerLaw(
        exponent=exponent,
        low=exponent - half,
        high=exponent + half,
        factor=math.exp(offset),
        n=n,
        scatter=scatter,
        lowest=math.exp(min(x for x, _ in points)),
        highest=math.exp(max(x for x, _ in points)),
        mean=mean_x,
        spread=spread,
    )


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
    """The value at x of the curve through the points (x strictly ascending and above 0), interpolated linearly in log x.

    Linear in log y if all ys are above 0, else in y. None outside the range of the points.
    """
    if not xs or not xs[0] <= x <= xs[-1]:
        return None
    is_log = all(y > 0 for y in ys)
    heights = [math.log(y) if is_log else y for y in ys]
    for left in range(len(xs) - 1):
        if x <= xs[left + 1]:
            share = math.log(x / xs[left]) / math.log(xs[left + 1] / xs[left])
            height = heights[left] + share * (heights[left + 1] - heights[left])
            return math.exp(height) if is_log else height
    return ys[-1]  # the curve is a single point
