"""The Frechet distance between two sets of features (Heusel et al., arXiv:1706.08500, eq. 6):

    |mu_a - mu_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^(1/2)

No matrix square root is formed. With S_a = F F^T the last trace is the sum of the square roots of the eigenvalues of
the symmetric F^T S_b F: F is the Cholesky factor where the covariance has full rank, the scaled eigenvectors where it
has not, and the centred rows themselves where there are fewer rows than dimensions.

The eigenvalues are checked against sums that need no eigenvalue: tr (S_a S_b) and the matrix's norm. By Weyl's
inequality a rounding of d moves the root of an eigenvalue v by less than d / sqrt(v); where these bounds add up to more
than the tolerance, or a check fails, the other order is computed too and compared. A result that fails that is an
error, never a number.
"""

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from threadpoolctl import threadpool_limits

from evaluators.evidence import Evidence
from evaluators.intervals import Estimate
from evaluators.statistics import Statistics, statistics
from harness.errors import RunError
from harness.io.arrays import chosen_rows

NEGATIVE_TOLERANCE = 1e-10  # of the largest eigenvalue: further below zero than this is not rounding
MAX_WORKERS = 8
WORKERS_BYTES = 1 << 29  # what all of them may hold
ORDER_TOLERANCE = 1e-8  # relative difference of the two orders
SUM_TOLERANCE = 1e-10  # relative, of the eigenvalues' sum and sum of squares


def _sum_of_roots(matrix: np.ndarray, rank: int, symmetric: bool = False) -> float:
    """Sum of the square roots of the `rank` largest eigenvalues of a symmetric positive semidefinite matrix.

    The rank is what the number of rows allows: below it eigenvalues are rounding, and a square root would magnify it.
    symmetric: to the bit, so that no other matrix of its size need be made.
    """
    if not np.isfinite(matrix).all():
        raise RunError("Frechet distance: a covariance is not finite")
    values = np.linalg.eigvalsh(matrix if symmetric else (matrix + matrix.T) / 2)
    if abs(values.sum() - np.trace(matrix)) > SUM_TOLERANCE * np.abs(values).sum():
        raise RunError(
            "Frechet distance: eigenvalues do not add up to the trace, so there are no two orders to compare: "
            "this LAPACK is broken"
        )
    if values[0] < -NEGATIVE_TOLERANCE * max(values[-1], 0.0):
        raise RunError(
            f"Frechet distance: eigenvalue {values[0]:.3e} beside a largest of {values[-1]:.3e}: "
            "a covariance is not positive semidefinite, or this LAPACK is broken"
        )
    return float(np.sqrt(np.clip(values[max(len(values) - rank, 0) :], 0.0, None)).sum())


def _rank(s: Statistics) -> int:
    return len(s.mean) if s.n is None else min(s.n - 1, len(s.mean))


def _factor(s: Statistics) -> np.ndarray:
    """F (D, r) with F F^T = covariance."""
    if _rank(s) == len(s.mean):
        # Numerically singular, for instance features that are always zero: the eigenvectors below know how to.
        with contextlib.suppress(np.linalg.LinAlgError):
            return np.linalg.cholesky(s.covariance)
    values, vectors = np.linalg.eigh(s.covariance)
    if values[0] < -NEGATIVE_TOLERANCE * max(values[-1], 0.0):
        raise RunError(f"Frechet distance: a covariance has eigenvalue {values[0]:.3e} beside {values[-1]:.3e}")
    keep = slice(len(values) - _rank(s), None)
    return vectors[:, keep] * np.sqrt(np.clip(values[keep], 0.0, None))


def _one_order(a: Statistics, b: Statistics, rank: int) -> float | None:
    """Sum of the roots by one Cholesky factor, half the work of a congruence and one set of eigenvalues.

    None where that is not proved to be within the tolerance: neither covariance has full rank, a check fails, or the
    eigenvalues are too small beside the largest.
    """
    from scipy.linalg import lapack

    pairs = [(own, other) for own, other in ((b, a), (a, b)) if _rank(own) == len(own.mean)]
    for own, other in pairs:  # noqa: B007 -- the last pair tried is the one that is used
        factor, info = lapack.dpotrf(own.covariance.T, lower=1, clean=1)
        if info == 0:
            break
    else:
        return None
    matrix, _ = lapack.dsygst(other.covariance.T, factor, itype=2, lower=1)  # lower triangle of F^T S F
    triangle, diagonal = np.triu(matrix.T), np.diagonal(matrix)
    norm = 2.0 * float(np.einsum("ij,ij->", triangle, triangle)) - float(diagonal @ diagonal)
    product_trace = float(np.einsum("ij,ij->", a.covariance, b.covariance))
    if not np.isfinite(norm):
        return None
    values = np.linalg.eigvalsh(matrix)  # reads the lower triangle
    sums_hold = (
        abs(values.sum() - product_trace) <= SUM_TOLERANCE * product_trace
        and abs(values @ values - norm) <= SUM_TOLERANCE * norm
    )
    kept = values[max(len(values) - rank, 0) :]
    rounding = np.finfo(np.float64).eps * np.linalg.norm(a.covariance) * np.linalg.norm(b.covariance)
    roots = np.sqrt(np.clip(kept, 0.0, None))
    reach = np.minimum(np.sqrt(rounding), rounding / np.maximum(roots, 1e-300)).sum()
    return float(roots.sum()) if sums_hold and reach <= ORDER_TOLERANCE * roots.sum() else None


def _agree(one: float, other: float) -> bool:
    return abs(one - other) <= ORDER_TOLERANCE * max(one, other)


