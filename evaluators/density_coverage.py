"""Density and coverage of Naeem et al. (arXiv:2002.09797).

With N samples, M reference images, and B_i the open ball around reference image i whose radius is the distance to its
k-th nearest other reference image:

    density  = 1 / (k N) * number of pairs (sample, i) with the sample inside B_i
    coverage = 1 / M * number of i with at least one sample inside B_i

k = 5. If the distributions agree, density is about 1 (it may exceed 1), and the expectation of coverage depends on k, M
and N: 1 - (M - 1) ... (M - k) / ((M + N - 1) ... (M + N - k)), which is 0.969 for large N = M (the paper's appendix).
Unlike precision and recall, only balls around reference images are used, so an outlier among the samples has no ball.
Balls are open (`<`), as in clovaai/generative-evaluation-prdc 82db9ac, prdc/prdc.py; arithmetic is float64.
"""

import numpy as np

from evaluators.distances import centred, exact_squared_distances, rounding_bound, squared_distances, squared_radii
from evaluators.intervals import Estimate, block_sums
from evaluators.metric_inputs import MetricInputs

K = 5


def expected_coverage(n: int, m: int, k: int = K) -> float:
    """Expected coverage of n samples from the same distribution as m reference images.

    A reference image is not covered if the k nearest of the m - 1 + n other points are all reference images.
    """
    steps = np.arange(1, k + 1)
    return float(1.0 - np.prod((m - steps) / (m + n - steps)))


def estimate(features: np.ndarray, reference: np.ndarray, block: np.ndarray, k: int = K) -> tuple[Estimate, Estimate]:
    """Density and coverage of features (N, D) against reference (M, D), M > k; block int64 (N,).

    On Gaussians the jackknife's standard error of coverage is 1.1 to 1.5 times too large, and its 95 % intervals cover
    the expectation in 95 to 99 % of sets. Efron and Stein (1981) prove that the jackknife variance of a statistic that
    is not additive is biased upwards.
    """
    order = np.argsort(block, kind="stable")  # rows of a block are consecutive, as `reduceat` needs
    x, y = centred(features[order], reference)
    n, m = len(x), len(y)
    sizes = np.bincount(block)
    blocks = len(sizes)
    block_starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])  # (B,) first row of each block
    squared_radius, error = squared_radii(y, k), rounding_bound(x, y)  # (M,), float
    hits = np.zeros(n)  # number of balls that contain each sample
    covered_by = np.zeros((m, blocks), dtype=bool)  # [i, b]: whether a sample of block b is in ball i
    for rows, d in squared_distances(y, x):  # (rows, N)
        inside = d < squared_radius[rows, None]
        # Copies of reference images lie on the surface of balls: exact distances decide there, not rounding errors.
        i, j = np.nonzero(np.abs(d - squared_radius[rows, None]) <= error)
        inside[i, j] = exact_squared_distances(y, x, i + rows.start, j) < squared_radius[i + rows.start]
        hits += inside.sum(axis=0)
        covered_by[rows] = np.logical_or.reduceat(inside, block_starts, axis=1)

    sums = block_sums(hits, block[order])  # (B,)
    density_left_out = (sums.sum() - sums) / (k * (n - sizes))
    covering_blocks = covered_by.sum(axis=1)  # (M,) number of blocks that cover each image
    only_by = covered_by[covering_blocks == 1].sum(axis=0)  # (B,) number of images that only this block covers
    covered = int((covering_blocks > 0).sum())
    return (
        Estimate(value=float(hits.sum() / (k * n)), left_out=density_left_out),
        Estimate(value=covered / m, left_out=(covered - only_by) / m),
    )


def compute(inputs: MetricInputs) -> dict[str, Estimate]:
    """The metrics "density" and "coverage"."""
    both = estimate(inputs.features.pooled, inputs.reference.features.pooled, inputs.block)
    return dict(zip(("density", "coverage"), both, strict=True))
