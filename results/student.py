"""Quantiles of Student's t distribution, by the incomplete beta function; the standard library has none."""

from __future__ import annotations

import functools
import math

ACCURACY = 1e-13
MAX_TERMS = 10_000


@functools.lru_cache(maxsize=4096)
def quantile(probability: float, degrees: float) -> float:
    """The t with P(T <= t) = `probability`, 0.5 <= probability < 1, for `degrees` > 0 of freedom, not only whole ones."""
    if not (0.5 <= probability < 1 and degrees > 0):
        raise ValueError(f"no quantile {probability} for {degrees} degrees of freedom")
    if probability == 0.5:
        return 0.0
    tail = 2 * (1 - probability)  # P(|T| > t) = I_x(degrees / 2, 1 / 2) with x = degrees / (degrees + t^2)
    low, high = 0.0, 1.0
    while high - low > ACCURACY:
        middle = (low + high) / 2
        if _incomplete_beta(degrees / 2, 0.5, middle) < tail:
            low = middle
        else:
            high = middle
    x = (low + high) / 2
    return math.sqrt(degrees * (1 - x) / x)


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised I_x(a, b) by its continued fraction (Abramowitz and Stegun, 26.5.8), evaluated as Lentz does."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly, its mirror image does not
        return 1 - _incomplete_beta(b, a, 1 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    tiny = 1e-300  # what stands for 0, which nothing may be divided by
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1) or tiny)
    value = d
    for m in range(1, MAX_TERMS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 / (1 + term * d or tiny)
            c = 1 + term / c or tiny
            value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * value
