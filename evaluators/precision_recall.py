"""Improved precision and recall of Kynkaanniemi et al. (arXiv:1904.06991), exact.

Precision is the share of samples inside some reference ball, recall the share of reference images inside some sample
ball. An image's ball reaches to its third nearest neighbour in its own set, and its surface belongs to it (`<=`), as in
openai/guided-diffusion, evaluations/evaluator.py, whose float16 distances are in evaluators/adm.py.

Every decision is that of the squared distance added up from float64 differences, which depends on two rows alone: no
order, block or thread count shows. Matrix products only find the few pairs that need it. They run in float32 tiles with
a proven error bound, and in float64 where that bound tells too few pairs apart (a collapsed generator); there, pairs
nearer than float64 resolves count as equal.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
from threadpoolctl import threadpool_info, threadpool_limits

from evaluators.evidence import Evidence
from evaluators.intervals import Estimate, block_sums
from harness.io.arrays import release_pages
from harness.io.progress import Bar

K = 3
SPLITS = 10  # into halves, for the error bar of recall
NEIGHBOURS = 40  # kept by a sample: 3 of them lie in a given half but for 1 row in 10^9, which is looked up
ROWS_PER_BLOCK = 1024  # a float32 tile is 4 MB, which a cache holds while it is looked at
MAX_WORKERS = 8
TILES_WORTH_WORKERS = 8  # fewer are done before threads are there
FLOOD = 0.05  # share of a tile's pairs that float32 may leave undecided
SAMPLE = 64  # times the neighbours wanted: so many columns give a row its first limit
PAIRS_PER_CALL = 512
CANDIDATES = 1 << 17  # pairs judged at once


def pair_distances(u: np.ndarray, v: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Squared distances float64 (P,) of the rows u[i] and v[j]; equal rows are at exactly 0."""
    out = np.empty(len(i))
    for start in range(0, len(i), PAIRS_PER_CALL):
        part = slice(start, start + PAIRS_PER_CALL)
        difference = u[i[part]].astype(np.float64) - v[j[part]]
        out[part] = np.square(difference, out=difference).sum(axis=1)
    return out


