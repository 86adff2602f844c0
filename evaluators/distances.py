"""Squared Euclidean distances between two sets of rows, a block at a time: memory does not grow with their product."""

from collections.abc import Iterator

import numpy as np

from harness.io.progress import Bar

ROWS_PER_BLOCK = 1024
PAIRS_AT_ONCE = 4096


def centred(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x and y as float64, minus the mean of y (M, D): distances stay equal, and their cancellation error is smallest."""
    centre = y.mean(axis=0, dtype=np.float64)
    return x - centre, y - centre


def squared_distances(u: np.ndarray, v: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields (rows, d): ranges of rows of u float64 (N, D) and their squared distances d float64 (rows, M) to v (M, D).

    The caller may overwrite d. Its error is at most `rounding_bound(u, v)`, which is large relative to the distance of
    two nearly equal rows; `exact_squared_distances` has no such error.
    """
    u_norm, v_norm = np.einsum("nd,nd->n", u, u), np.einsum("nd,nd->n", v, v)
    with Bar("distances", len(u), "images") as bar:
        for start in range(0, len(u), ROWS_PER_BLOCK):
            rows = slice(start, min(start + ROWS_PER_BLOCK, len(u)))
            d = u[rows] @ v.T
            d *= -2.0
            d += u_norm[rows, None]
            d += v_norm
            yield rows, np.maximum(d, 0.0, out=d)
            bar.advance(rows.stop - rows.start)


def rounding_bound(u: np.ndarray, v: np.ndarray) -> float:
    """Upper bound on the error of `squared_distances` (Higham, Accuracy and Stability, 2002, sec. 3.1)."""
    largest = sum(float(np.einsum("nd,nd->n", x, x).max()) for x in (u, v))
    return (u.shape[1] + 8) * np.finfo(np.float64).eps * largest


def exact_squared_distances(u: np.ndarray, v: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Squared distances float64 (P,) of the rows u[i] and v[j], from their differences: exactly 0 for equal rows."""
    out = np.empty(len(i))
    for start in range(0, len(i), PAIRS_AT_ONCE):
        part = slice(start, start + PAIRS_AT_ONCE)
        out[part] = np.square(u[i[part]] - v[j[part]]).sum(axis=1)
    return out


def squared_radii(x: np.ndarray, k: int) -> np.ndarray:
    """Squared distance float64 (N,) from every row of x float64 (N, D) to its k-th nearest other row, N > k.

    `squared_distances` decides which row that is; the distance is then computed from the difference of both rows.
    """
    index = np.empty(len(x), dtype=np.int64)
    for rows, d in squared_distances(x, x):
        d[np.arange(len(d)), np.arange(rows.start, rows.stop)] = np.inf  # a row is not its own neighbour
        index[rows] = d.argmin(axis=1) if k == 1 else np.argpartition(d, k - 1, axis=1)[:, k - 1]
    return exact_squared_distances(x, x, np.arange(len(x)), index)
