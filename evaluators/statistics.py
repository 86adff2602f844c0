"""Mean and covariance of features: streaming, mergeable, and exact, so that neither order nor batch, worker or machine
shows in a single bit.

Every feature is cut into slices of 20 bits at fixed places of the binary point. Products of slices are integers small
enough for float64 matrix multiplication to add without rounding, whatever order the BLAS chooses (the error-free
transformation of Ozaki et al., Numerical Algorithms 59, 2012); the sums are kept as int64. The only roundings are of a
feature to the grid, 2^-32 for float32 and float16 and 2^-52 for float64, and of the finished numbers to float64.
It takes three symmetric products where a plain covariance takes one.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from harness.errors import RunError
from harness.io.arrays import release_pages

BITS = 20
UNIT = 52  # slice b counts in 2^(20 b - 52); float32 begins at slice 1
ROWS_PER_PRODUCT = 1024  # of products below 2^40: sums stay below 2^53; 2048 were no faster and held more
MAX_ROWS = 2**22  # int64 sums of at most five products below 2^38 each
MAX_SLICE = 5  # |feature| <= 2^67
ROWS_PER_FINISH = 256


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What a Frechet distance needs to know of a set.

    n: number of rows; None when the statistics came from a file that does not say.
    mean: float64 (D,), float32 where ADM's evaluator has it so. covariance: float64 (D, D), symmetric, normalised by
    n - 1 where made here.
    """

    n: int | None
    mean: np.ndarray
    covariance: np.ndarray


def _slices(x: np.ndarray, lowest: int) -> dict[int, np.ndarray]:
    """Integers float64 (rows, D) by slice, |.| <= 2^19, that add up to x float64 on the grid of the lowest slice; x is
    used up.

    A slice is a function of its element alone: an element's share of slices above its size is 0.
    """
    largest = float(max(x.max(initial=0.0), -x.min(initial=0.0)))
    x *= 2.0 ** (UNIT - BITS * lowest)  # in units of the lowest slice
    rest = np.rint(x, out=x)
    reach = float(max(rest.max(initial=0.0), -rest.min(initial=0.0)))
    top = lowest
    while reach > 2.0 ** (BITS * (top - lowest + 1) - 1):
        top += 1
    if top > MAX_SLICE:
        raise RunError(f"features reach {largest:.3g}, more than statistics hold (1e20)")
    parts = {}
    for b in range(top, lowest, -1):
        unit = 2.0 ** (BITS * (b - lowest))
        part = rest * (1.0 / unit)
        np.rint(part, out=part)
        rest -= part * unit  # exact: both are multiples of rest's last bit, and the difference is smaller
        parts[b] = part
    parts[lowest] = rest
    return parts


def _add(into: dict[int, np.ndarray], key: int, product: np.ndarray) -> None:
    if key not in into:
        into[key] = np.zeros(product.shape, np.int64)
    for start in range(0, len(product), ROWS_PER_FINISH):  # no second array of this size is made
        rows = slice(start, start + ROWS_PER_FINISH)
        into[key][rows] += product[rows].astype(np.int64)