class _Screen:
    """Bounds on the squared distances of the rows of u (N, D) and v (M, D), a tile at a time."""

    def __init__(self, u: np.ndarray, v: np.ndarray) -> None:
        self.u, self.v, self.dim = u, v, u.shape[1]
        # Distances do not mind which centre; cancellation is smallest at the mean, rounded so that float32 rows stay so.
        self.centre = v.mean(axis=0, dtype=np.float64).astype(np.float32)
        self._norms: dict[tuple[bool, int, int, type], np.ndarray] = {}
        self._pool, self._workers = None, 1

    def _centred(self, own: bool, rows: slice, dtype: type) -> tuple[np.ndarray, np.ndarray]:
        """Rows of u (own) or v without the centre (r, D), rounded once, and their squared norms float64 (r,)."""
        x = self.u if own else self.v
        wide = np.result_type(x.dtype, dtype)
        centred = (x[rows].astype(wide, copy=False) - self.centre).astype(dtype, copy=False)
        release_pages(x)
        key = (own or self.u is self.v, rows.start, rows.stop, dtype)
        if key not in self._norms:
            self._norms[key] = np.einsum("nd,nd->n", centred, centred, dtype=np.float64)
        return centred, self._norms[key]

    def _low(self, left: tuple[np.ndarray, np.ndarray], rows: slice, columns: slice, dtype: type):
        """`low`, left being what `_centred` gave for the rows.

        A product of D terms, added in any order, is wrong by less than D units of rounding times |u||v|; the
        centring's rounding and three sums add less than 16 (Higham, Accuracy and Stability, 2002, sec. 3.1). error is
        that of a distance as a share of |u|^2 + |v|^2.
        """
        same = self.u is self.v and rows == columns
        (a, a_norm), (b, b_norm) = left, left if same else self._centred(False, columns, dtype)
        error = (self.dim + 16) * float(np.finfo(dtype).eps) / 2
        if dtype is np.float64 and self._pool is not None:  # float32 tiles are multiplied by a worker each
            d = np.empty((len(a), len(b)))
            parts = np.array_split(np.arange(len(a)), self._workers)
            parts = [slice(part[0], part[-1] + 1) for part in parts if len(part)]
            list(self._pool.map(lambda part: np.matmul(a[part], b.T, out=d[part]), parts))
        else:
            d = a @ b.T  # numpy takes half the work where a is b
        d *= dtype(-2.0)  # exact
        d += (a_norm * (1.0 - error)).astype(dtype)[:, None]
        d += (b_norm * (1.0 - error)).astype(dtype)
        gaps = [(2.0 * error * norm).astype(dtype) for norm in (a_norm, b_norm)]
        if dtype is np.float64:
            d[d <= 0.0] = -np.inf
        return d, *gaps

    def low(self, rows: slice, columns: slice, dtype: type = np.float32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Lower bounds (r, c), and what to add for upper bounds: gap (r,) of the rows plus gap (c,) of the columns.

        In float64 a pair below the resolution has the bounds 0 and -gap: equal for all that can be told.
        """
        return self._low(self._centred(True, rows, dtype), rows, columns, dtype)

    def tiles(self, places: list[tuple[slice, slice]]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """`low` in float32 at all places (rows, columns), in their order, with a bar. Where there are many, a worker takes
        each, a few ahead of their use: judging a tile takes one thread alone, and would leave BLAS's others waiting."""
        with Bar("distances", len(places), "tiles") as bar:
            for tile in self._tiles(places):
                yield tile
                bar.advance()

    def _tiles(self, places: list[tuple[slice, slice]]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        workers = _workers() if len(places) >= TILES_WORTH_WORKERS else 1
        left, last = None, None

        def task(place: tuple[slice, slice]):
            nonlocal left, last
            if place[0] != last:
                left, last = self._centred(True, place[0], np.float32), place[0]
            return left, *place, np.float32

        if workers == 1:
            for place in places:
                yield self._low(*task(place))
            return
        with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(workers) as pool:
            self._pool, self._workers = pool, workers
            try:
                todo = iter(places)
                ahead = deque(pool.submit(self._low, *task(place)) for place in islice(todo, workers + 1))
                while ahead:
                    tile = ahead.popleft().result()
                    ahead.extend(pool.submit(self._low, *task(place)) for place in islice(todo, 1))
                    yield tile
            finally:
                self._pool = None


def _workers() -> int:
    """As many as BLAS would take threads."""
    threads = [each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"]
    return min(max(threads, default=1), MAX_WORKERS)


def _places(near: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns where near, bool (r, c), is set; np.nonzero of one dimension is several times as fast."""
    if not near.flags.c_contiguous and near.T.flags.c_contiguous:
        j, i = _places(near.T)
        return i, j
    return np.divmod(np.flatnonzero(near), near.shape[1])


def _blocks(n: int) -> list[slice]:
    return [slice(start, min(start + ROWS_PER_BLOCK, n)) for start in range(0, n, ROWS_PER_BLOCK)]


class _Shortlist:
    """Candidates for the `count` nearest of the rows of one block: (row, column, low, high), and each row's limit."""

    def __init__(self, rows: slice, count: int) -> None:
        self.rows, self.count = rows, count
        self.limit = np.full(rows.stop - rows.start, np.inf)
        self.found = (np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0), np.empty(0))

    def start(self, low: np.ndarray, own_gap: np.ndarray, gap: np.ndarray) -> None:
        """A limit for rows that have none yet, from upper bounds on some of a tile's (rows, columns)."""
        if np.isinf(self.limit).any() and low.shape[1] > self.count:
            some = slice(None, None, max(low.shape[1] // (self.count * SAMPLE), 1))
            high = np.partition(low[:, some] + gap[some], self.count - 1, axis=1)[:, self.count - 1]
            self.limit = np.minimum(self.limit, np.nextafter(high + own_gap, np.float32(np.inf)))

    def add(self, low, own_gap, gap, near: np.ndarray, column_start: int) -> None:
        """Take in the pairs marked by near, bool (rows, columns), and drop what they displace."""
        i, j = _places(near)
        value = low[i, j].astype(np.float64)
        high = np.maximum(value + (own_gap[i].astype(np.float64) + gap[j]), 0.0)
        new = (i, j + column_start, value, high)
        row, column, value, high = (np.concatenate(pair) for pair in zip(self.found, new, strict=True))
        order = np.lexsort((column, high, row))
        row, column, value, high = row[order], column[order], value[order], high[order]
        first = np.searchsorted(row, np.arange(len(self.limit)))
        place = np.arange(len(row)) - first[row]
        self.limit[row[place == self.count - 1]] = high[place == self.count - 1]
        keep = (place < self.count) | ((value <= self.limit[row]) & (high > 0.0))  # beyond `count` zeros are no news
        self.found = row[keep], column[keep], value[keep], high[keep]

    def nearest(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Column and exact squared distance of the `count` nearest, in order: (rows, count) each."""
        row, column, _, _ = self.found
        exact = pair_distances(x, x, row + self.rows.start, column)
        order = np.lexsort((column, exact, row))
        first = np.searchsorted(row[order], np.arange(len(self.limit)))
        pick = order[first[:, None] + np.arange(self.count)]
        return column[pick], exact[pick]


def nearest(x: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` nearest other rows of every row of x (N, D), N > count: index and squared distance, (N, count)."""
    assert len(x) > count, (x.shape, count)
    screen, blocks = _Screen(x, x), _blocks(len(x))
    lists = [_Shortlist(rows, count) for rows in blocks]
    places = [(p, q) for p in range(len(blocks)) for q in range(p, len(blocks))]  # a tile serves its columns as well
    tiles = screen.tiles([(blocks[p], blocks[q]) for p, q in places])
    for (p, q), tile in zip(places, tiles, strict=True):
        for dtype in (np.float32, np.float64):
            low, gap, other_gap = tile if dtype is np.float32 else screen.low(blocks[p], blocks[q], dtype)
            sides = [(lists[p], low, gap, other_gap, blocks[q])]
            if p == q:
                np.fill_diagonal(low, np.inf)  # a row is not its own neighbour
            else:
                sides.append((lists[q], low.T, other_gap, gap, blocks[p]))
            for side, bound, own, other, _ in sides:
                side.start(bound, own, other)
            near = [bound <= _above(side.limit, dtype)[:, None] for side, bound, *_ in sides]
            shares = [np.count_nonzero(each) / each.size for each in near]
            most = [max(FLOOD, 4 * count / each.shape[1]) for each in near]
            if dtype is np.float64 or all(share <= limit for share, limit in zip(shares, most, strict=True)):
                break
        for (side, bound, own, other, columns), each in zip(sides, near, strict=True):
            side.add(bound, own, other, each, columns.start)
    index, squared = zip(*(each.nearest(x) for each in lists), strict=True)
    return np.concatenate(index), np.concatenate(squared)


def radii(x: np.ndarray, k: int = K) -> np.ndarray:
    """Squared distance float64 (N,) of every row of x (N, D) to its k-th nearest other row, N > k."""
    return nearest(x, k)[1][:, k - 1]


def _above(radius: np.ndarray, dtype: type) -> np.ndarray:
    """The radius, or the next number above it where dtype is narrower: a comparison that loses no pair."""
    return np.nextafter(radius.astype(dtype), dtype(np.inf))


def memberships(y: np.ndarray, x: np.ndarray, y_radii: np.ndarray, x_radii: np.ndarray, sides: np.ndarray):
    """Which x (N, D) lie in a ball of y (M, D), bool (N,); and which y in a ball of x, bool (V, M), for the V rows of
    x_radii (V, N), of which row w counts only the x with sides[w], bool (V, N)."""
    inside, covered = np.zeros(len(x), bool), np.zeros((len(x_radii), len(y)), bool)
    active = np.where(sides, x_radii, -1.0)  # a radius of -1 contains nothing
    largest = active.max(axis=0)
    screen = _Screen(x, y)

    def look(columns: slice, rows: slice, tile: tuple, dtype: type) -> bool:
        """Judge a tile (x, y); False, with what is sure already noted, where too many pairs are unsure."""
        low, x_gap, y_gap = tile
        open_x, open_y = ~inside[columns], ~covered[:, rows].all(axis=0)
        wanted = low <= _above(y_radii[rows], dtype)
        wanted &= open_x[:, None]
        wanted |= (low <= _above(largest[columns], dtype)[:, None]) & open_y
        i, j = _places(wanted)
        left = FLOOD * low.size if dtype is np.float32 else np.inf
        for start in range(0, len(i), CANDIDATES):
            ii, jj = i[start : start + CANDIDATES], j[start : start + CANDIDATES]
            lower = low[ii, jj].astype(np.float64)
            upper = np.maximum(lower + (x_gap[ii].astype(np.float64) + y_gap[jj]), 0.0)
            reach = np.concatenate([y_radii[rows][jj][None], active[:, columns][:, ii]])  # (1 + V, P)
            unsure = np.flatnonzero(((lower <= reach) & (reach < upper) & (reach >= 0.0)).any(axis=0))
            left -= len(unsure)
            if left < 0:
                return False
            upper[unsure] = pair_distances(x, y, ii[unsure] + columns.start, jj[unsure] + rows.start)
            hit = upper <= reach
            inside[ii[hit[0]] + columns.start] = True
            for w in range(len(active)):
                covered[w, jj[hit[1 + w]] + rows.start] = True
        return True

    places = [(columns, rows) for columns in _blocks(len(x)) for rows in _blocks(len(y))]
    for place, tile in zip(places, screen.tiles(places), strict=True):
        if not look(*place, tile, np.float32):
            look(*place, screen.low(*place, np.float64), np.float64)
    return inside, covered


def precision_recall(reference: np.ndarray, samples: np.ndarray, k: int = K) -> tuple[float, float]:
    """Precision and recall of samples (N, D) against reference (M, D), N and M > k, without error bars."""
    inside, covered = memberships(
        reference, samples, radii(reference, k), radii(samples, k)[None], np.ones((1, len(samples)), bool)
    )
    return float(inside.mean()), float(covered[0].mean())


def _thinned_radii(x: np.ndarray, block: np.ndarray, halves: np.ndarray, k: int) -> np.ndarray:
    """Squared radii of the rows of x (N, D) when some of its rows are gone, for the error bar: float64 (1 + B + S, N).

    Row 0: none gone. Rows 1 to B: without block b (N,); a row of that block gets -1, which contains nothing.
    Rows B + 1 on: halves is bool (S, N), and only the rows of the same half of split s are there.
    """
    index, squared = nearest(x, min(max(NEIGHBOURS, k), len(x) - 1))
    blocks = int(block.max()) + 1

    def kth(there: np.ndarray, whole) -> np.ndarray:
        """Radii where only the neighbours marked in there, bool (N, count), are left; whole(i): bool (N,) of a row."""
        place = np.cumsum(there, axis=1)
        out = np.take_along_axis(squared, np.argmax(place == k, axis=1)[:, None], axis=1)[:, 0]
        for i in np.flatnonzero(place[:, -1] < k):
            left = np.flatnonzero(whole(i))
            left = left[left != i]
            out[i] = np.partition(pair_distances(x, x, np.full(len(left), i), left), k - 1)[k - 1]
        return out

    out = [squared[:, k - 1]]
    for b in range(blocks):
        out.append(np.where(block == b, -1.0, kth(block[index] != b, lambda i, b=b: block != b)))
    for half in halves:
        out.append(kth(half[index] == half[:, None], lambda i, half=half: half == half[i]))
    return np.stack(out)


def estimate(features: np.ndarray, reference: np.ndarray, block: np.ndarray, k: int = K) -> tuple[Estimate, Estimate]:
    """Precision and recall of features (N, D) against reference (M, D), M > k, and without each block int64 (N,).

    N must leave more than k rows in a half. Without a block the other samples' balls grow, so recall is judged again
    with radii of its own. Losing a sample and growing its neighbours' balls undo each other, and the jackknife counts
    both: its standard error of recall is 1.1 to 2 times too wide on Gaussians, as Efron and Stein (1981) prove that it
    must be for what is not additive. Disjoint halves of the set give an unbiased variance at half the size, and half
    of it is below the variance at the full size (0.8 to 0.9 of the standard error there). The geometric mean of the
    two is used.
    """
    x, y = np.asanyarray(features), np.asanyarray(reference)  # maps stay maps
    n, blocks = len(x), int(block.max()) + 1
    halves = np.stack([np.random.RandomState(s).permutation(n) < n // 2 for s in range(SPLITS)])  # (S, N)
    thinned = _thinned_radii(x, block, halves, k)  # (1 + B + S, N)
    everyone = np.ones((1 + blocks, n), bool)
    whole, split = thinned[: 1 + blocks], thinned[1 + blocks :]
    inside, covered = memberships(
        y, x, radii(y, k), np.concatenate([whole, split, split]), np.concatenate([everyone, halves, ~halves])
    )
    recall = covered.mean(axis=1)
    recall_halves = recall[1 + blocks :].reshape(2, SPLITS)
    hits = block_sums(inside.astype(np.float64), block)  # (B,)
    precision_left = (hits.sum() - hits) / (n - np.bincount(block))
    half_variance = float(np.mean((recall_halves[0] - recall_halves[1]) ** 2)) / 4.0
    return (
        Estimate(value=float(inside.mean()), left_out=precision_left, trials=n),
        Estimate(value=float(recall[0]), left_out=recall[1 : 1 + blocks], half_variance=half_variance),
    )


def compute(evidence: Evidence) -> dict[str, Estimate]:
    """The metrics "precision" and "recall"."""
    both = estimate(evidence.features.pooled, evidence.reference.features.pooled, evidence.block)
    return dict(zip(("precision", "recall"), both, strict=True))
