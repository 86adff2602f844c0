"""The metrics of suite `torch-fidelity`: the default numbers of toshas/torch-fidelity 0.4.0, computed from features.

The definitions are those of its metric_fid.py, metric_isc.py, metric_kid.py and metric_prc.py, with the samples as its
input 1 and the reference as its input 2. The package is not needed; tests compare every number with it. The differences
come from float32 rounding, because the package computes kernels and distances in float32: 1e-6 relative in FID, 1e-12
in IS, 1e-6 of the mean kernel in KID, and in precision and recall images on the surface of their nearest ball.
"""

from dataclasses import replace

import numpy as np

from evaluators import adm, frechet, inception_score, kernel_distance, precision_recall
from evaluators.intervals import Estimate
from evaluators.metric_inputs import MetricInputs
from harness.errors import UserError

SEED = 2020
SPLITS = 10
SUBSETS, SUBSET_ROWS = 100, 1000


def fid(features: np.ndarray, reference: np.ndarray) -> float:
    """FID between features (N, D) and reference features (M, D): means in float32, covariances in float64."""
    return frechet.frechet_distance(adm.statistics(features), adm.statistics(reference))


def score(logits: np.ndarray, splits: int = SPLITS, seed: int = SEED) -> float:
    """Inception Score of logits (N, K) without bias, in float64: the mean over splits of the shuffled rows.

    The sizes of the splits differ by at most 1.
    """
    n = len(logits)
    log_p = inception_score.log_softmax(logits)[np.random.RandomState(seed).permutation(n)]
    p = np.exp(log_p)
    edges = [i * n // splits for i in range(splits + 1)]  # first row of each split, and n
    scores = []
    for start, stop in zip(edges, edges[1:], strict=False):
        mean = p[start:stop].mean(axis=0)
        p_log_p = np.sum(p[start:stop] * log_p[start:stop], axis=1).mean()
        scores.append(np.exp(p_log_p - np.sum(mean * np.log(np.where(mean > 0.0, mean, 1.0)))))
    return float(np.mean(scores))


def kid(
    features: np.ndarray, reference: np.ndarray, subsets: int = SUBSETS, rows: int = SUBSET_ROWS, seed: int = SEED
) -> float:
    """KID: the mean over `subsets` random choices of `rows` samples and `rows` reference images, without replacement.

    Kernels are float32, as in the package; their sums are float64. Raises UserError if either set has fewer rows.
    """
    return float(sum(kid_of_subsets(features, reference, subsets, rows, seed)) / subsets)


def kid_of_subsets(
    features: np.ndarray, reference: np.ndarray, subsets: int = SUBSETS, rows: int = SUBSET_ROWS, seed: int = SEED
) -> list[float]:
    """The KID of each random choice, whose mean is `kid`."""
    if min(len(features), len(reference)) < rows:
        raise UserError(
            f"KID of suite torch-fidelity takes subsets of {rows}, but there are {len(features)} samples and "
            f"{len(reference)} reference images; use larger sets, or suite adm-exact or clean"
        )
    random = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        x = features[random.choice(len(features), rows, replace=False)]
        y = reference[random.choice(len(reference), rows, replace=False)]
        within = sum(_off_diagonal_sum(_kernel(side, side)) for side in (x, y))
        values.append(within / (rows * (rows - 1)) - 2.0 * _kernel(x, y).mean(dtype=np.float64))
    return values


def kid_estimate(
    features: np.ndarray,
    reference: np.ndarray,
    block: np.ndarray,
    subsets: int = SUBSETS,
    rows: int = SUBSET_ROWS,
    seed: int = SEED,
) -> Estimate:
    """KID of features (N, D) against reference (M, D), as `kid`; block int64 (N,).

    Given both sets, the subsets are drawn independently of each other, so their mean has the variance of KID over all pairs,
    which the jackknife estimates, and that of a mean of `subsets` draws. At N = 50,000 the second is as large as the first:
    in 100 subsets of 1,000 a sample is drawn twice on average, some four times, some never.
    """
    values = kid_of_subsets(features, reference, subsets, rows, seed)
    pairs = kernel_distance.estimate(features, reference, block)
    spread, blocks = pairs.left_out - pairs.left_out.mean(), len(pairs.left_out)
    variance = (blocks - 1) / blocks * float(spread @ spread)
    widening = np.sqrt(1.0 + float(np.var(values, ddof=1)) / subsets / variance) if variance > 0 else 1.0
    value = float(sum(values) / subsets)
    return Estimate(value=value, left_out=value + widening * spread)


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Kernel values (x . y / D + 1)^3 of all pairs of rows of x (n, D) and y (m, D): (n, m), in the dtype of x."""
    base = x @ y.T * x.dtype.type(1.0 / x.shape[1]) + x.dtype.type(1.0)
    return base * base * base


def _off_diagonal_sum(kernel: np.ndarray) -> float:
    """Sum of a square matrix without its diagonal, in float64."""
    return float(kernel.sum(dtype=np.float64) - np.trace(kernel, dtype=np.float64))


def compute(inputs: MetricInputs) -> dict[str, Estimate]:
    """The metrics "fid", "kid", "is", "precision" and "recall".

    The leave-one-block-out values are those of the metrics without splits and subsets, those of "kid" with the noise of
    the draw of subsets.
    """
    features, reference, block = inputs.features, inputs.reference, inputs.block
    if features.logits is None:
        raise UserError("suite torch-fidelity needs logits, which only the 2015 Inception network gives")
    pooled, reference_pooled = features.pooled, reference.features.pooled
    kid_with_subsets = kid_estimate(pooled, reference_pooled, block)  # first, because it raises for small sets
    precision, recall = precision_recall.estimate(pooled, reference_pooled, block)
    return {
        "fid": replace(frechet.estimate(pooled, reference.statistics, block), value=fid(pooled, reference_pooled)),
        "kid": kid_with_subsets,
        "is": replace(inception_score.estimate(features.logits, block), value=score(features.logits)),
        "precision": precision,
        "recall": recall,
    }
