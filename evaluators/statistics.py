"""Mean and covariance of features: streaming, mergeable and exact.

The result has the same bits for any order, batch size, number of workers and machine. Every feature is cut into slices
of 20 bits at fixed positions. Products of slices are integers, small enough that float64 matrix multiplication adds them
without rounding in whatever order the BLAS chooses (error-free transformation, Ozaki et al., Numerical Algorithms 59,
2012), and the sums are kept as int64. Only two things are rounded: a feature, to a grid of 2^-32 (float32 and float16)
or 2^-52 (float64), and the finished numbers, to float64. The cost is three symmetric matrix products instead of one.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from evaluators.products import product
from harness.errors import RunError
from harness.io.arrays import release_pages

BITS = 20
# The unit of slice b is 2^(20 b - 52): 2^-52 for slice 0, the lowest of float64; 2^-32 for slice 1, the lowest of float32.
UNIT = 52
ROWS_PER_PRODUCT = 1024  # sums of 1024 products below 2^40 stay below 2^53; 2048 were no faster and need more memory
MAX_ROWS = 2**22  # int64 sums of at most six products of at most 2^38 for each row
MAX_SLICE = 5  # |feature| <= 2^67
MATRIX_ROWS_AT_ONCE = 256  # of (D, D) matrices


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Mean and covariance of a set of features, the input of a Frechet distance.

    n: number of rows; None: unknown, for statistics from a file without it.
    mean: float64 (D,), or float32 (D,) as in ADM's evaluator. covariance: float64 (D, D), symmetric, normalised by n - 1
    if computed here.
    """

    n: int | None
    mean: np.ndarray
    covariance: np.ndarray


def _slices(x: np.ndarray, lowest: int) -> dict[int, np.ndarray]:
    """Slice number -> slice of x float64 (rows, D), which is first rounded to a multiple of the lowest slice's unit.

    lowest: number of the lowest slice. A slice is float64 (rows, D) and holds integers up to 2^19 in magnitude; the
    rounded x is the sum of slice b times its unit over all b. Overwrites x. The slices of an element depend on that
    element alone: in slices that only larger elements need, it is 0. Raises RunError for elements above 2^67.
    """
    largest = float(max(x.max(initial=0.0), -x.min(initial=0.0)))  # for the message
    x *= 2.0 ** (UNIT - BITS * lowest)  # in units of the lowest slice
    rest = np.rint(x, out=x)
    magnitude = float(max(rest.max(initial=0.0), -rest.min(initial=0.0)))
    top = lowest
    while magnitude > 2.0 ** (BITS * (top - lowest + 1) - 1):
        top += 1
    if top > MAX_SLICE:
        raise RunError(f"a feature is {largest:.3g}; exact statistics are limited to 1e20")
    parts = {}
    for b in range(top, lowest, -1):
        unit = 2.0 ** (BITS * (b - lowest))
        part = rest * (1.0 / unit)  # exact: the unit is a power of 2
        np.rint(part, out=part)
        rest -= part * unit  # exact: both are multiples of rest's last bit, and the difference is smaller
        parts[b] = part
    parts[lowest] = rest
    return parts


def _add(into: dict[int, np.ndarray], key: int, product: np.ndarray) -> None:
    """Add `product`, float64 integers, to the int64 array into[key], in place; a missing key starts at 0."""
    if key not in into:
        into[key] = np.zeros(product.shape, np.int64)
    for start in range(0, len(product), MATRIX_ROWS_AT_ONCE):  # a few rows at a time, to save memory
        rows = slice(start, start + MATRIX_ROWS_AT_ONCE)
        into[key][rows] += product[rows].astype(np.int64)


