"""The numbers of ADM's evaluator (openai/guided-diffusion, evaluations/evaluator.py, commit 22e0df8) from features.

Published tables were made by that program, with its roundings: means and the Inception Score in float32, the latter in
splits of 5,000 rows in file order, and precision and recall on float16 distances. These functions keep them, by name;
evaluators/frechet.py, inception_score.py and precision_recall.py are the same metrics without them. On any other point,
such as the covariance and the root of a matrix product, the exact value lies inside ADM's own rounding.

TensorFlow's float16 sums depend on its build, so the float16 mode agrees with it to 2e-3, not to the digit.
"""

from dataclasses import replace

import numpy as np

from evaluators import frechet, inception_score, precision_recall
from evaluators.intervals import Estimate
from evaluators.statistics import Moments, Statistics
from harness.errors import UserError
from harness.io.arrays import release_pages
from harness.io.progress import Bar

SPLIT_ROWS = 5000
BLOCK_ROWS = 10_000  # rows and columns that one evaluation of ADM's distance graph sees
TILE_ROWS = 512
K = 3
EPS = 1e-6
SEED = 5000  # of those orders
ORDERS = 20  # random orders of the rows that the file's own is held against
MANY_DEVIATIONS = 6.0  # of a t distribution of 19 degrees: once in 10^5 files whose order means nothing
MODES = ("adm", "exact")


class StreamedStatistics:
    """ADM's statistics of features that arrive in file order: the one place where order shows, in the mean's last bits.

    mean: float32, added row by row in float32 as np.mean does over a C-ordered array. covariance: float64, ddof 1,
    exact (np.cov's differs by about 1e-13).
    """

    def __init__(self, dim: int) -> None:
        self._moments = Moments(dim)
        self._sum = np.zeros(dim, np.float32)

    def update(self, features: np.ndarray) -> "StreamedStatistics":
        """Take in the next rows, float32 (n, D)."""
        rows = np.ascontiguousarray(features, dtype=np.float32)
        self._moments.update(rows)
        self._sum = np.add.reduce(np.concatenate([self._sum[None], rows]), axis=0)
        return self

    def finish(self) -> Statistics:
        """Mean float32 (D,) and covariance float64 (D, D) of n >= 2 rows."""
        return self.finish_both()[1]

    def finish_both(self) -> tuple[Statistics, Statistics]:
        """The exact ones, whose mean is float64 (D,), and ADM's; they share the covariance."""
        exact = self._moments.finish()
        return exact, replace(exact, mean=(self._sum / np.float64(self._moments.n)).astype(np.float32))


def statistics(features: np.ndarray) -> Statistics:
    """ADM's statistics of features (N, D), N >= 2, in file order."""
    return _streamed(features).finish()


def _streamed(features: np.ndarray) -> StreamedStatistics:
    stream = StreamedStatistics(features.shape[1])
    for start in range(0, len(features), 8192):
        stream.update(features[start : start + 8192])
        release_pages(features)
    return stream


def fid(features: "np.ndarray | Statistics", reference: Statistics, *, eps: float = 0.0) -> float:
    """FID of pooled features (N, 2048), or sFID of spatial ones (N, 2023) in NHWC order, from a reference's statistics.

    Means keep their dtype: ADM subtracts float32 ones in float32. eps: what ADM adds to both diagonals before the root,
    1e-6 (EPS), when scipy's sqrtm of their product is not finite, which for singular sets depends on the version of
    scipy. The eigenvalues taken here are always finite, so the default never adds it; it is here to explain an old
    number.
    """
    own = features if isinstance(features, Statistics) else statistics(features)
    distance = frechet.frechet_distance(own, reference)
    if eps == 0.0:
        return distance
    # only the covariances under the root are moved: their own traces are ADM's unmoved ones
    moved = [
        replace(side, n=None, covariance=side.covariance + eps * np.eye(len(side.mean))) for side in (own, reference)
    ]
    return frechet.frechet_distance(*moved) - 2.0 * eps * len(own.mean)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities float32 (N, 1008) of logits (N, 1008) without bias, in float32 as TensorFlow takes them."""
    z = np.asarray(logits, dtype=np.float32)
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def score(logits: np.ndarray, split_rows: int = SPLIT_ROWS) -> float:
    """Inception Score of logits (N, 1008): the mean over splits of consecutive rows in file order, a ragged last one
    with equal weight, in float32. A class whose probability underflows adds 0, where ADM's own gives nan."""
    scores = []
    for start in range(0, len(logits), split_rows):
        p = np.maximum(softmax(logits[start : start + split_rows]), np.finfo(np.float32).tiny)
        scores.append(inception_score.inception_score_by_splits(p, split_rows))
        release_pages(logits)
    return float(np.mean(scores))


