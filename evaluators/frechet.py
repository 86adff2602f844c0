"""The Frechet distance between two sets of features (Heusel et al., arXiv:1706.08500, eq. 6):

    |mu_a - mu_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^(1/2)

No matrix square root is formed. With S_a = F F^T the last trace is the sum of the square roots of the eigenvalues of
the symmetric matrix F^T S_b F. F is the Cholesky factor if the covariance has full rank, and the scaled eigenvectors if
it has not. For the distances without a block of a set of fewer rows than dimensions, F is the matrix of centred rows.

The eigenvalues are checked against sums that can be computed without them: tr (S_a S_b) and the norm of the matrix. By
Weyl's inequality a rounding error d changes the root of an eigenvalue v by less than d / sqrt(v). If these bounds add
up to more than the tolerance, or a check fails, the trace is computed in both orders, (a, b) and (b, a), and compared.
If the two traces differ, both are computed again without the directions that are rounding errors. If they still differ,
an error is raised and no number is returned.
"""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from threadpoolctl import threadpool_limits

from evaluators.intervals import Estimate
from evaluators.metric_inputs import MetricInputs
from evaluators.statistics import Statistics, statistics
from harness.errors import RunError
from harness.io.arrays import chosen_rows
from harness.io.processors import processors

NEGATIVE_TOLERANCE = 1e-10  # of the largest eigenvalue: a more negative eigenvalue is not a rounding error
MAX_WORKERS = 8
WORKERS_BYTES = 1 << 29  # memory of all workers together
ORDER_TOLERANCE = 1e-8  # relative difference of the traces of the two orders, (a, b) and (b, a)
SUM_TOLERANCE = 1e-10  # relative, of the eigenvalues' sum and sum of squares


def _sum_of_roots(matrix: np.ndarray, rank: int, symmetric: bool = False) -> float:
    """Sum of the square roots of the `rank` largest eigenvalues of a symmetric positive semidefinite matrix.

    rank: the largest rank that the number of rows allows. The other eigenvalues are rounding errors, which the square
    root would magnify. symmetric: the matrix is symmetric to the bit, so no symmetrised copy is made.
    Raises RunError for a matrix that is not finite or not positive semidefinite, and if LAPACK's result is wrong.
    """
    if not np.isfinite(matrix).all():
        raise RunError("Frechet distance: a covariance is not finite")
    values = np.linalg.eigvalsh(matrix if symmetric else (matrix + matrix.T) / 2)
    if abs(values.sum() - np.trace(matrix)) > SUM_TOLERANCE * np.abs(values).sum():
        raise RunError(
            "Frechet distance: the eigenvalues do not add up to the trace; this LAPACK library is broken, install another"
        )
    if values[0] < -NEGATIVE_TOLERANCE * max(values[-1], 0.0):
        raise RunError(
            f"Frechet distance: smallest eigenvalue {values[0]:.3e}, largest {values[-1]:.3e}: "
            "a covariance is not positive semidefinite, or this LAPACK library is broken"
        )
    return float(np.sqrt(np.clip(values[max(len(values) - rank, 0) :], 0.0, None)).sum())


def _rank(s: Statistics) -> int:
    """Largest rank that the covariance can have, min(n - 1, D); D if n is not known."""
    return len(s.mean) if s.n is None else min(s.n - 1, len(s.mean))


def _factor(s: Statistics) -> np.ndarray:
    """F (D, r) with F F^T = covariance, r = `_rank(s)`."""
    if _rank(s) == len(s.mean):
        # Fails for a numerically singular covariance, such as that of a feature that is always 0; then eigenvectors.
        with contextlib.suppress(np.linalg.LinAlgError):
            return np.linalg.cholesky(s.covariance)
    values, vectors = np.linalg.eigh(s.covariance)
    if values[0] < -NEGATIVE_TOLERANCE * max(values[-1], 0.0):
        raise RunError(
            f"Frechet distance: a covariance has smallest eigenvalue {values[0]:.3e} and largest {values[-1]:.3e}"
        )
    keep = slice(len(values) - _rank(s), None)
    return vectors[:, keep] * np.sqrt(np.clip(values[keep], 0.0, None))