class Moments:
    """Accumulated rows (N, D): their number, their exact sum, and the exact sum of their outer products.

    `update` adds rows in place; `merge` returns the union of two disjoint sets. The result has the same bits for any
    order and grouping of both. Instances can be pickled, to be sent by worker processes.
    """

    def __init__(self, dim: int) -> None:
        self.n = 0  # rows, those in `_waiting` included
        self.dim = dim
        self._sums: dict[int, np.ndarray] = {}  # slice -> int64 (D,)
        self._products: dict[int, np.ndarray] = {}  # sum of the numbers of both slices -> int64 (D, D)
        # Up to ROWS_PER_PRODUCT rows of one dtype that `_flush` adds, so that small updates share a matrix product.
        self._waiting: list[np.ndarray] = []

    @classmethod
    def from_features(cls, features: np.ndarray) -> "Moments":
        """Moments of (N, D) features, N >= 1, any float dtype; RunError when a value is not finite."""
        assert features.ndim == 2 and len(features) > 0, features.shape
        return cls(features.shape[1]).update(features)

    def update(self, features: np.ndarray) -> "Moments":
        """Add rows (n, D), n >= 0, float16, float32 or float64; returns self. RunError when a value is not finite."""
        assert features.ndim == 2 and features.shape[1] == self.dim, (features.shape, self.dim)
        if self.n + len(features) > MAX_ROWS:
            raise RunError(f"statistics of more than {MAX_ROWS} rows are not exact; use fewer images")
        for start in range(0, len(features), ROWS_PER_PRODUCT):
            rows = np.array(features[start : start + ROWS_PER_PRODUCT])  # a copy: the caller's buffer may be reused
            if not np.isfinite(rows).all():
                raise RunError("features are not finite: no statistics were computed")
            if rows.dtype not in (np.float16, np.float32):
                rows = rows.astype(np.float64)
            waiting_rows = sum(map(len, self._waiting))
            if self._waiting and (self._waiting[0].dtype != rows.dtype or waiting_rows + len(rows) > ROWS_PER_PRODUCT):
                self._flush()
            self._waiting.append(rows)
            self.n += len(rows)
        return self

    def _flush(self) -> None:
        """Add the waiting rows to the sums and products."""
        if not self._waiting:
            return
        lowest = 0 if self._waiting[0].dtype == np.float64 else 1  # see UNIT
        rows = np.concatenate(self._waiting, dtype=np.float64)
        self._waiting = []
        parts = _slices(rows, lowest)
        del rows  # overwritten by `_slices`
        order = sorted(parts)
        squares = {}
        for b in order:
            _add(self._sums, b, parts[b].sum(axis=0))
            squares[b] = product(parts[b].T, parts[b])
            _add(self._products, 2 * b, squares[b])
        for i, b in enumerate(order):
            for c in order[i + 1 :]:
                both = parts[b] + parts[c]
                cross = product(
                    both.T, both
                )  # b'b + c'c + b'c + c'b: a symmetric product has half the cost of a general one
                del both
                cross -= squares[b]
                cross -= squares[c]
                _add(self._products, b + c, cross)

    def merge(self, other: "Moments") -> "Moments":
        """Moments of the union of two disjoint sets of the same D; neither operand changes."""
        assert self.dim == other.dim, (self.dim, other.dim)
        if self.n + other.n > MAX_ROWS:
            raise RunError(f"statistics of more than {MAX_ROWS} rows are not exact; use fewer images")
        self._flush()
        other._flush()
        union = Moments(self.dim)
        union.n = self.n + other.n
        for name in ("_sums", "_products"):
            mine, theirs, into = getattr(self, name), getattr(other, name), getattr(union, name)
            for key in mine.keys() | theirs.keys():
                into[key] = sum(part[key] for part in (mine, theirs) if key in part)  # a new array, also of one part
        return union

    def state(self) -> dict[str, np.ndarray]:
        """The whole state as arrays for a file: n, dim, sums-SLICE and products-SUM, where SUM is of two slice numbers.

        `from_state` restores the same bits.
        """
        self._flush()
        arrays = {"n": np.array(self.n, np.int64), "dim": np.array(self.dim, np.int64)}
        for name in ("_sums", "_products"):
            arrays |= {f"{name[1:]}-{key}": level for key, level in getattr(self, name).items()}
        return arrays

    @classmethod
    def from_state(cls, arrays: Mapping[str, np.ndarray]) -> "Moments":
        """Moments restored from the arrays of `state`. Raises KeyError or ValueError for other arrays."""
        self = cls(int(arrays["dim"]))
        self.n = int(arrays["n"])
        for name, level in arrays.items():
            kind, dash, key = name.partition("-")
            if not dash:  # n or dim
                continue
            into, shape = {"sums": (self._sums, (self.dim,)), "products": (self._products, (self.dim, self.dim))}[kind]
            if level.dtype != np.int64 or level.shape != shape:
                raise ValueError(f"{name} is {level.dtype} {level.shape}")
            into[int(key)] = level
        return self

    def finish(self, ddof: int = 1) -> Statistics:
        """Mean and covariance, float64, normalised by n - ddof as in np.cov; n > ddof. More rows may be added later."""
        assert self.n > ddof, (self.n, ddof)
        self._flush()
        n = float(self.n)
        # covariance = (n sum x x^T - (sum x) (sum x)^T) / (n (n - ddof)), every term as the sum of two float64 numbers
        total, total_low = _double_double(self._sums, slice(None), -UNIT)  # (D,), (D,): sum of x
        covariance = np.empty((self.dim, self.dim))
        for start in range(0, self.dim, MATRIX_ROWS_AT_ONCE):
            rows = slice(start, start + MATRIX_ROWS_AT_ONCE)
            high, low = _double_double(self._products, rows, -2 * UNIT)  # sum of x x^T
            scaled, scaled_error = _two_product(np.array(n), high)  # n * sum of x x^T
            scaled_low = scaled_error + n * low
            outer, outer_low = _two_product(total[rows, None], total[None, :])
            outer_low += total[rows, None] * total_low[None, :] + total_low[rows, None] * total[None, :]
            difference, rounding = _two_sum(scaled, -outer)
            covariance[rows] = (difference + (rounding + (scaled_low - outer_low))) / (n * (n - ddof))
        return Statistics(n=self.n, mean=total / n, covariance=covariance)


