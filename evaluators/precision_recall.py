"""Improved precision and recall of Kynkaanniemi et al. (arXiv:1904.06991), exact.

Precision is the share of samples inside a ball of any reference image, recall the share of reference images inside a
ball of any sample. The radius of an image's ball is the distance to its third nearest neighbour in its own set. Balls
are closed (`<=`), as in openai/guided-diffusion, evaluations/evaluator.py, whose float16 distances are in
evaluators/adm.py.

Whether a row is in a ball is decided by the squared distance summed from float64 differences. It depends on two rows
alone, so order, block size and thread count have no effect. Bounds from matrix products decide most pairs without it:
float32 tiles with a proven error bound, and float64 tiles where float32 leaves too many pairs undecided (a collapsed
generator). Pairs below the resolution of the float64 tiles count as equal.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
from threadpoolctl import threadpool_info, threadpool_limits

from evaluators.intervals import Estimate, block_sums
from evaluators.metric_inputs import MetricInputs
from evaluators.products import on_device, product
from harness.io.arrays import release_pages
from harness.io.progress import Bar

K = 3
SPLITS = 10  # random splits into halves, for the error bar of recall
NEIGHBOURS = 40  # kept per sample: all but 1 row in 10^9 have 3 of them in a given half; the others are searched again
ROWS_PER_BLOCK = 1024  # a float32 tile is 4 MB and stays in the cache while it is used
MAX_WORKERS = 8
MIN_TILES_FOR_WORKERS = 8  # fewer tiles are done before threads have started
MAX_UNDECIDED_SHARE = 0.05  # of a tile's pairs; above it, float64 bounds replace float32 bounds
LIMIT_COLUMNS = 64  # columns of a tile, per wanted neighbour, from which a row gets its first limit
PAIRS_PER_CALL = 512
PAIRS_AT_ONCE = 1 << 17  # pairs that are decided at a time

# Lower bounds (r, c), gap (r,) of the rows, gap (c,) of the columns; upper bound = lower bound + both gaps.
Tile = tuple[np.ndarray, np.ndarray, np.ndarray]
Dtype = type[np.float32] | type[np.float64]


def pair_distances(u: np.ndarray, v: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Squared distances float64 (P,) of the rows u[i] and v[j]; equal rows are at exactly 0."""
    out = np.empty(len(i))
    for start in range(0, len(i), PAIRS_PER_CALL):
        part = slice(start, start + PAIRS_PER_CALL)
        difference = u[i[part]].astype(np.float64) - v[j[part]]
        out[part] = np.square(difference, out=difference).sum(axis=1)
    return out


