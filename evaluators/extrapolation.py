"""The Frechet distance of infinitely many samples, FD-infinity (Chong and Forsyth, arXiv:1911.07023).

The Frechet distance of N samples is biased upwards by about b / N, and b depends on the generator, so the ranking at
equal N may be wrong. The distance is computed on random subsets of 15 sizes, evenly spaced from min(5000, N / 10) to N,
and a line in 1 / size is fitted by least squares. Its value at 1 / size = 0 is the estimate. The sizes are those of
layer6ai-labs/dgm-eval d57a6d2, dgm_eval/metrics/fd.py, `compute_FD_infinity`, which draws its subsets without a seed;
here they come from numpy's RandomState(0), whose stream is frozen.

The bias that comes from the size of the reference remains. The fit needs several times as many samples as feature
dimensions: with fewer, the bias is not linear in 1 / size.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from threadpoolctl import threadpool_limits

from evaluators import frechet
from evaluators.intervals import Estimate
from evaluators.metric_inputs import MetricInputs
from evaluators.statistics import Moments, Statistics
from harness.io.processors import processors

POINTS = 15
MAX_START = 5000  # upper bound of the smallest size
SEED = 0
ROWS_PER_BLOCK = 8192  # rows of a subset that are copied at a time


def sizes(n: int, points: int = POINTS) -> np.ndarray:
    """int64 (points,): ascending sizes of the subsets of n samples; the last is n."""
    return np.linspace(min(MAX_START, max(n // 10, 2)), n, points).astype(np.int64)


def subsets(n: int, seed: int = SEED) -> list[np.ndarray]:
    """Row indices of each subset, drawn without replacement and independently of each other; the last has all n rows."""
    random = np.random.RandomState(seed)
    return [random.permutation(n)[:size] for size in sizes(n)]


def intercept_weights(size: np.ndarray) -> np.ndarray:
    """float64 (P,): weights w such that w @ distances is the value of the least-squares line at 1 / size = 0."""
    x = 1.0 / np.asarray(size, dtype=np.float64)
    centred = x - x.mean()
    return 1.0 / len(x) - x.mean() * centred / (centred @ centred)


def _distance(features: np.ndarray, rows: np.ndarray, reference: Statistics) -> float:
    """Frechet distance of features[rows] from the reference. rows: row indices."""
    moments = Moments(features.shape[1])
    for start in range(0, len(rows), ROWS_PER_BLOCK):
        moments.update(features[rows[start : start + ROWS_PER_BLOCK]])
    return frechet.frechet_distance(moments.finish(), reference)


def estimate(features: np.ndarray, reference: Statistics, block: np.ndarray, seed: int = SEED) -> Estimate:
    """FD-infinity of features (N, D), N >= 100.

    A jackknife of the estimate would need a distance at each of 15 sizes without each of 20 blocks, so its variance is
    composed of two parts. Let V be the jackknife variance of the distance at N. To first order a distance is a mean, over
    its subset, of the influence of each sample. So all 15 distances share the error of the N samples, with variance V,
    and a subset of n samples adds an independent error with variance V (N / n - 1). With the intercept weights w, which
    sum to 1, the variance of the estimate is V (1 + sum w^2 (N / n - 1)). `left_out` holds the distances at N without
    each block, centred on the value and scaled by the square root of the bracket.
    """
    drawn = subsets(len(features), seed)
    size = np.array([len(rows) for rows in drawn])
    weights = intercept_weights(size)
    full = frechet.estimate(features, reference, block)
    # One subset per thread, for the reason given in `frechet.estimate`.
    workers = min(processors(), frechet.MAX_WORKERS)
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(workers) as pool:
        # the last subset is all samples, whose distance is full.value
        distances = list(pool.map(lambda rows: _distance(features, rows, reference), drawn[:-1]))
    value = float(weights @ [*distances, full.value])
    widening = np.sqrt(1.0 + weights**2 @ (len(features) / size - 1.0))
    return Estimate(value=value, left_out=value + widening * (full.left_out - full.left_out.mean()))


def compute(inputs: MetricInputs) -> dict[str, Estimate]:
    """The metric "fd_infinity"."""
    reference = inputs.reference.statistics
    return {"fd_infinity": estimate(inputs.features.pooled, reference, inputs.block)}
