"""Metrics of ADM's evaluator (openai/guided-diffusion, evaluations/evaluator.py, commit 22e0df8), from features.

Published tables were made by that program. These functions reproduce its roundings: means and the Inception Score are
float32, the score is averaged over splits of 5,000 rows in file order, and precision and recall use float16 distances.
evaluators/frechet.py, inception_score.py and precision_recall.py are the same metrics without these roundings.
Everything else, such as the covariance and the root of a matrix product, is exact here and differs from ADM's result
by less than ADM's own rounding error.

TensorFlow's float16 sums depend on its build, so the float16 mode agrees with it to 2e-3, not to the digit.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from evaluators import frechet, inception_score, precision_recall
from evaluators.intervals import Estimate
from evaluators.statistics import Moments, Statistics
from harness.errors import UserError
from harness.io.arrays import release_pages
from harness.io.progress import Bar

SPLIT_ROWS = 5000
BLOCK_ROWS = 10_000  # rows and columns in one evaluation of ADM's distance graph
TILE_ROWS = 512
ROWS_PER_UPDATE = 8192
K = 3
EPS = 1e-6
ORDER_SEED = 5000  # seed of the random orders
RANDOM_ORDERS = 20  # random orders of the rows with which the file's order is compared
MAX_ORDER_DEVIATIONS = 6.0  # in standard deviations (t, 19 degrees): 1 false warning in 10^5 randomly ordered files
MODES = ("adm", "exact")


class StreamedStatistics:
    """ADM's statistics of features that arrive in file order; the last bits of the mean depend on that order.

    mean: float32, added row by row in float32 as np.mean does over a C-ordered array. covariance: float64, ddof 1,
    exact (np.cov's differs by about 1e-13).
    """

    def __init__(self, dim: int) -> None:
        self._moments = Moments(dim)
        self._sum = np.zeros(dim, np.float32)

    def update(self, features: np.ndarray) -> "StreamedStatistics":
        """Add the next rows, float32 (n, D), in place; returns self."""
        rows = np.ascontiguousarray(features, dtype=np.float32)
        self._moments.update(rows)
        # one reduction over the sum so far and the rows: they are added one after the other
        self._sum = np.add.reduce(np.concatenate([self._sum[None], rows]), axis=0)
        return self

    def finish(self) -> Statistics:
        """Mean float32 (D,) and covariance float64 (D, D) of n >= 2 rows."""
        return self.finish_both()[1]

    def finish_both(self) -> tuple[Statistics, Statistics]:
        """The exact statistics, whose mean is float64 (D,), and ADM's; both have the same covariance."""
        exact = self._moments.finish()
        return exact, replace(exact, mean=(self._sum / np.float64(self._moments.n)).astype(np.float32))


def statistics(features: np.ndarray) -> Statistics:
    """ADM's statistics of features (N, D), N >= 2, in file order."""
    return _stream(features).finish()


def _stream(features: np.ndarray) -> StreamedStatistics:
    """The accumulated statistics of features (N, D), read a block of rows at a time."""
    stream = StreamedStatistics(features.shape[1])
    for start in range(0, len(features), ROWS_PER_UPDATE):
        stream.update(features[start : start + ROWS_PER_UPDATE])
        release_pages(features)
    return stream


def fid(features: "np.ndarray | Statistics", reference: Statistics, *, eps: float = 0.0) -> float:
    """FID of pooled features (N, 2048), or sFID of spatial features (N, 2023) in NHWC order, to a reference's statistics.

    Means keep their dtype: ADM subtracts float32 means in float32.
    eps: added to both diagonals before the root. ADM adds 1e-6 (EPS) when scipy's sqrtm of the product is not finite,
    which for singular sets depends on the version of scipy. The eigenvalues computed here are always finite, so the
    default adds nothing; pass EPS to reproduce an old number.
    """
    samples = features if isinstance(features, Statistics) else statistics(features)
    distance = frechet.frechet_distance(samples, reference)
    if eps == 0.0:
        return distance
    # ADM adds eps only under the root. Each of the two traces in the distance below is larger by eps * D: subtract
    # both. n is None because a diagonal that was raised has full rank, whatever the number of rows.
    shifted = [
        replace(side, n=None, covariance=side.covariance + eps * np.eye(len(side.mean)))
        for side in (samples, reference)
    ]
    return frechet.frechet_distance(*shifted) - 2.0 * eps * len(samples.mean)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities float32 (N, 1008) of logits (N, 1008) without bias, computed in float32 as TensorFlow does."""
    z = np.asarray(logits, dtype=np.float32)
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def score(logits: np.ndarray, split_rows: int = SPLIT_ROWS) -> float:
    """Inception Score of logits (N, 1008), in float32: the mean over splits of consecutive rows in file order.

    A shorter last split has the same weight. A class whose probability underflows adds 0; ADM's evaluator gives nan.
    """
    scores = []
    for start in range(0, len(logits), split_rows):
        p = np.maximum(softmax(logits[start : start + split_rows]), np.finfo(np.float32).tiny)
        scores.append(inception_score.inception_score_by_splits(p, split_rows))  # p is a single split
        release_pages(logits)
    return float(np.mean(scores))


def sample_order_warning(logits: np.ndarray, split_rows: int = SPLIT_ROWS) -> str:
    """Warning text where the score depends on the order of the rows by more than chance; otherwise empty.

    The score in file order is compared with the scores of the same rows in RANDOM_ORDERS random orders. A file that is
    sorted by class has few classes in each split, and so a far lower score. The splits have the same length in every
    order, so their bias is the same. With at most one split, the order has no effect.
    """
    n = len(logits)
    if n <= split_rows:
        return ""
    random, split = np.random.RandomState(ORDER_SEED), np.arange(n) // split_rows
    # [o, i]: the split of row i in order o; order 0 is that of the file, the others are random
    split_of = np.empty((1 + RANDOM_ORDERS, n), np.int64)
    split_of[0] = split
    for splits_in_order in split_of[1:]:
        splits_in_order[random.permutation(n)] = split
    sizes = np.bincount(split)
    p_log_p, p_sums = _sums_of_splits(logits, split_of, len(sizes))  # (O, S), (O, S, K): O orders, S splits, K classes
    scores = np.array(
        [
            _mean_score(p_sum / sizes[:, None], p_log_p_sum / sizes)
            for p_log_p_sum, p_sum in zip(p_log_p, p_sums, strict=True)
        ]
    )
    file_order, shuffled = scores[0], scores[1:]
    # at least the rounding error, where all random orders have the same score
    spread = max(float(shuffled.std(ddof=1)), 1e-9 * shuffled.mean())
    if abs(file_order - shuffled.mean()) <= MAX_ORDER_DEVIATIONS * spread:
        return ""
    unsplit = _mean_score(p_sums[0].sum(axis=0, keepdims=True) / n, p_log_p[0].sum(keepdims=True) / n)
    return (
        f"the score depends on the order of the images: {file_order:.4g} in file order, {shuffled.mean():.4g} +- "
        f"{spread:.2g} in random order ({unsplit:.4g} without splits); shuffle the samples, or use suite adm-exact"
    )


def _sums_of_splits(logits: np.ndarray, split_of: np.ndarray, splits: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums over the rows of each split: of sum_k p log p, float64 (O, S), and of p, float64 (O, S, K).

    logits: (N, K). split_of: int64 (O, N), the split of every row in each of O orders.
    """
    p_log_p, p_sums = np.zeros((len(split_of), splits)), np.zeros((len(split_of), splits, logits.shape[1]))
    for start in range(0, len(logits), inception_score.ROWS_AT_ONCE):
        rows = slice(start, start + inception_score.ROWS_AT_ONCE)
        log_p = inception_score.log_softmax(logits[rows])
        p = np.exp(log_p)
        release_pages(logits)
        is_in = np.eye(splits)[split_of[:, rows]].transpose(0, 2, 1)  # (O, S, n) one-hot
        p_log_p += is_in @ np.sum(p * log_p, axis=1)
        p_sums += is_in @ p
    return p_log_p, p_sums


def _mean_score(mean_p: np.ndarray, mean_p_log_p: np.ndarray) -> float:
    """Mean score over splits, from each split's mean of p (S, K) and mean of sum_k p log p (S,)."""
    negative_entropy = np.sum(mean_p * np.log(np.where(mean_p > 0.0, mean_p, 1.0)), axis=1)
    return float(np.mean(np.exp(mean_p_log_p - negative_entropy)))


def _round_to_float16(x: np.ndarray) -> np.ndarray:
    """Round x, float32, to float16 values in place, ties to even, and return it. Values from 65,520 on become inf.

    Works on the bits, which is 10 times as fast as numpy's cast. Values that are not normal float16 numbers (subnormal,
    too large, nan) go through numpy's cast.
    """
    magnitude = np.abs(x)
    irregular = (magnitude < 2.0**-14) | ~(magnitude < 65_504.0)
    special = x[irregular].astype(np.float16) if irregular.any() else None
    # float16 has 13 mantissa bits less. Add half of the last bit that stays (if that bit is 0, a little less than half,
    # so that a tie is rounded to even), then clear the 13.
    bits = x.view(np.uint32)
    bits += (bits >> np.uint32(13) & np.uint32(1)) + np.uint32(0xFFF)
    bits &= np.uint32(0xFFFFE000)
    if special is not None:
        x[irregular] = special
    return x


def squared_distances_float16(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Squared distances float32 (N, M) as ADM's graph computes them: every operand and result is rounded to float16.

    The product is rounded once from a float32 sum, which is TensorFlow's result on a CPU in 99.99 % of entries. The terms
    are added from left to right, (|u|^2 - 2 u.v) + |v|^2, so the result is not symmetric. Values out of float16's range
    are inf or nan.
    """
    return _float16_distances(*_float16_rows(u), *_float16_rows(v))


def _float16_rows(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Copies of the rows (N, D) and their squared norms (N,), float32 arrays of values that are rounded to float16."""
    with np.errstate(over="ignore", invalid="ignore"):
        x = _round_to_float16(np.array(x, dtype=np.float32))
        return x, _round_to_float16(_round_to_float16(np.square(x)).sum(axis=1))


def _float16_distances(u: np.ndarray, u_norm: np.ndarray, v: np.ndarray, v_norm: np.ndarray) -> np.ndarray:
    """As `squared_distances_float16`, from the rows and squared norms that `_float16_rows` returns."""
    with np.errstate(over="ignore", invalid="ignore"):
        d = _round_to_float16(u @ v.T)
        d *= np.float32(-2.0)
        d = _round_to_float16(_round_to_float16(d) + u_norm[:, None])
        return np.maximum(_round_to_float16(d + v_norm), 0.0)


def squared_distances_float32(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Squared distances float32 (N, M) in float32, ADM's fallback for a block with a value out of float16's range."""
    u, v = np.asarray(u, dtype=np.float32), np.asarray(v, dtype=np.float32)
    d = u @ v.T
    d *= np.float32(-2.0)
    d += np.square(u).sum(axis=1)[:, None]
    d += np.square(v).sum(axis=1)
    return np.maximum(d, 0.0, out=d)


def _tiles(u: np.ndarray, v: np.ndarray) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """Yields (rows, columns, d): slices of u (N, D) and v (M, D), and the squared distances d float32 between them.

    As in ADM's evaluator, a block of 10,000 by 10,000 is computed either all in float16 or all in float32.
    Releases the pages of v at every block; the caller releases those of u.
    """
    with Bar("distances", len(u) * len(range(0, len(v), BLOCK_ROWS)), "rows") as bar:
        for top in range(0, len(u), BLOCK_ROWS):
            for left in range(0, len(v), BLOCK_ROWS):
                columns = slice(left, min(left + BLOCK_ROWS, len(v)))
                row_tiles = [
                    slice(start, min(start + TILE_ROWS, top + BLOCK_ROWS, len(u)))
                    for start in range(top, min(top + BLOCK_ROWS, len(u)), TILE_ROWS)
                ]
                v_float16 = _float16_rows(v[columns])  # once for the block, not for every tile
                release_pages(v)
                # the cheap bound first; where it leaves doubt, every tile of the block is tested
                in_range = _fits_float16(u[top : top + BLOCK_ROWS], v[columns]) or all(
                    np.isfinite(_float16_distances(*_float16_rows(u[rows]), *v_float16)).all() for rows in row_tiles
                )
                for rows in row_tiles:
                    if in_range:
                        yield rows, columns, _float16_distances(*_float16_rows(u[rows]), *v_float16)
                    else:
                        yield rows, columns, squared_distances_float32(u[rows], v[columns])
                    bar.advance(rows.stop - rows.start)


def _fits_float16(u: np.ndarray, v: np.ndarray) -> bool:
    """True if every term and every partial sum of the squared distances is certain to stay below float16's 65,504.

    False if that is not certain. (|u| + |v|)^2 is at least as large as each of them; 60,000 leaves room for rounding.
    """
    sum_of_largest_norms = sum(float(np.sqrt(np.einsum("nd,nd->n", x, x).max())) for x in (u, v))
    return sum_of_largest_norms**2 < 60_000.0


def squared_radii_float16(x: np.ndarray, k: int = K) -> np.ndarray:
    """Squared radius float32 (N,) of every row of x (N, D): entry k of its sorted squared distances to all rows.

    Entry 0 is usually the row itself.
    """
    smallest = np.full((len(x), k + 1), np.inf, np.float32)
    for rows, _, d in _tiles(x, x):  # several tiles, one for each block of columns, have the same rows
        release_pages(x)
        near = np.partition(d, k, axis=1)[:, : k + 1] if d.shape[1] > k + 1 else d  # the k + 1 smallest, unsorted
        smallest[rows] = np.sort(np.concatenate([smallest[rows], near], axis=1), axis=1)[:, : k + 1]
    return smallest[:, k]


def precision_and_recall(reference: np.ndarray, samples: np.ndarray, mode: str = "adm") -> tuple[float, float]:
    """Precision (share of samples in a reference ball) and recall (share of reference images in a sample ball), k = 3.

    reference (M, D), samples (N, D), M and N > 3. mode: "adm" emulates ADM's float16 distances, "exact" does not round.
    Memory beyond the features: under 500 MB at any M and N. Raises UserError for an unknown mode.
    """
    if mode not in MODES:
        raise UserError(f"precision and recall have no mode {mode!r}; use one of: {', '.join(MODES)}")
    if mode == "exact":
        return precision_recall.precision_recall(reference, samples)
    reference_squared_radii, sample_squared_radii = squared_radii_float16(reference), squared_radii_float16(samples)
    inside, covered = np.zeros(len(samples), bool), np.zeros(len(reference), bool)
    for rows, columns, d in _tiles(reference, samples):
        release_pages(reference)  # `_tiles` releases those of the samples
        inside[columns] |= (d <= reference_squared_radii[rows, None]).any(axis=0)
        covered[rows] |= (d <= sample_squared_radii[columns]).any(axis=1)
    return float(inside.mean()), float(covered.mean())


def estimates(
    pooled: np.ndarray,
    spatial: np.ndarray,
    logits: np.ndarray,
    *,
    reference_pooled: np.ndarray,
    reference_statistics: Statistics,
    reference_spatial_statistics: Statistics | None,
    block: np.ndarray,
    mode: str = "adm",
) -> dict[str, Estimate]:
    """Estimates of "fid", "sfid", "is", "precision" and "recall"; rows in file order.

    pooled (N, 2048), spatial (N, 2023), logits (N, 1008), reference_pooled (M, 2048), block int64 (N,). The values are
    ADM's; with mode "exact", precision and recall are exact. The leave-one-block-out values are those of the exact
    metrics: ADM's roundings do not change their spread. Without spatial statistics
    there is no "sfid", without reference images (M = 0) neither "precision" nor "recall".
    """
    score_estimate = inception_score.estimate(logits, block)

    def frechet_estimate(features: np.ndarray, reference: Statistics) -> Estimate:
        exact, rounded = _stream(features).finish_both()
        return frechet.estimate(features, reference, block, sample_statistics=exact, value_statistics=rounded)

    found = {"fid": frechet_estimate(pooled, reference_statistics)}
    if reference_spatial_statistics is not None:
        found["sfid"] = frechet_estimate(spatial, reference_spatial_statistics)
    found["is"] = replace(score_estimate, value=score(logits), warning=sample_order_warning(logits))
    if len(reference_pooled):
        precision, recall = precision_recall.estimate(pooled, reference_pooled, block)
        values = (precision.value, recall.value)
        if mode != "exact":
            values = precision_and_recall(reference_pooled, pooled, mode)
        found |= {"precision": replace(precision, value=values[0]), "recall": replace(recall, value=values[1])}
    return found
