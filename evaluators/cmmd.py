"""CMMD of Jayasumana et al. (arXiv:2401.09603): the squared maximum mean discrepancy with a Gaussian kernel.

    1000 * (mean k(x, x') + mean k(y, y') - 2 mean k(x, y)),  k(u, v) = exp(-|u - v|^2 / (2 * 10^2))

The means run over all pairs, a row with itself included: the biased, minimum-variance estimator of Gretton et al.
(JMLR 13, 2012, eq. 5), which google-research/google-research 4c42994, cmmd/distance.py computes in float32; here it is
float64. It is larger than the unbiased estimator (eq. 3 there) by about 1000 * (1 / N + 1 / M) * (1 - mean k), which
for vectors of length 1 is at most 10 * (1 / N + 1 / M): 0.002 for 10,000 images on each side.

The bandwidth of 10 is for the features of that paper, CLIP ViT-L/14-336 embeddings of length 1. On other features the
result is still a distance, but not CMMD; if feature distances are far above 10, only equal rows contribute.
"""

from typing import TypeVar

import numpy as np

from evaluators.distances import centred, squared_distances
from evaluators.intervals import Estimate, one_hots
from evaluators.metric_inputs import MetricInputs

SIGMA = 10.0
SCALE = 1000.0

Value = TypeVar("Value", float, np.ndarray)  # for one set, or for many sets at once


def estimate(features: np.ndarray, reference: np.ndarray, block: np.ndarray, *, unbiased: bool = False) -> Estimate:
    """CMMD between features (N, D) and reference (M, D); block int64 (N,).

    unbiased: leave out pairs of a row with itself; the value may then be negative, and N and M must be at least 3.
    """
    x, y = centred(features, reference)
    n, m = len(x), len(y)
    members = one_hots(block)
    sizes = members[0].sum(axis=0)
    # Sums are of 1 - k instead of k: for near rows k is almost 1, and the small difference would be lost in the sums.
    # For each of `members`, pair_sums: (B, B), by pair of blocks of x; row_sums: (B,), by block of x, with all of y.
    pair_sums, row_sums = (
        [np.zeros((each.shape[1],) * 2) for each in members],
        [np.zeros(each.shape[1]) for each in members],
    )
    reference_sum = 0.0
    for rows, d in squared_distances(x, x):
        rest = _one_less_kernel(_zero_diagonal(rows, d))
        for pair_sum, each in zip(pair_sums, members, strict=True):
            pair_sum += each[rows].T @ (rest @ each)
    for rows, d in squared_distances(x, y):
        rest = _one_less_kernel(d)
        for row_sum, each in zip(row_sums, members, strict=True):
            row_sum += each[rows].T @ rest.sum(axis=1)
    within, across = pair_sums[0], row_sums[0]
    for rows, d in squared_distances(y, y):
        reference_sum += float(_one_less_kernel(_zero_diagonal(rows, d)).sum())
    excluded_pairs = 1.0 if unbiased else 0.0  # of each row: the pair with itself, whose 1 - k is 0 in the sums

    def value_from_sums(count: Value, within_sum: Value, across_sum: Value) -> Value:
        """CMMD of `count` samples, from their sums of 1 - k over pairs of samples and over pairs with the reference."""
        within_mean = within_sum / (count * (count - excluded_pairs))
        return SCALE * (2.0 * across_sum / (count * m) - within_mean - reference_sum / (m * (m - excluded_pairs)))

    # [b]: over the pairs of samples of which neither is in block b
    kept_within = within.sum() - within.sum(axis=0) - within.sum(axis=1) + np.diag(within)
    left_out = value_from_sums(n - sizes, kept_within, across.sum() - across)
    return Estimate(value=float(value_from_sums(n, pair_sums[-1].sum(), row_sums[-1].sum())), left_out=left_out)


def _zero_diagonal(rows: slice, d: np.ndarray) -> np.ndarray:
    """Set the squared distance of every row to itself to 0, in place. d: (rows, N), of x[rows] to x."""
    d[np.arange(len(d)), np.arange(rows.start, rows.stop)] = 0.0  # exactly 0, instead of the rounding error
    return d


def _one_less_kernel(d: np.ndarray) -> np.ndarray:
    """1 - exp(-d / (2 sigma^2)) of squared distances d, computed in place and returned."""
    d *= -1.0 / (2.0 * SIGMA**2)
    np.expm1(d, out=d)
    return np.negative(d, out=d)


def compute(inputs: MetricInputs) -> dict[str, Estimate]:
    """The metric "cmmd"."""
    return {"cmmd": estimate(inputs.features.pooled, inputs.reference.features.pooled, inputs.block)}
