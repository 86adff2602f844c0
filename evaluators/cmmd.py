"""CMMD of Jayasumana et al. (arXiv:2401.09603): the squared maximum mean discrepancy with a Gaussian kernel.

    1000 * (mean k(x, x') + mean k(y, y') - 2 mean k(x, y)),  k(u, v) = exp(-|u - v|^2 / (2 * 10^2))

The means run over all pairs, a row with itself included: the biased, minimum-variance estimator of Gretton et al.
(JMLR 13, 2012, eq. 5), which google-research/google-research 4c42994, cmmd/distance.py computes in float32; here it is
float64. It is larger than the unbiased estimator (eq. 3 there) by about 1000 * (1 / N + 1 / M) * (1 - mean k), which for vectors
of length 1 is at most 10 * (1 / N + 1 / M): 0.002 for 10,000 images on each side.

The bandwidth of 10 is for the features of that paper, CLIP ViT-L/14-336 embeddings of length 1. On other features the
result is still a distance, but not CMMD; if feature distances are far above 10, only equal rows contribute.
"""

from typing import TypeVar

import numpy as np

from evaluators.distances import centred, squared_distances
from evaluators.intervals import Estimate
from evaluators.metric_inputs import MetricInputs

SIGMA = 10.0
SCALE = 1000.0

Value = TypeVar("Value", float, np.ndarray)  # of one set, or of many at once


def estimate(features: np.ndarray, reference: np.ndarray, block: np.ndarray, *, unbiased: bool = False) -> Estimate:
    """CMMD between features (N, D) and reference (M, D); block int64 (N,).

    unbiased: leave out pairs of a row with itself; the value may then be negative, and N and M must be at least 3.
    """
    x, y = centred(features, reference)
    n, m = len(x), len(y)
    member = np.eye(int(block.max()) + 1)[block]  # (N, B) one-hot
    sizes = member.sum(axis=0)
    # Sums are of 1 - k instead of k: for near rows k is 1 minus very little, which would be lost in sums of ones.
    within, across, reference_sum = np.zeros((len(sizes),) * 2), np.zeros(len(sizes)), 0.0
    for rows, d in squared_distances(x, x):
        within += member[rows].T @ (_one_less_kernel(_without_self(rows, d)) @ member)
    for rows, d in squared_distances(x, y):
        across += member[rows].T @ _one_less_kernel(d).sum(axis=1)
    for rows, d in squared_distances(y, y):
        reference_sum += float(_one_less_kernel(_without_self(rows, d)).sum())
    less = 1.0 if unbiased else 0.0

    def distance(count: Value, pairs: Value, cross: Value) -> Value:
        return SCALE * (2.0 * cross / (count * m) - pairs / (count * (count - less)) - reference_sum / (m * (m - less)))

    kept_pairs = within.sum() - within.sum(axis=0) - within.sum(axis=1) + np.diag(within)
    left_out = distance(n - sizes, kept_pairs, across.sum() - across)
    return Estimate(value=float(distance(n, within.sum(), across.sum())), left_out=left_out)


def _without_self(rows: slice, d: np.ndarray) -> np.ndarray:
    d[np.arange(len(d)), np.arange(rows.start, rows.stop)] = 0.0  # exactly 0, instead of the rounding error
    return d


def _one_less_kernel(d: np.ndarray) -> np.ndarray:
    """1 - exp(-d / (2 sigma^2)) of squared distances, in place."""
    d *= -1.0 / (2.0 * SIGMA**2)
    np.expm1(d, out=d)
    return np.negative(d, out=d)


def compute(inputs: MetricInputs) -> dict[str, Estimate]:
    """The metric "cmmd"."""
    return {"cmmd": estimate(inputs.features.pooled, inputs.reference.features.pooled, inputs.block)}
