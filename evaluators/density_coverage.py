"""Density and coverage of Naeem et al. (arXiv:2002.09797).

With B_i the open ball around reference image i that reaches to its k-th nearest other reference image, N samples and M
reference images:

    density  = 1 / (k N) * number of pairs (sample, i) with the sample inside B_i
    coverage = 1 / M * number of i with at least one sample inside B_i

k = 5. Density is about 1 when the distributions agree, and may exceed 1. What coverage expects then depends on k and on
both sizes: 1 - (M - 1) ... (M - k) / ((M + N - 1) ... (M + N - k)), 0.969 for many images and N = M (the paper's
appendix). Against precision and recall only the reference's radii matter: an outlier among the samples makes no ball.
Balls are open (`<`), as in clovaai/generative-evaluation-prdc 82db9ac, prdc/prdc.py; arithmetic is float64.
"""

import numpy as np

from evaluators.distances import centred, exact, radii, rounding, squared_distances
from evaluators.evidence import Evidence
from evaluators.intervals import Estimate, block_sums

K = 5


def expected_coverage(n: int, m: int, k: int = K) -> float:
    """Coverage of n samples from the same distribution as m reference images, in expectation.

    A reference image is missed if the k nearest of the m - 1 + n other points are all reference images.
    """
    steps = np.arange(1, k + 1)
    return float(1.0 - np.prod((m - steps) / (m + n - steps)))


def estimate(features: np.ndarray, reference: np.ndarray, block: np.ndarray, k: int = K) -> tuple[Estimate, Estimate]:
    """Density and coverage of features (N, D) against reference (M, D), M > k, and without each block int64 (N,).

    The jackknife's standard error of coverage is 1.1 to 1.5 times too wide on Gaussians, as Efron and Stein (1981) prove
    that it must be for what is not additive; its 95 % intervals cover the expectation in 95 to 99 % of sets there.
    """
    order = np.argsort(block, kind="stable")  # blocks side by side, so that whether one covers is one reduction
    x, y = centred(features[order], reference)
    n, m = len(x), len(y)
    sizes = np.bincount(block)
    blocks = len(sizes)
    first = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    squared, error = radii(y, k), rounding(x, y)  # (M,)
    hits = np.zeros(n)  # balls that hold the sample
    found = np.zeros((m, blocks), dtype=bool)  # is a sample of the block in the ball
    for rows, d in squared_distances(y, x):  # (rows, N)
        inside = d < squared[rows, None]
        # Copies of reference images lie on the surface of balls: there the difference decides, not rounding.
        i, j = np.nonzero(np.abs(d - squared[rows, None]) <= error)
        inside[i, j] = exact(y, x, i + rows.start, j) < squared[i + rows.start]
        hits += inside.sum(axis=0)
        found[rows] = np.logical_or.reduceat(inside, first, axis=1)

    sums = block_sums(hits, block[order])  # (B,)
    density_left = (sums.sum() - sums) / (k * (n - sizes))
    times = found.sum(axis=1)  # (M,) blocks that cover the image
    alone = found[times == 1].sum(axis=0)  # (B,) images that only this block covers
    covered = int((times > 0).sum())
    return (
        Estimate(value=float(hits.sum() / (k * n)), left_out=density_left),
        Estimate(value=covered / m, left_out=(covered - alone) / m),
    )


def compute(evidence: Evidence) -> dict[str, Estimate]:
    """The metrics "density" and "coverage"."""
    both = estimate(evidence.features.pooled, evidence.reference.features.pooled, evidence.block)
    return dict(zip(("density", "coverage"), both, strict=True))