def order_remark(logits: np.ndarray, split_rows: int = SPLIT_ROWS) -> str:
    """What to say of a score that depends on the order of the rows beyond chance; empty where it does not.

    Held against the same score of the same rows in ORDERS random orders: a file sorted by class has few classes in a
    split and so a far lower score. The splits are as long, so their bias is the same. Up to one split there is no order.
    """
    n = len(logits)
    if n <= split_rows:
        return ""
    random, split = np.random.RandomState(SEED), np.arange(n) // split_rows
    member = np.empty((1 + ORDERS, n), np.int64)  # the split of a row: in file order, then in random ones
    member[0] = split
    for each in member[1:]:
        each[random.permutation(n)] = split
    sizes = np.bincount(split)
    own, sums = _sums_of_splits(logits, member, len(sizes))  # (1 + ORDERS, S), (1 + ORDERS, S, K)
    scores = np.array([_mean_score(p / sizes[:, None], each / sizes) for each, p in zip(own, sums, strict=True)])
    here, others = scores[0], scores[1:]
    spread = max(float(others.std(ddof=1)), 1e-9 * others.mean())
    if abs(here - others.mean()) <= MANY_DEVIATIONS * spread:
        return ""
    whole = _mean_score(sums[0].sum(axis=0, keepdims=True) / n, own[0].sum(keepdims=True) / n)
    return (
        f"the order of the images decides the score: {here:.4g} in file order, {others.mean():.4g} +- {spread:.2g} in random "
        f"order ({whole:.4g} of all at once, without order); shuffle the samples, or use suite adm-exact"
    )