def _root_trace_of_significant(a: Statistics, b: Statistics) -> float:
    """tr (S_a S_b)^(1/2) over the directions that stand above float64 rounding, for sets that span few dimensions.

    A collapsed generator's covariance is mostly rounding noise of 1e-16 of its largest eigenvalue, whose square roots
    add up to more than the tolerance. Directions below n * eps of the largest are dropped before the product.
    """
    factors = []
    for covariance in (a.covariance, b.covariance):
        values, vectors = np.linalg.eigh(covariance)
        keep = values > len(values) * np.finfo(np.float64).eps * values[-1]
        factors.append(vectors[:, keep] * np.sqrt(values[keep]))
    across = factors[0].T @ factors[1]  # (r_a, r_b)
    if across.size == 0:
        return 0.0
    rank = min(across.shape)
    one, other = _sum_of_roots(across @ across.T, rank), _sum_of_roots(across.T @ across, rank)
    if not _agree(one, other):
        raise RunError(f"Frechet distance: the two orders give traces {one!r} and {other!r}; no number is reported")
    return one


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """The distance between two statistics of equal dimension. For equal sets it may be negative by rounding: up to
    1e-8 of the traces where the covariance is singular.

    Raises RunError when an eigenvalue is below -1e-10 of the largest or the two orders differ by more than 1e-8.
    """
    rank = min(_rank(a), _rank(b))
    for side in (a, b):
        if not (np.isfinite(side.covariance).all() and np.isfinite(side.mean).all()):
            raise RunError("Frechet distance: a covariance or mean is not finite")
    trace = _one_order(a, b, rank)
    if trace is None:
        factor_a, factor_b = _factor(a), _factor(b)
        trace = _sum_of_roots(factor_a.T @ b.covariance @ factor_a, rank)
        if not _agree(trace, _sum_of_roots(factor_b.T @ a.covariance @ factor_b, rank)):
            trace = _root_trace_of_significant(a, b)
    delta = a.mean - b.mean
    return _assemble(delta, float(np.trace(a.covariance)), float(np.trace(b.covariance)), trace)


def estimate(
    features: np.ndarray,
    reference: Statistics,
    block: np.ndarray,
    *,
    own: Statistics | None = None,  # of the features, where they are known: exact
    judged: Statistics | None = None,  # what the value is of, where it is another mean's: ADM's
) -> Estimate:
    """Distance of features (N, D) from a reference, and the distance without each block int64 (N,).

    The distances without a block reuse one product over all rows: (N, N) where N <= D, (D, D) where not. Beyond the
    features, memory depends on N only through the size of a block.
    """
    n, dim = features.shape
    own = statistics(features) if own is None else own
    few_rows = n <= dim
    factor = _factor(reference)  # (D, r)
    if few_rows:
        turned = (features - own.mean) @ factor  # (N, r): rows in coordinates where the reference is the identity
        inner = turned @ turned.T  # (N, N)
    else:
        inner = (n - 1) * (factor.T @ own.covariance @ factor)  # (r, r)
        inner = (inner + inner.T) / 2
    own_trace, reference_trace = float(np.trace(own.covariance)), float(np.trace(reference.covariance))
    value = frechet_distance(judged or own, reference)  # of the exact statistics: the rows' order does not show

    def without(b: int) -> float:
        kept = block != b
        m = int(kept.sum())
        gone = chosen_rows(features, ~kept) - own.mean  # (N - m, D)
        shift = -gone.sum(axis=0) / m  # mean of the kept rows: all rows together have mean 0
        spread = ((n - 1) * own_trace - np.einsum("nd,nd->", gone, gone) - m * (shift @ shift)) / (m - 1)
        if few_rows:
            part = inner[np.ix_(kept, kept)]
            part -= part.mean(axis=0, keepdims=True)  # centred on the kept rows' own mean
            part -= part.mean(axis=1, keepdims=True)
        else:
            lost = np.empty((n - m + 1, factor.shape[1]))
            np.matmul(gone, factor, out=lost[:-1])
            lost[-1] = np.sqrt(m) * (shift @ factor)  # the kept rows' own mean, m times
            del gone
            part = lost.T @ lost  # this thread's one matrix; numpy takes half the work, and both halves are equal
            np.subtract(inner, part, out=part)
            del lost
        part /= m - 1
        root = _sum_of_roots(part, min(m - 1, _rank(reference)), symmetric=not few_rows)
        return _assemble(own.mean + shift - reference.mean, spread, reference_trace, root)

    # One block a thread: a symmetric eigenvalue problem of this size gains little from threads of its own, and BLAS
    # threads that wait for each other on a busy machine have been seen to take 40 times as long.
    each = 8 * (2 * len(inner) ** 2 + 2 * dim * int(np.bincount(block).max()))
    workers = min(os.cpu_count() or 1, MAX_WORKERS, max(WORKERS_BYTES // each, 1))
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(workers) as pool:
        left_out = np.array(list(pool.map(without, range(int(block.max()) + 1))))
    return Estimate(value=value, left_out=left_out)


def _assemble(delta: np.ndarray, own_trace: float, reference_trace: float, root_trace: float) -> float:
    # float32 means, which only ADM's mode has, are subtracted and squared in float32, as its evaluator does
    return float(delta @ delta) + own_trace + reference_trace - 2.0 * root_trace


def compute(evidence: Evidence) -> dict[str, Estimate]:
    """The metric "fd", on Inception's features also called "fid"; "sfid" where the features have a spatial part."""
    own, reference = evidence.features, evidence.reference
    pooled = estimate(own.pooled, reference.statistics, evidence.block)
    found = {"fd": pooled, "fid": pooled}
    if own.spatial is not None and reference.spatial_statistics is not None:
        found["sfid"] = estimate(own.spatial, reference.spatial_statistics, evidence.block)
    return found