def _one_order(a: Statistics, b: Statistics, rank: int) -> float | None:
    """tr (S_a S_b)^(1/2) from one Cholesky factor and one set of eigenvalues, half the work of the general case.

    rank: as in `_sum_of_roots`. None if the result is not proved to be within the tolerance: neither covariance has
    full rank, a check fails, or too many eigenvalues are small relative to the largest.
    """
    from scipy.linalg import lapack

    # `.T` gives LAPACK the column-major order that it needs, without a copy: the matrices are symmetric.
    pairs = [(factored, other) for factored, other in ((b, a), (a, b)) if _rank(factored) == len(factored.mean)]
    for factored, other in pairs:  # noqa: B007 -- the last pair tried is the one that is used
        factor, info = lapack.dpotrf(factored.covariance.T, lower=1, clean=1)
        if info == 0:
            break
    else:
        return None
    matrix, _ = lapack.dsygst(other.covariance.T, factor, itype=2, lower=1)  # lower triangle of F^T S F, S of `other`
    # Only one triangle of the symmetric matrix is filled; the sum of all squared elements counts it twice.
    triangle, diagonal = np.triu(matrix.T), np.diagonal(matrix)
    squared_norm = 2.0 * float(np.einsum("ij,ij->", triangle, triangle)) - float(diagonal @ diagonal)
    product_trace = float(np.einsum("ij,ij->", a.covariance, b.covariance))
    if not np.isfinite(squared_norm):
        return None
    values = np.linalg.eigvalsh(matrix)  # reads the lower triangle
    sums_hold = (
        abs(values.sum() - product_trace) <= SUM_TOLERANCE * product_trace
        and abs(values @ values - squared_norm) <= SUM_TOLERANCE * squared_norm
    )
    largest = values[max(len(values) - rank, 0) :]  # (rank,); the others are rounding errors
    rounding = np.finfo(np.float64).eps * np.linalg.norm(a.covariance) * np.linalg.norm(b.covariance)
    roots = np.sqrt(np.clip(largest, 0.0, None))
    # A change d of an eigenvalue v changes its root by less than d / sqrt(v), and by at most sqrt(d) where v is near 0.
    error = np.minimum(np.sqrt(rounding), rounding / np.maximum(roots, 1e-300)).sum()
    return float(roots.sum()) if sums_hold and error <= ORDER_TOLERANCE * roots.sum() else None


def _agree(one: float, other: float) -> bool:
    """Whether the traces of the two orders, (a, b) and (b, a), are equal up to ORDER_TOLERANCE."""
    return abs(one - other) <= ORDER_TOLERANCE * max(one, other)


