"""The kernel distance of Binkowski et al. (KID, arXiv:1801.01401, eq. 4): the unbiased squared maximum mean
discrepancy with the kernel k(x, y) = (x . y / D + 1)^3. It is computed over all pairs instead of random subsets, so it
has no seed. An unbiased estimate may be slightly negative.
"""

from collections.abc import Iterator
from typing import TypeVar

import numpy as np

from evaluators.intervals import Estimate
from evaluators.metric_inputs import MetricInputs

ROWS_PER_BLOCK = 1024

Value = TypeVar("Value", float, np.ndarray)  # of one set, or of many at once


def _kernel_rows(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields ranges of rows of x and their kernel values with all of y, float64 (rows, M); memory does not grow with N."""
    for start in range(0, len(x), ROWS_PER_BLOCK):
        rows = slice(start, min(start + ROWS_PER_BLOCK, len(x)))
        base = x[rows] @ y.T / x.shape[1] + 1.0
        yield rows, base * base * base


def _without_self(rows: slice, kernel: np.ndarray) -> np.ndarray:
    kernel[np.arange(len(kernel)), np.arange(rows.start, rows.stop)] = 0.0
    return kernel


def estimate(features: np.ndarray, reference: np.ndarray, block: np.ndarray) -> Estimate:
    """Kernel distance between features (N, D) and reference features (M, D); block int64 (N,)."""
    x, y = np.asarray(features, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    n, m = len(x), len(y)
    member = np.eye(int(block.max()) + 1)[block]  # (N, B) one-hot
    within, across = np.zeros((member.shape[1],) * 2), np.zeros(member.shape[1])
    for rows, kernel in _kernel_rows(x, x):
        within += member[rows].T @ (
            _without_self(rows, kernel) @ member
        )  # (B, B) sums of kernel values by pair of blocks
    for rows, kernel in _kernel_rows(x, y):
        across += member[rows].T @ kernel.sum(axis=1)  # (B,)
    reference_sum = sum(float(_without_self(rows, kernel).sum()) for rows, kernel in _kernel_rows(y, y))
    constant = reference_sum / (m * (m - 1))

    def distance(count: Value, pairs: Value, cross: Value) -> Value:
        return pairs / (count * (count - 1)) + constant - 2.0 * cross / (count * m)

    kept_pairs = within.sum() - within.sum(axis=0) - within.sum(axis=1) + np.diag(within)
    left_out = distance(n - member.sum(axis=0), kept_pairs, across.sum() - across)
    return Estimate(value=float(distance(n, within.sum(), across.sum())), left_out=left_out)


def compute(inputs: MetricInputs) -> dict[str, Estimate]:
    """The metric "kid"."""
    return {"kid": estimate(inputs.features.pooled, inputs.reference.features.pooled, inputs.block)}
