"""Many systems at once: how much wider a tie is when the best of several is named, not one of two.

The gap between the best and the worst of k equal systems grows with k, so a rule made for one pair calls some of them
losers in most tables. Tukey's test compares all pairs at once: the largest gap, in units of its standard error, has the
distribution of the studentized range, and with q its 95 % quantile, no gap exceeds q / sqrt(2) standard errors in 95 % of
tables. For unequal variances and numbers, each pair has its own standard error and degrees of freedom (Games and Howell
1976). For k = 2, q / sqrt(2) is the 97.5 % quantile of Student's t, the rule for one pair.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

LEVEL = 0.95
_LARGEST = 15.0  # ranges of normal values beyond it have a probability below 1e-19 for each pair
_STEP = 0.01
_PLACES = 200  # quadrature points of the distribution of the standard error


def widening(systems: int, degrees: float) -> float:
    """The largest tie among `systems` systems at once, in units of that of a pair: 1 for two, 1.67 for twelve, and so on.

    degrees: degrees of freedom of the pair's standard error, above 0; inf: the standard error is known.
    """
    if systems <= 2:
        return 1.0
    # two digits: pairs have many different degrees, and the factor hardly changes with them
    return _widening(systems, degrees if math.isinf(degrees) else float(f"{degrees:.2g}"))


@functools.lru_cache(maxsize=4096)
def _widening(systems: int, degrees: float) -> float:
    return studentized_range(systems, degrees) / studentized_range(2, degrees)


def studentized_range(systems: int, degrees: float, level: float = LEVEL) -> float:
    """The `level` quantile of the range of `systems` >= 2 standard normal values over an independent standard error.

    Relative error below 1e-4 from 1 degree of freedom on.
    """
    import numpy as np
    from scipy.special import gammaincinv

    ranges, shares = _range_distribution(systems)
    if math.isinf(degrees):
        scales, weights = np.ones(1), np.ones(1)
    else:
        # The standard error, as a function of its quantile p in (0, 1). The square puts more points near 0, where, at few
        # degrees of freedom, the tail of the ratio comes from.
        nodes, weights = np.polynomial.legendre.leggauss(_PLACES)
        root = (nodes + 1) / 2
        weights = weights * root  # dp = 2 root d root, and d root = d node / 2
        scales = np.sqrt(gammaincinv(degrees / 2, root**2) * 2 / degrees)
    low, high = 0.0, 1.0
    while _share(high, scales, weights, ranges, shares) < level:
        low, high = high, 2 * high
    for _ in range(30):
        middle = (low + high) / 2
        if _share(middle, scales, weights, ranges, shares) < level:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _share(quantile: float, scales: np.ndarray, weights: np.ndarray, ranges: np.ndarray, shares: np.ndarray) -> float:
    """The probability that the studentized range is at most `quantile`."""
    import numpy as np

    return float(weights @ np.interp(quantile * scales, ranges, shares, right=1.0))


@functools.lru_cache(maxsize=256)
def _range_distribution(systems: int) -> tuple[np.ndarray, np.ndarray]:
    """(ranges (R,), probability (R,) that the range of `systems` standard normal values is at most each of them)."""
    import numpy as np
    from scipy.special import ndtr

    ranges = np.arange(0.0, _LARGEST, _STEP)
    nodes, weights = np.polynomial.legendre.leggauss(128)
    largest, density = 9.0 * nodes, 9.0 * weights * np.exp(-0.5 * (9.0 * nodes) ** 2) / math.sqrt(2 * math.pi)
    # of the largest value at z, the others lie in [z - range, z]
    inside = ndtr(largest) - ndtr(largest - ranges[:, None])
    return ranges, systems * (inside ** (systems - 1)) @ density