class Moments:
    """A set of rows (N, D) under accumulation: how many, their exact sum, their exact sum of outer products.

    `update` adds rows in place; `merge` gives the union of two disjoint sets. Any order and any grouping of either ends
    in the same bits. Pickles, so a worker can send its own.
    """

    def __init__(self, dim: int) -> None:
        self.n = 0
        self.dim = dim
        self._sums: dict[int, np.ndarray] = {}  # slice -> int64 (D,)
        self._products: dict[int, np.ndarray] = {}  # slice + slice -> int64 (D, D)
        self._waiting: list[np.ndarray] = []  # rows below ROWS_PER_PRODUCT, all of one lowest slice

    @classmethod
    def from_features(cls, features: np.ndarray) -> "Moments":
        """Moments of (N, D) features, N >= 1, any float dtype; RunError when a value is not finite."""
        assert features.ndim == 2 and len(features) > 0, features.shape
        return cls(features.shape[1]).update(features)

    def update(self, features: np.ndarray) -> "Moments":
        """Take in rows (n, D), n >= 0, float16, float32 or float64; returns itself."""
        assert features.ndim == 2 and features.shape[1] == self.dim, (features.shape, self.dim)
        if self.n + len(features) > MAX_ROWS:
            raise RunError(f"statistics of more than {MAX_ROWS} rows are not exact; make them of fewer images")
        for start in range(0, len(features), ROWS_PER_PRODUCT):
            rows = np.array(features[start : start + ROWS_PER_PRODUCT])  # a copy: the caller's buffer may be reused
            if not np.isfinite(rows).all():
                raise RunError("features are not finite: no statistics were computed")
            if rows.dtype not in (np.float16, np.float32):
                rows = rows.astype(np.float64)
            held = sum(map(len, self._waiting))
            if self._waiting and (self._waiting[0].dtype != rows.dtype or held + len(rows) > ROWS_PER_PRODUCT):
                self._flush()
            self._waiting.append(rows)
            self.n += len(rows)
        return self

    def _flush(self) -> None:
        if not self._waiting:
            return
        lowest = 0 if self._waiting[0].dtype == np.float64 else 1
        rows = np.concatenate(self._waiting, dtype=np.float64)
        self._waiting = []
        parts = _slices(rows, lowest)
        del rows
        order = sorted(parts)
        squares = {}
        for b in order:
            _add(self._sums, b, parts[b].sum(axis=0))
            squares[b] = parts[b].T @ parts[b]
            _add(self._products, 2 * b, squares[b])
        for i, b in enumerate(order):
            for c in order[i + 1 :]:
                both = parts[b] + parts[c]
                cross = both.T @ both  # b'b + c'c + b'c + c'b: a symmetric product costs half a general one
                del both
                cross -= squares[b]
                cross -= squares[c]
                _add(self._products, b + c, cross)

    def merge(self, other: "Moments") -> "Moments":
        """Moments of the union of two disjoint sets of the same D; neither operand changes."""
        assert self.dim == other.dim, (self.dim, other.dim)
        if self.n + other.n > MAX_ROWS:
            raise RunError(f"statistics of more than {MAX_ROWS} rows are not exact; make them of fewer images")
        self._flush()
        other._flush()
        union = Moments(self.dim)
        union.n = self.n + other.n
        for name in ("_sums", "_products"):
            mine, theirs, into = getattr(self, name), getattr(other, name), getattr(union, name)
            for key in mine.keys() | theirs.keys():
                into[key] = sum(part[key] for part in (mine, theirs) if key in part)
        return union

    def state(self) -> dict[str, np.ndarray]:
        """All of it as arrays, for a file; from it `from_state` continues to the same bits."""
        self._flush()
        arrays = {"n": np.array(self.n, np.int64), "dim": np.array(self.dim, np.int64)}
        for name in ("_sums", "_products"):
            arrays |= {f"{name[1:]}-{key}": level for key, level in getattr(self, name).items()}
        return arrays

    @classmethod
    def from_state(cls, arrays: Mapping[str, np.ndarray]) -> "Moments":
        """What `state` gave; KeyError or ValueError for anything else."""
        self = cls(int(arrays["dim"]))
        self.n = int(arrays["n"])
        for name, level in arrays.items():
            kind, dash, key = name.partition("-")
            if not dash:
                continue
            into, shape = {"sums": (self._sums, (self.dim,)), "products": (self._products, (self.dim, self.dim))}[kind]
            if level.dtype != np.int64 or level.shape != shape:
                raise ValueError(f"{name} is {level.dtype} {level.shape}")
            into[int(key)] = level
        return self

    def finish(self, ddof: int = 1) -> Statistics:
        """Mean and covariance float64, normalised by n - ddof as np.cov does; n > ddof. Accumulation may go on after."""
        assert self.n > ddof, (self.n, ddof)
        self._flush()
        n = float(self.n)
        total, rest = _pair(self._sums, slice(None), -UNIT)  # (D,), (D,)
        covariance = np.empty((self.dim, self.dim))
        for start in range(0, self.dim, ROWS_PER_FINISH):
            rows = slice(start, start + ROWS_PER_FINISH)
            high, low = _pair(self._products, rows, -2 * UNIT)  # sum of x x^T
            high, error = _product(np.array(n), high)  # n * sum of x x^T
            low = error + n * low
            outer, error = _product(total[rows, None], total[None, :])
            error += total[rows, None] * rest[None, :] + rest[rows, None] * total[None, :]
            difference, rounding = _sum(high, -outer)
            covariance[rows] = (difference + (rounding + (low - error))) / (n * (n - ddof))
        return Statistics(n=self.n, mean=total / n, covariance=covariance)


def _sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a + b rounded, and what the rounding lost (Knuth)."""
    s = a + b
    v = s - a
    return s, (a - (s - v)) + (b - v)


def _halves(a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    t = a * 134217729.0  # 2^27 + 1
    high = t - (t - a)
    return high, a - high


def _product(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a * b rounded, and what the rounding lost (Dekker, Veltkamp)."""
    p = a * b
    ah, al = _halves(a)
    bh, bl = _halves(b)
    return p, ((ah * bh - p) + ah * bl + al * bh) + al * bl


def _pair(levels: dict[int, np.ndarray], rows: slice, exponent: int) -> tuple[np.ndarray, np.ndarray]:
    """The sum of int64 levels, level k in units of 2^(20 k + exponent), as two float64 arrays: 106 bits."""
    high = low = np.zeros(1)
    for key in sorted(levels, reverse=True):
        level, unit = levels[key][rows], 2.0 ** (BITS * key + exponent)
        for part, scale in ((level >> 32, unit * 2.0**32), (level & 0xFFFFFFFF, unit)):  # each fits a float64
            high, error = _sum(high, part.astype(np.float64) * scale)
            high, low = _sum(high, low + error)
    return high, low


def statistics(features: np.ndarray, rows_per_block: int = ROWS_PER_PRODUCT) -> Statistics:
    """Statistics of (N, D) features, N >= 2, read a block of rows at a time: a file map is never loaded whole."""
    total = Moments(features.shape[1])
    for start in range(0, len(features), rows_per_block):
        total.update(features[start : start + rows_per_block])
        release_pages(features)
    return total.finish()
