"""The kernel distance of Binkowski et al. (KID, arXiv:1801.01401, eq. 4): the unbiased squared maximum mean
discrepancy with the kernel k(x, y) = (x . y / D + 1)^3. It is computed over all pairs instead of random subsets, so it
has no seed. An unbiased estimate may be slightly negative.
"""

from collections.abc import Iterator
from typing import TypeVar

import numpy as np

from evaluators.intervals import Estimate, one_hots
from evaluators.metric_inputs import MetricInputs

ROWS_PER_BLOCK = 1024

Value = TypeVar("Value", float, np.ndarray)  # for one set, or for many sets at once


def _kernel_rows(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields (rows, kernel): slices of x (N, D) and their kernel values with y (M, D), float64 (rows, M).

    Memory does not grow with N. The caller may overwrite the kernel values.
    """
    for start in range(0, len(x), ROWS_PER_BLOCK):
        rows = slice(start, min(start + ROWS_PER_BLOCK, len(x)))
        base = x[rows] @ y.T / x.shape[1] + 1.0
        yield rows, base * base * base


def _zero_diagonal(rows: slice, kernel: np.ndarray) -> np.ndarray:
    """Set the kernel value of every row with itself to 0, in place: such pairs are left out of the sums.

    kernel: (rows, N), of x[rows] with all rows of x.
    """
    kernel[np.arange(len(kernel)), np.arange(rows.start, rows.stop)] = 0.0
    return kernel


def estimate(features: np.ndarray, reference: np.ndarray, block: np.ndarray) -> Estimate:
    """Kernel distance between features (N, D) and reference features (M, D); block int64 (N,)."""
    x, y = np.asarray(features, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    n, m = len(x), len(y)
    members = one_hots(block)
    member = members[0]
    # Sums of kernel values, for each of `members`. pair_sums: (B, B), by pair of blocks of x. row_sums: (B,), by block of x,
    # with all of y.
    pair_sums, row_sums = (
        [np.zeros((each.shape[1],) * 2) for each in members],
        [np.zeros(each.shape[1]) for each in members],
    )
    for rows, kernel in _kernel_rows(x, x):
        kernel = _zero_diagonal(rows, kernel)
        for pair_sum, each in zip(pair_sums, members, strict=True):
            pair_sum += each[rows].T @ (kernel @ each)
    for rows, kernel in _kernel_rows(x, y):
        for row_sum, each in zip(row_sums, members, strict=True):
            row_sum += each[rows].T @ kernel.sum(axis=1)
    within, across = pair_sums[0], row_sums[0]
    reference_sum = sum(float(_zero_diagonal(rows, kernel).sum()) for rows, kernel in _kernel_rows(y, y))
    reference_mean = reference_sum / (m * (m - 1))

    def value_from_sums(count: Value, within_sum: Value, across_sum: Value) -> Value:
        """KID of `count` samples, from their kernel sums over pairs of samples and over pairs with the reference."""
        return within_sum / (count * (count - 1)) + reference_mean - 2.0 * across_sum / (count * m)

    # [b]: over the pairs of samples of which neither is in block b
    kept_within = within.sum() - within.sum(axis=0) - within.sum(axis=1) + np.diag(within)
    left_out = value_from_sums(n - member.sum(axis=0), kept_within, across.sum() - across)
    return Estimate(value=float(value_from_sums(n, pair_sums[-1].sum(), row_sums[-1].sum())), left_out=left_out)


def compute(inputs: MetricInputs) -> dict[str, Estimate]:
    """The metric "kid"."""
    return {"kid": estimate(inputs.features.pooled, inputs.reference.features.pooled, inputs.block)}