def _two_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a + b rounded, and its rounding error (Knuth's TwoSum)."""
    s = a + b
    v = s - a
    return s, (a - (s - v)) + (b - v)


def _split(a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Upper and lower half of the bits of a float64 a, which add up to a exactly (Veltkamp)."""
    t = a * 134217729.0  # 2^27 + 1
    high = t - (t - a)
    return high, a - high


def _two_product(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a * b rounded, and its rounding error (Dekker's TwoProduct)."""
    p = a * b
    ah, al = _split(a)
    bh, bl = _split(b)
    return p, ((ah * bh - p) + ah * bl + al * bh) + al * bl


def _double_double(levels: dict[int, np.ndarray], rows: slice, exponent: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the sum of int64 levels, where levels[k] has the unit 2^(20 k + exponent).

    Returns two float64 arrays, high and low, whose exact sum is the result; they have 106 bits together.
    """
    high = low = np.zeros(1)
    for key in sorted(levels, reverse=True):
        level, unit = levels[key][rows], 2.0 ** (BITS * key + exponent)
        # an int64 may have more bits than a float64 holds, its upper and lower 32 bits are exact
        for part, scale in ((level >> 32, unit * 2.0**32), (level & 0xFFFFFFFF, unit)):
            high, error = _two_sum(high, part.astype(np.float64) * scale)
            high, low = _two_sum(high, low + error)
    return high, low


def statistics(features: np.ndarray, rows_per_block: int = ROWS_PER_PRODUCT) -> Statistics:
    """Statistics of features (N, D), N >= 2, read a block of rows at a time: a memory map is never loaded as a whole."""
    moments = Moments(features.shape[1])
    for start in range(0, len(features), rows_per_block):
        moments.update(features[start : start + rows_per_block])
        release_pages(features)
    return moments.finish()