def _root_trace_of_significant(a: Statistics, b: Statistics) -> float:
    """tr (S_a S_b)^(1/2) over the directions above float64 rounding error, for sets that span few dimensions.

    Most eigenvalues of a collapsed generator's covariance are rounding errors of about 1e-16 of the largest, and their
    square roots add up to more than the tolerance. Directions below D * eps of the largest eigenvalue are dropped
    first. Raises RunError if the traces of the two orders differ even then.
    """
    factors = []
    for covariance in (a.covariance, b.covariance):
        values, vectors = np.linalg.eigh(covariance)
        keep = values > len(values) * np.finfo(np.float64).eps * values[-1]
        factors.append(vectors[:, keep] * np.sqrt(values[keep]))
    product = factors[0].T @ factors[1]  # (r_a, r_b)
    if product.size == 0:  # a covariance is 0
        return 0.0
    rank = min(product.shape)
    one, other = _sum_of_roots(product @ product.T, rank), _sum_of_roots(product.T @ product, rank)
    if not _agree(one, other):
        raise RunError(f"Frechet distance: the two orders give traces {one!r} and {other!r}; no number is reported")
    return one


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Frechet distance between two statistics of equal dimension.

    For equal sets rounding may make it negative, by up to 1e-8 of the traces if the covariance is singular.
    Raises RunError for statistics that are not finite, for an eigenvalue below -1e-10 of the largest, and if the traces
    of the two orders differ by more than 1e-8 even without the directions that are rounding errors.
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
    # Exact statistics of the features; None: computed here.
    sample_statistics: Statistics | None = None,
    # Statistics that the value is computed from, such as those with ADM's float32 mean; the distances without a block
    # always use the exact ones. None: the exact ones for the value, too.
    value_statistics: Statistics | None = None,
) -> Estimate:
    """Frechet distance of features (N, D) from a reference.

    block int64 (N,): the block of each sample, from intervals.assign_blocks.

    The distances without a block reuse one matrix product over all rows, of size (N, N) if N <= D and at most (D, D)
    otherwise. Beyond the features, memory depends on N only through the size of a block.
    """
    n, dim = features.shape
    samples = statistics(features) if sample_statistics is None else sample_statistics
    few_rows = n <= dim
    factor = _factor(reference)  # (D, r)
    if few_rows:
        scaled = (features - samples.mean) @ factor  # (N, r): centred rows times F of the reference
        inner = scaled @ scaled.T  # (N, N)
    else:
        # (r, r), with the nonzero eigenvalues of the (N, N) product
        inner = (n - 1) * (factor.T @ samples.covariance @ factor)
        inner = (inner + inner.T) / 2
    sample_trace, reference_trace = float(np.trace(samples.covariance)), float(np.trace(reference.covariance))
    value = frechet_distance(value_statistics or samples, reference)

    def distance_without(b: int) -> float:
        """The distance of the m samples outside block b."""
        kept = block != b
        m = int(kept.sum())
        removed = chosen_rows(features, ~kept) - samples.mean  # (N - m, D)
        shift = -removed.sum(axis=0) / m  # mean of the kept rows, relative to the mean of all rows
        # of the kept rows' covariance: all rows' sum of squares, less that of the removed rows and that of the shift
        trace = ((n - 1) * sample_trace - np.einsum("nd,nd->", removed, removed) - m * (shift @ shift)) / (m - 1)
        if few_rows:
            matrix = inner[np.ix_(kept, kept)]
            matrix -= matrix.mean(axis=0, keepdims=True)  # centred on the mean of the kept rows
            matrix -= matrix.mean(axis=1, keepdims=True)
        else:
            downdate = np.empty((n - m + 1, factor.shape[1]))
            np.matmul(removed, factor, out=downdate[:-1])
            downdate[-1] = np.sqrt(m) * (shift @ factor)  # subtracts the mean of the kept rows, m times
            del removed
            # The one (r, r) matrix of this thread. It is symmetric to the bit: numpy computes one half and mirrors it.
            matrix = downdate.T @ downdate
            np.subtract(inner, matrix, out=matrix)
            del downdate
        matrix /= m - 1
        root_trace = _sum_of_roots(matrix, min(m - 1, _rank(reference)), symmetric=not few_rows)
        return _assemble(samples.mean + shift - reference.mean, trace, reference_trace, root_trace)

    # One block per thread: BLAS threads gain little on a symmetric eigenvalue problem of this size, and on a busy
    # machine, waiting for each other, they were measured to take 40 times as long.
    worker_bytes = 8 * (2 * len(inner) ** 2 + 2 * dim * int(np.bincount(block).max()))
    workers = min(processors(), MAX_WORKERS, max(WORKERS_BYTES // worker_bytes, 1))
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(workers) as pool:
        left_out = np.array(list(pool.map(distance_without, range(int(block.max()) + 1))))
    return Estimate(value=value, left_out=left_out)


def _assemble(delta: np.ndarray, sample_trace: float, reference_trace: float, root_trace: float) -> float:
    """The Frechet distance from its terms. delta: (D,), difference of the means. root_trace: tr (S_a S_b)^(1/2)."""
    # float32 means, which only ADM's mode has, are subtracted and squared in float32, as in ADM's evaluator
    return float(delta @ delta) + sample_trace + reference_trace - 2.0 * root_trace


def compute(inputs: MetricInputs) -> dict[str, Estimate]:
    """The metric "fd", also under the key "fid", its name on Inception's features; "sfid" of spatial features, if any."""
    features, reference = inputs.features, inputs.reference
    pooled = estimate(features.pooled, reference.statistics, inputs.block)
    estimates = {"fd": pooled, "fid": pooled}
    if features.spatial is not None and reference.spatial_statistics is not None:
        estimates["sfid"] = estimate(features.spatial, reference.spatial_statistics, inputs.block)
    return estimates