class DistanceBounds:
    """Bounds on the squared distances between the rows of u (N, D) and v (M, D), one tile at a time."""

    def __init__(self, u: np.ndarray, v: np.ndarray) -> None:
        self.u, self.v, self.dim = u, v, u.shape[1]
        # Any centre gives the same distances; the mean gives the least cancellation. In float32, so that subtracting it
        # does not promote float32 rows.
        self.centre = v.mean(axis=0, dtype=np.float64).astype(np.float32)
        # (whether the rows are of u, start, stop, dtype) -> squared norms float64 (r,) of the centred rows
        self._norms: dict[tuple[bool, int, int, Dtype], np.ndarray] = {}
        self._pool: ThreadPoolExecutor | None = None  # only while `tiles` uses several workers
        self._workers = 1

    def _centred(self, of_u: bool, rows: slice, dtype: Dtype) -> tuple[np.ndarray, np.ndarray]:
        """Rows (r, D) minus the centre, rounded to dtype once, and their squared norms float64 (r,).

        of_u: whether they are rows of u; else of v.
        """
        x = self.u if of_u else self.v
        wide = np.result_type(x.dtype, dtype)
        centred = (x[rows].astype(wide, copy=False) - self.centre).astype(dtype, copy=False)
        release_pages(x)
        key = (of_u or self.u is self.v, rows.start, rows.stop, dtype)
        if key not in self._norms:
            self._norms[key] = np.einsum("nd,nd->n", centred, centred, dtype=np.float64)
        return centred, self._norms[key]

    def _tile(self, left: tuple[np.ndarray, np.ndarray], rows: slice, columns: slice, dtype: Dtype) -> Tile:
        """As `tile`. left: what `_centred` returns for the rows of u.

        A dot product of D terms, added in any order, has an error below D units of rounding times |u||v|; the rounding
        of the centred rows and three sums add less than 16 units (Higham, Accuracy and Stability, 2002, sec. 3.1).
        `error` is the error of a squared distance relative to |u|^2 + |v|^2, `underflow` what is lost below the smallest
        normal number, at most that number for each product. A tile in which a square may overflow decides nothing.
        """
        same = self.u is self.v and rows == columns
        a, a_norm = left
        b, b_norm = left if same else self._centred(False, columns, dtype)
        limits = np.finfo(dtype)
        error = (self.dim + 16) * float(limits.eps) / 2
        underflow = (2 * self.dim + 16) * float(limits.tiny)
        if max(a_norm.max(), b_norm.max()) > float(limits.max) / 8:  # |u|^2 + |v|^2 + 2 |u| |v| with room for roundings
            nothing = np.full((len(a), len(b)), limits.min, dtype)
            return nothing, np.full(len(a), np.inf, dtype), np.full(len(b), np.inf, dtype)
        if (
            dtype is np.float64 and self._pool is not None and not on_device()
        ):  # each float32 tile is already computed by one worker
            d = np.empty((len(a), len(b)))
            chunks = np.array_split(np.arange(len(a)), self._workers)
            parts = [slice(chunk[0], chunk[-1] + 1) for chunk in chunks if len(chunk)]
            list(self._pool.map(lambda part: np.matmul(a[part], b.T, out=d[part]), parts))  # waits for all parts
        else:
            d = product(a, b.T)  # numpy computes only one half if a is b
        # |a|^2 + |b|^2 - 2 a.b, less its largest error
        d *= dtype(-2.0)  # exact
        d += (a_norm * (1.0 - error) - underflow).astype(dtype)[:, None]
        d += (b_norm * (1.0 - error)).astype(dtype)
        if dtype is np.float64:
            d[d <= 0.0] = -np.inf  # below the resolution: see `tile`
        row_gap = (2.0 * (error * a_norm + underflow)).astype(dtype)
        return d, row_gap, (2.0 * error * b_norm).astype(dtype)

    def tile(self, rows: slice, columns: slice, dtype: Dtype = np.float32) -> Tile:
        """Lower bounds (r, c) and gaps (r,) and (c,): upper bound = lower bound + row gap + column gap.

        In float64, a pair whose distance may be 0 within the error has the bounds -inf and 0 (users of the upper bound
        raise it to at least 0): it counts as equal.
        """
        return self._tile(self._centred(True, rows, dtype), rows, columns, dtype)

    def tiles(self, slices: list[tuple[slice, slice]]) -> Iterator[Tile]:
        """`tile` in float32 of all slices (rows, columns), in their order, with a progress bar.

        Many tiles are computed by several workers, one tile per worker, a few tiles ahead of the caller. The caller
        uses a tile in a single thread, and BLAS's threads would be idle meanwhile.
        """
        with Bar("distances", len(slices), "tiles") as bar:
            for tile in self._tiles(slices):
                yield tile
                bar.advance()

    def _tiles(self, slices: list[tuple[slice, slice]]) -> Iterator[Tile]:
        """As `tiles`, without the progress bar."""
        workers = _workers() if len(slices) >= MIN_TILES_FOR_WORKERS else 1
        left: tuple[np.ndarray, np.ndarray] | None = None
        last: slice | None = None

        def left_of(rows: slice) -> tuple[np.ndarray, np.ndarray]:
            """Centred rows, computed once for consecutive tiles of the same rows."""
            nonlocal left, last
            if left is None or rows != last:
                left, last = self._centred(True, rows, np.float32), rows
            return left

        if workers == 1:
            for rows, columns in slices:
                yield self._tile(left_of(rows), rows, columns, np.float32)
            return
        with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(workers) as pool:
            self._pool, self._workers = pool, workers  # also for the float64 tiles that the caller needs meanwhile
            try:
                # a generator: a tile is submitted when the next item is taken
                todo = (pool.submit(self._tile, left_of(rows), rows, columns, np.float32) for rows, columns in slices)
                ahead = deque(islice(todo, workers + 1))
                while ahead:
                    tile = ahead.popleft().result()
                    ahead.extend(islice(todo, 1))
                    yield tile
            finally:
                self._pool = None


