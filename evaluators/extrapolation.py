"""The Frechet distance of infinitely many samples, FD-infinity (Chong and Forsyth, arXiv:1911.07023).

The Frechet distance of N samples is biased upwards by about b / N, and b depends on the generator: the ranking at equal
N may be wrong. The distance is taken at 15 sizes of random subset, evenly spaced from min(5000, N / 10) to N, and a
line in 1 / size fitted by least squares: its value at 0 is the estimate. Sizes as in layer6ai-labs/dgm-eval d57a6d2,
dgm_eval/metrics/fd.py, `compute_FD_infinity`, but that draws its subsets without a seed: here they come from numpy's
RandomState(0), whose stream is frozen. The reference stays as large as it is: its own part of the bias remains, and
below some times as many samples as dimensions the bias is no straight line.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from threadpoolctl import threadpool_limits

from evaluators import frechet
from evaluators.evidence import Evidence
from evaluators.intervals import Estimate
from evaluators.statistics import Moments, Statistics

POINTS = 15
LARGEST_START = 5000
SEED = 0
ROWS_PER_BLOCK = 8192  # of a subset, which is never copied whole


def sizes(n: int, points: int = POINTS) -> np.ndarray:
    """int64 (points,): the sizes of subset of n samples at which the distance is taken, ascending to n."""
    return np.linspace(min(LARGEST_START, max(n // 10, 2)), n, points).astype(np.int64)


def subsets(n: int, seed: int = SEED) -> list[np.ndarray]:
    """The rows of each subset, drawn without replacement and independently of the others; the last is all n."""
    random = np.random.RandomState(seed)
    return [random.permutation(n)[:size] for size in sizes(n)]


def intercept_weights(size: np.ndarray) -> np.ndarray:
    """float64 (P,) whose product with distances at these sizes is the least-squares line's value at 1 / size = 0."""
    x = 1.0 / np.asarray(size, dtype=np.float64)
    centred = x - x.mean()
    return 1.0 / len(x) - x.mean() * centred / (centred @ centred)


def _distance(features: np.ndarray, rows: np.ndarray, reference: Statistics) -> float:
    total = None
    for start in range(0, len(rows), ROWS_PER_BLOCK):
        part = Moments.from_features(features[rows[start : start + ROWS_PER_BLOCK]])
        total = part if total is None else total.merge(part)
    return frechet.frechet_distance(total.finish(), reference)


def estimate(features: np.ndarray, reference: Statistics, block: np.ndarray, seed: int = SEED) -> Estimate:
    """FD-infinity of features (N, D), N >= 100, and what its interval needs.

    15 distances without each of 20 blocks would be 300; instead the error is put together from two parts. Let V be the
    jackknife variance of the distance at N. To first order a distance is a mean over its subset of each sample's
    influence, so all 15 share the error of the N samples, whose variance is V, and a subset of n adds its own, of
    variance V (N / n - 1), independent of the others'. With the weights w of the line's end, which sum to 1, the whole
    is V (1 + sum w^2 (N / n - 1)). `left_out` is the distances without each block, spread by the root of the bracket
    and moved about the value.
    """
    drawn = subsets(len(features), seed)
    size = np.array([len(rows) for rows in drawn])
    weights = intercept_weights(size)
    full = frechet.estimate(features, reference, block)
    # One subset a thread, for the reason given in `frechet.estimate`.
    workers = min(os.cpu_count() or 1, frechet.MAX_WORKERS)
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(workers) as pool:
        distances = list(pool.map(lambda rows: _distance(features, rows, reference), drawn[:-1]))
    value = float(weights @ [*distances, full.value])
    widening = np.sqrt(1.0 + weights**2 @ (len(features) / size - 1.0))
    return Estimate(value=value, left_out=value + widening * (full.left_out - full.left_out.mean()))


def compute(evidence: Evidence) -> dict[str, Estimate]:
    """The metric "fd_infinity"."""
    reference = evidence.reference.statistics
    return {"fd_infinity": estimate(evidence.features.pooled, reference, evidence.block)}