def _sums_of_splits(logits: np.ndarray, member: np.ndarray, splits: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums over each split of sum p log p (O, S) and of p (O, S, K), for O ways int64 (O, N) to deal out the rows."""
    own, sums = np.zeros((len(member), splits)), np.zeros((len(member), splits, logits.shape[1]))
    for start in range(0, len(logits), inception_score.ROWS_AT_ONCE):
        rows = slice(start, start + inception_score.ROWS_AT_ONCE)
        log_p = inception_score.log_softmax(logits[rows])
        p = np.exp(log_p)
        release_pages(logits)
        is_in = np.eye(splits)[member[:, rows]].transpose(0, 2, 1)  # (O, S, n)
        own += is_in @ np.sum(p * log_p, axis=1)
        sums += is_in @ p
    return own, sums


def _mean_score(mean: np.ndarray, own: np.ndarray) -> float:
    """Mean score of splits, from their mean probabilities (S, K) and mean sums of p log p (S,)."""
    entropy = np.sum(mean * np.log(np.where(mean > 0.0, mean, 1.0)), axis=1)
    return float(np.mean(np.exp(own - entropy)))


def _half(x: np.ndarray) -> np.ndarray:
    """x, float32, rounded in place to the values of float16, ties to even; beyond 65,504 it becomes inf.

    On the bits, which is 10 times as fast as numpy's cast; that is left what float16 cannot hold as a normal number.
    """
    size = np.abs(x)
    odd = (size < 2.0**-14) | ~(size < 65_504.0)
    special = x[odd].astype(np.float16) if odd.any() else None
    bits = x.view(np.uint32)
    bits += (bits >> np.uint32(13) & np.uint32(1)) + np.uint32(0xFFF)
    bits &= np.uint32(0xFFFFE000)
    if special is not None:
        x[odd] = special
    return x


def distances_half(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Squared distances float32 (N, M) as ADM's graph takes them: every operand and every result rounded to float16.

    The product is rounded once from a float32 sum, which is TensorFlow's result on a CPU in 99.99 % of entries. Left to
    right, (|u|^2 - 2 u.v) + |v|^2, so it is not symmetric. Values that float16 cannot hold are inf or nan.
    """
    return _half_product(*_half_rows(u), *_half_rows(v))


def _half_rows(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and their squared norms, both rounded to float16."""
    with np.errstate(over="ignore", invalid="ignore"):
        x = _half(np.array(x, dtype=np.float32))
        return x, _half(_half(np.square(x)).sum(axis=1))


def _half_product(u: np.ndarray, u_norm: np.ndarray, v: np.ndarray, v_norm: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        d = _half(u @ v.T)
        d *= np.float32(-2.0)
        d = _half(_half(d) + u_norm[:, None])
        return np.maximum(_half(d + v_norm), 0.0)


def distances_single(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The same in float32: what ADM falls back to for a block with a value that float16 cannot hold."""
    u, v = np.asarray(u, dtype=np.float32), np.asarray(v, dtype=np.float32)
    d = u @ v.T
    d *= np.float32(-2.0)
    d += np.square(u).sum(axis=1)[:, None]
    d += np.square(v).sum(axis=1)
    return np.maximum(d, 0.0, out=d)


def _tiles(u: np.ndarray, v: np.ndarray):
    """(rows, columns, distances) over all of u (N, D) and v (M, D). A block of 10,000 by 10,000 is float16 throughout
    or float32 throughout, as ADM's."""
    with Bar("distances", len(u) * len(range(0, len(v), BLOCK_ROWS)), "rows") as bar:
        for top in range(0, len(u), BLOCK_ROWS):
            for left in range(0, len(v), BLOCK_ROWS):
                columns = slice(left, min(left + BLOCK_ROWS, len(v)))
                parts = [
                    slice(start, min(start + TILE_ROWS, top + BLOCK_ROWS, len(u)))
                    for start in range(top, min(top + BLOCK_ROWS, len(u)), TILE_ROWS)
                ]
                right = _half_rows(v[columns])  # once for the block, not for every tile
                release_pages(v)
                half = _fits_half(u[top : top + BLOCK_ROWS], v[columns]) or all(
                    np.isfinite(_half_product(*_half_rows(u[rows]), *right)).all() for rows in parts
                )
                for rows in parts:
                    if half:
                        yield rows, columns, _half_product(*_half_rows(u[rows]), *right)
                    else:
                        yield rows, columns, distances_single(u[rows], v[columns])
                    bar.advance(rows.stop - rows.start)


def _fits_half(u: np.ndarray, v: np.ndarray) -> bool:
    """Whether no term and no partial sum can leave float16's 65,504."""
    reach = sum(float(np.sqrt(np.einsum("nd,nd->n", x, x).max())) for x in (u, v))
    return reach**2 < 60_000.0


def radii_half(x: np.ndarray, k: int = K) -> np.ndarray:
    """Radius float32 (N,) of every row of x (N, D): entry k of its sorted distances to the set, itself included."""
    best = np.full((len(x), k + 1), np.inf, np.float32)
    for rows, _, d in _tiles(x, x):
        release_pages(x)
        near = np.partition(d, k, axis=1)[:, : k + 1] if d.shape[1] > k + 1 else d
        best[rows] = np.sort(np.concatenate([best[rows], near], axis=1), axis=1)[:, : k + 1]
    return best[:, k]


def precision_and_recall(reference: np.ndarray, samples: np.ndarray, mode: str = "adm") -> tuple[float, float]:
    """Precision (samples in some reference ball) and recall (reference images in some sample ball), k = 3.

    reference (M, D), samples (N, D), M and N > 3. Mode "adm" emulates its float16 distances, "exact" does not round.
    Memory beyond the features: under 500 MB at any M and N.
    """
    if mode not in MODES:
        raise UserError(f"precision and recall have no mode {mode!r}; use one of: {', '.join(MODES)}")
    if mode == "exact":
        return precision_recall.precision_recall(reference, samples)
    reference_radii, sample_radii = radii_half(reference), radii_half(samples)
    inside, covered = np.zeros(len(samples), bool), np.zeros(len(reference), bool)
    for rows, columns, d in _tiles(reference, samples):
        release_pages(reference)
        inside[columns] |= (d <= reference_radii[rows, None]).any(axis=0)
        covered[rows] |= (d <= sample_radii[columns]).any(axis=1)
    return float(inside.mean()), float(covered.mean())


def estimates(
    pooled: np.ndarray,
    spatial: np.ndarray,
    logits: np.ndarray,
    *,
    reference_pooled: np.ndarray,
    reference_statistics: Statistics,
    reference_spatial_statistics: Statistics,
    block: np.ndarray,
    mode: str = "adm",
) -> dict[str, Estimate]:
    """fid, sfid, is, precision and recall with what their intervals need; rows in file order.

    pooled (N, 2048), spatial (N, 2023), logits (N, 1008), reference_pooled (M, 2048), block int64 (N,). The values are
    ADM's; the spread without each block is that of the exact metrics, which ADM's roundings do not change.
    """
    is_estimate = inception_score.estimate(logits, block)
    precision, recall = precision_recall.estimate(pooled, reference_pooled, block)
    values = (precision.value, recall.value)
    if mode != "exact":
        values = precision_and_recall(reference_pooled, pooled, mode)

    def distance(features: np.ndarray, reference: Statistics) -> Estimate:
        exact, judged = _streamed(features).finish_both()
        return frechet.estimate(features, reference, block, own=exact, judged=judged)

    return {
        "fid": distance(pooled, reference_statistics),
        "sfid": distance(spatial, reference_spatial_statistics),
        "is": replace(is_estimate, value=score(logits), remark=order_remark(logits)),
        "precision": replace(precision, value=values[0]),
        "recall": replace(recall, value=values[1]),
    }
