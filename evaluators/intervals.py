"""Error bars: the delete-block jackknife.

A sample set is split into 20 blocks (fewer below 20 samples), and the metric is computed again without each of them.
The spread of those values estimates the standard error of the metric (Shao and Tu, "The Jackknife and Bootstrap", 1995,
sec. 2.3). A bootstrap would be wrong here: drawing with replacement puts duplicates into the set, which shifts Frechet
distances and nearest-neighbour metrics.

The interval is of the sampling noise at this number of samples and with this reference: it covers the mean of the
estimator over sample sets of the same size, not its value for infinitely many samples.
"""

from dataclasses import dataclass

import numpy as np

BLOCKS = 20


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A metric's value on all N samples and, for the error bar, without each block.

    left_out: float64 (B,), left_out[b] is the metric on the samples outside block b.
    trials: N if the value is a share of the N samples, else None. At a share of exactly 0 or 1 the jackknife variance is
        0, and the exact binomial interval is used instead.
    half_variance: half the variance of the metric on disjoint halves of the set. It is a lower bound of the variance,
        for a metric whose jackknife variance is far too large (see evaluators/precision_recall.py). None: use the
        jackknife variance alone.
    warning: one line on why the value is doubtful; empty: no doubt.
    """

    value: float
    left_out: np.ndarray
    trials: int | None = None
    half_variance: float | None = None
    warning: str = ""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """low <= value <= high at the requested confidence; without an error bar both are None and method is "none"."""

    low: float | None
    high: float | None
    method: str  # "jackknife-20", "jackknife-20+halves", "clopper-pearson" or "none"


def assign_blocks(n: int, blocks: int = BLOCKS) -> np.ndarray:
    """int64 (n,): the block of every sample, which depends on its index and n alone; block sizes differ by at most 1.

    The assignment is random, because labels often follow the index (i mod classes, or sorted): a regular one would put
    all samples of a class into one block, and the spread between blocks would measure the classes instead of the noise.
    numpy guarantees RandomState's stream.
    """
    return np.random.RandomState(20).permutation(n) % min(blocks, n)


def block_sums(rows: np.ndarray, block: np.ndarray) -> np.ndarray:
    """float64 (B, ...): sums over the rows (N, ...) of each block."""
    return np.stack([rows[block == b].sum(axis=0, dtype=np.float64) for b in range(int(block.max()) + 1)])


def interval(estimate: Estimate, confidence: float = 0.95) -> Interval:
    """The interval value +- t * se, se^2 = (B - 1) / B * sum_b (left_out_b - mean)^2, t of B - 1 degrees of freedom.

    Exceptions: with `half_variance`, se^2 is a geometric mean of both variances; a share of exactly 0 or 1 has the
    binomial interval; if left_out is constant up to rounding, there is no interval.
    """
    from scipy.special import stdtrit

    left_out, value, tail = estimate.left_out, estimate.value, (1.0 - confidence) / 2.0
    blocks = len(left_out)
    variance = (blocks - 1) / blocks * float(np.sum((left_out - left_out.mean()) ** 2))
    if estimate.trials is not None and value in (0.0, 1.0):
        width = 1.0 - tail ** (1.0 / estimate.trials)  # Clopper and Pearson (1934) at 0 or N successes
        low, high = (0.0, width) if value == 0.0 else (1.0 - width, 1.0)
        return Interval(low=low, high=high, method="clopper-pearson")
    if blocks < 2 or np.sqrt(variance) <= 1e-12 * abs(value):  # left_out is constant up to rounding
        return Interval(low=None, high=None, method="none")
    method = f"jackknife-{blocks}"
    if estimate.half_variance is not None and estimate.half_variance > 0.0:
        # geometric mean of the two variances; min, so that it is not above the jackknife's
        variance = np.sqrt(variance * min(estimate.half_variance, variance))
        method += "+halves"
    half_width = float(stdtrit(blocks - 1, 1.0 - tail)) * float(np.sqrt(variance))
    return Interval(low=value - half_width, high=value + half_width, method=method)