def _workers() -> int:
    """As many workers as BLAS has threads, at most MAX_WORKERS."""
    threads = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]
    return min(max(threads, default=1), MAX_WORKERS)


def _nonzero(near: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns where near, bool (r, c), is true; np.nonzero of one dimension is several times as fast."""
    if not near.flags.c_contiguous and near.T.flags.c_contiguous:  # `flatnonzero` would copy it
        j, i = _nonzero(near.T)
        return i, j
    return np.divmod(np.flatnonzero(near), near.shape[1])


def _row_slices(n: int) -> list[slice]:
    return [slice(start, min(start + ROWS_PER_BLOCK, n)) for start in range(0, n, ROWS_PER_BLOCK)]


class _Candidates:
    """Candidates for the `count` nearest neighbours of the rows in one slice.

    candidates: row, column, lower bound and upper bound of each pair; rows count from the start of the slice. limit: upper
    bound on each row's count-th smallest distance, inf at first. A pair whose lower bound is above the limit of its row
    is no candidate. Bounds and distances are squared.
    """

    def __init__(self, rows: slice, count: int) -> None:
        self.rows, self.count = rows, count
        self.limit = np.full(rows.stop - rows.start, np.inf)
        self.candidates = (np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0), np.empty(0))

    def set_limits(self, low: np.ndarray, row_gap: np.ndarray, column_gap: np.ndarray) -> None:
        """If any row has no limit yet, set or lower the limits from upper bounds in some columns of a tile.

        Without a limit, all pairs of the row's first tile would become candidates.
        """
        if np.isinf(self.limit).any() and low.shape[1] > self.count:
            some = slice(None, None, max(low.shape[1] // (self.count * LIMIT_COLUMNS), 1))
            high = np.partition(low[:, some] + column_gap[some], self.count - 1, axis=1)[:, self.count - 1]
            # the next larger number, because the sum may have been rounded down
            self.limit = np.minimum(self.limit, np.nextafter(high + row_gap, np.float32(np.inf)))

    def add(
        self, low: np.ndarray, row_gap: np.ndarray, column_gap: np.ndarray, near: np.ndarray, column_start: int
    ) -> None:
        """Add the pairs where near, bool (rows, columns), is true; lower the limits and drop candidates beyond them."""
        i, j = _nonzero(near)
        value = low[i, j].astype(np.float64)
        high = np.maximum(value + (row_gap[i].astype(np.float64) + column_gap[j]), 0.0)
        new = (i, j + column_start, value, high)
        row, column, value, high = (np.concatenate(pair) for pair in zip(self.candidates, new, strict=True))
        order = np.lexsort((column, high, row))
        row, column, value, high = row[order], column[order], value[order], high[order]
        first = np.searchsorted(row, np.arange(len(self.limit)))
        rank = np.arange(len(row)) - first[row]  # of each candidate among those of its row, by upper bound
        self.limit[row[rank == self.count - 1]] = high[rank == self.count - 1]
        # of the pairs at distance 0, a row needs no more than `count`
        keep = (rank < self.count) | ((value <= self.limit[row]) & (high > 0.0))
        self.candidates = row[keep], column[keep], value[keep], high[keep]

    def nearest(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Columns and exact squared distances of the `count` nearest rows of x, nearest first: (rows, count) each.

        Call it after the last `add`; each row then has at least `count` candidates.
        """
        row, column, _, _ = self.candidates
        exact = pair_distances(x, x, row + self.rows.start, column)
        order = np.lexsort((column, exact, row))
        first = np.searchsorted(row[order], np.arange(len(self.limit)))
        pick = order[first[:, None] + np.arange(self.count)]
        return column[pick], exact[pick]


def nearest(x: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` nearest other rows of every row of x (N, D), N > count, nearest first.

    Returns indices int64 (N, count) and squared distances float64 (N, count).
    """
    assert len(x) > count, (x.shape, count)
    bounds, slices = DistanceBounds(x, x), _row_slices(len(x))
    candidates = [_Candidates(rows, count) for rows in slices]
    pairs = [(p, q) for p in range(len(slices)) for q in range(p, len(slices))]  # tile (p, q) also serves as (q, p)
    tiles = bounds.tiles([(slices[p], slices[q]) for p, q in pairs])
    dtypes: tuple[Dtype, ...] = (np.float32, np.float64)  # float64 only if float32 leaves too many pairs undecided
    for (p, q), float32_tile in zip(pairs, tiles, strict=True):
        for dtype in dtypes:
            tile = float32_tile if dtype is np.float32 else bounds.tile(slices[p], slices[q], dtype)
            low, row_gap, column_gap = tile
            # A side is one of the two slices, whose rows search neighbours in the other: its candidates, the lower bounds
            # with its rows first, the gaps of its rows, the gaps of the other slice's rows, and the other slice.
            sides = [(candidates[p], low, row_gap, column_gap, slices[q])]
            if p == q:
                np.fill_diagonal(low, np.inf)  # a row is not its own neighbour
            else:
                sides.append((candidates[q], low.T, column_gap, row_gap, slices[p]))
            for own_candidates, side_low, own_gap, other_gap, _ in sides:
                own_candidates.set_limits(side_low, own_gap, other_gap)
            near = [
                side_low <= _next_above(own_candidates.limit, dtype)[:, None] for own_candidates, side_low, *_ in sides
            ]
            undecided_shares = [np.count_nonzero(pair_is_near) / pair_is_near.size for pair_is_near in near]
            # a few times `count` neighbours per row are always allowed: in a narrow tile they are a large share
            max_shares = [max(MAX_UNDECIDED_SHARE, 4 * count / pair_is_near.shape[1]) for pair_is_near in near]
            if dtype is np.float64 or all(
                share <= max_share for share, max_share in zip(undecided_shares, max_shares, strict=True)
            ):
                break
        for (own_candidates, side_low, own_gap, other_gap, columns), pair_is_near in zip(sides, near, strict=True):
            own_candidates.add(side_low, own_gap, other_gap, pair_is_near, columns.start)
    index, squared = zip(*(of_slice.nearest(x) for of_slice in candidates), strict=True)
    return np.concatenate(index), np.concatenate(squared)


def squared_radii(x: np.ndarray, k: int = K) -> np.ndarray:
    """Squared distance float64 (N,) of every row of x (N, D) to its k-th nearest other row, N > k."""
    return nearest(x, k)[1][:, k - 1]


def _next_above(squared_radius: np.ndarray, dtype: Dtype) -> np.ndarray:
    """Squared radii, converted to dtype and raised to the next larger number.

    So a comparison `bound <= radius` does not miss a pair because the radius was rounded down.
    """
    with np.errstate(over="ignore"):  # infinity is above it, too
        return np.nextafter(squared_radius.astype(dtype), dtype(np.inf))


def memberships(
    y: np.ndarray,  # (M, D)
    x: np.ndarray,  # (N, D)
    y_squared_radii: np.ndarray,  # (M,)
    x_squared_radii: np.ndarray,  # (V, N): V variants
    included: np.ndarray,  # bool (V, N): the rows of x whose balls count in each variant
) -> tuple[np.ndarray, np.ndarray]:
    """Which rows of x lie in a ball of y, bool (N,), and which rows of y lie in a ball of x, bool (V, M) by variant."""
    inside, covered = np.zeros(len(x), bool), np.zeros((len(x_squared_radii), len(y)), bool)
    active = np.where(included, x_squared_radii, -1.0)  # a ball of squared radius -1 contains nothing
    largest = active.max(axis=0)  # (N,), over the variants
    bounds = DistanceBounds(x, y)

    def decide(x_slice: slice, y_slice: slice, tile: Tile, dtype: Dtype) -> bool:
        """Decide the pairs of x[x_slice] and y[y_slice], and set `inside` and `covered` in place.

        Returns False if the float32 bounds leave too many pairs undecided. The pairs decided until then stay recorded.
        """
        low, x_gap, y_gap = tile
        # rows that are not finished: of x, those not yet inside a ball of y; of y, those not yet covered in every variant
        open_x, open_y = ~inside[x_slice], ~covered[:, y_slice].all(axis=0)
        relevant = low <= _next_above(y_squared_radii[y_slice], dtype)
        relevant &= open_x[:, None]
        relevant |= (low <= _next_above(largest[x_slice], dtype)[:, None]) & open_y
        i, j = _nonzero(relevant)
        budget = MAX_UNDECIDED_SHARE * low.size if dtype is np.float32 else np.inf
        for start in range(0, len(i), PAIRS_AT_ONCE):
            ii, jj = i[start : start + PAIRS_AT_ONCE], j[start : start + PAIRS_AT_ONCE]
            lower = low[ii, jj].astype(np.float64)
            upper = np.maximum(lower + (x_gap[ii].astype(np.float64) + y_gap[jj]), 0.0)
            # (1 + V, P): of the ball around the row of y, and of that around the row of x in each variant
            squared_radius = np.concatenate([y_squared_radii[y_slice][jj][None], active[:, x_slice][:, ii]])
            # `>= 0`: a ball that contains nothing needs no decision, also where the lower bound is -inf
            undecided = np.flatnonzero(
                ((lower <= squared_radius) & (squared_radius < upper) & (squared_radius >= 0.0)).any(axis=0)
            )
            budget -= len(undecided)
            if budget < 0:
                return False
            upper[undecided] = pair_distances(x, y, ii[undecided] + x_slice.start, jj[undecided] + y_slice.start)
            # `upper` is now the exact distance where it matters. hit, bool (1 + V, P), row 0: x is in the ball of y; row
            # 1 + v: y is in the ball of x in variant v
            hit = upper <= squared_radius
            inside[ii[hit[0]] + x_slice.start] = True
            for v in range(len(active)):
                covered[v, jj[hit[1 + v]] + y_slice.start] = True
        return True

    slices = [(x_slice, y_slice) for x_slice in _row_slices(len(x)) for y_slice in _row_slices(len(y))]
    for (x_slice, y_slice), tile in zip(slices, bounds.tiles(slices), strict=True):
        if not decide(x_slice, y_slice, tile, np.float32):
            decide(x_slice, y_slice, bounds.tile(x_slice, y_slice, np.float64), np.float64)
    return inside, covered


def precision_recall(reference: np.ndarray, samples: np.ndarray, k: int = K) -> tuple[float, float]:
    """Precision and recall of samples (N, D) against reference (M, D), N and M > k, without error bars."""
    inside, covered = memberships(
        reference,
        samples,
        squared_radii(reference, k),
        squared_radii(samples, k)[None],
        np.ones((1, len(samples)), bool),
    )
    return float(inside.mean()), float(covered[0].mean())


def _squared_radii_in_subsets(x: np.ndarray, block: np.ndarray, halves: np.ndarray, k: int) -> np.ndarray:
    """Squared radii of the rows of x (N, D) in subsets of x, for the error bar: float64 (1 + B + S, N).

    block: int64 (N,), the jackknife block of each row. halves: bool (S, N), which half a row is in, for each split.

    Row 0: all of x. Rows 1 to B: without block b; the rows of that block get -1, a ball that contains nothing. Rows B + 1
    on: for split s, each row within its half.
    """
    index, squared = nearest(x, min(max(NEIGHBOURS, k), len(x) - 1))
    blocks = int(block.max()) + 1

    def kth_distance(kept: np.ndarray, kept_rows: Callable[[int], np.ndarray]) -> np.ndarray:
        """Squared distance (N,) to the k-th nearest kept row.

        kept: bool (N, count), whether each known neighbour is in the subset. kept_rows(i): bool (N,), the subset of row
        i, which is searched if fewer than k of its known neighbours are kept.
        """
        kept_so_far = np.cumsum(kept, axis=1)
        # argmax is the first column where k neighbours are kept; 0 where there is none, and the loop replaces that value
        out = np.take_along_axis(squared, np.argmax(kept_so_far == k, axis=1)[:, None], axis=1)[:, 0]
        for i in map(int, np.flatnonzero(kept_so_far[:, -1] < k)):
            others = np.flatnonzero(kept_rows(i))
            others = others[others != i]
            out[i] = np.partition(pair_distances(x, x, np.full(len(others), i), others), k - 1)[k - 1]
        return out

    def outside(b: int) -> Callable[[int], np.ndarray]:
        return lambda i: block != b

    def same_half(half: np.ndarray) -> Callable[[int], np.ndarray]:
        return lambda i: half == half[i]

    out = [squared[:, k - 1]]
    for b in range(blocks):
        out.append(np.where(block == b, -1.0, kth_distance(block[index] != b, outside(b))))
    for half in halves:
        out.append(kth_distance(half[index] == half[:, None], same_half(half)))
    return np.stack(out)


def estimate(features: np.ndarray, reference: np.ndarray, block: np.ndarray, k: int = K) -> tuple[Estimate, Estimate]:
    """Precision and recall of features (N, D) against reference (M, D), M > k; block int64 (N,).

    A half of the samples must have more than k rows. Without a block the balls of the other samples grow, so recall is
    computed with new radii. Removing a sample and growing its neighbours' balls have opposite effects on recall, but the
    jackknife adds both: on Gaussians its standard error of recall is 1.1 to 2 times too large (Efron and Stein, 1981,
    prove that the jackknife variance of a statistic that is not additive is biased upwards). Disjoint halves of the set
    give an unbiased variance at half the size; half of it is below the variance at full size (0.8 to 0.9 of the standard
    error on Gaussians). `intervals.interval` uses the geometric mean of the two variances.
    """
    x, y = np.asanyarray(features), np.asanyarray(reference)  # memory maps stay memory maps
    n, blocks = len(x), int(block.max()) + 1
    halves = np.stack([np.random.RandomState(s).permutation(n) < n // 2 for s in range(SPLITS)])  # (S, N)
    squared_radius = _squared_radii_in_subsets(x, block, halves, k)  # (1 + B + S, N)
    all_rows = np.ones((1 + blocks, n), bool)
    jackknife, split = squared_radius[: 1 + blocks], squared_radius[1 + blocks :]
    # Variants: all samples and those without each block, then both halves of each split. A removed block needs no
    # exclusion, its squared radii are -1 already.
    inside, covered = memberships(
        y,
        x,
        squared_radii(y, k),
        np.concatenate([jackknife, split, split]),
        np.concatenate([all_rows, halves, ~halves]),
    )
    recall = covered.mean(axis=1)
    recall_halves = recall[1 + blocks :].reshape(2, SPLITS)
    hits = block_sums(inside.astype(np.float64), block)  # (B,)
    precision_left_out = (hits.sum() - hits) / (n - np.bincount(block))
    # The squared difference of two halves estimates twice the variance of one half, and half of that variance is wanted.
    half_variance = float(np.mean((recall_halves[0] - recall_halves[1]) ** 2)) / 4.0
    return (
        Estimate(value=float(inside.mean()), left_out=precision_left_out, trials=n),
        Estimate(value=float(recall[0]), left_out=recall[1 : 1 + blocks], half_variance=half_variance),
    )


def compute(inputs: MetricInputs) -> dict[str, Estimate]:
    """The metrics "precision" and "recall"."""
    both = estimate(inputs.features.pooled, inputs.reference.features.pooled, inputs.block)
    return dict(zip(("precision", "recall"), both, strict=True))
