"""The metrics of suite `torch-fidelity`: what toshas/torch-fidelity 0.4.0 gives by default, from features.

Its definitions (metric_fid.py, metric_isc.py, metric_kid.py, metric_prc.py), with the samples as its input 1 and the
reference as input 2. The package itself is not needed; the tests hold each number against it. Differences are of
float32 rounding alone, for it forms kernels and distances in float32: 1e-6 relative in FID, 1e-12 in IS, 1e-6 of the
mean kernel in KID, and in precision and recall an image whose nearest ball it is on the edge of.
"""

from dataclasses import replace

import numpy as np

from evaluators import adm, frechet, inception_score, kernel_distance, precision_recall
from evaluators.evidence import Evidence
from evaluators.intervals import Estimate
from harness.errors import UserError

SEED = 2020
SPLITS = 10
SUBSETS, SUBSET_ROWS = 100, 1000


def fid(features: np.ndarray, reference: np.ndarray) -> float:
    """FID of features (N, D) from reference features (M, D): means in float32, covariances in float64."""
    return frechet.frechet_distance(adm.statistics(features), adm.statistics(reference))


def score(logits: np.ndarray, splits: int = SPLITS, seed: int = SEED) -> float:
    """Inception Score of logits (N, K) without bias: the rows are shuffled, cut into splits of nearly equal size, and
    the splits' scores averaged, in float64."""
    n = len(logits)
    log_p = inception_score.log_softmax(logits)[np.random.RandomState(seed).permutation(n)]
    p = np.exp(log_p)
    edges = [i * n // splits for i in range(splits + 1)]
    scores = []
    for start, stop in zip(edges, edges[1:], strict=False):
        mean = p[start:stop].mean(axis=0)
        own = np.sum(p[start:stop] * log_p[start:stop], axis=1).mean()
        scores.append(np.exp(own - np.sum(mean * np.log(np.where(mean > 0.0, mean, 1.0)))))
    return float(np.mean(scores))


def kid(
    features: np.ndarray, reference: np.ndarray, subsets: int = SUBSETS, rows: int = SUBSET_ROWS, seed: int = SEED
) -> float:
    """KID: the mean over random subsets of `rows` of each, drawn without replacement, samples first.

    Kernels are float32, as the package has them, their sums float64. UserError where a side has fewer rows.
    """
    if min(len(features), len(reference)) < rows:
        raise UserError(
            f"KID of suite torch-fidelity takes subsets of {rows}, but there are {len(features)} samples and "
            f"{len(reference)} reference images; give as many, or use suite adm-exact or clean"
        )
    random = np.random.RandomState(seed)
    total = 0.0
    for _ in range(subsets):
        x = features[random.choice(len(features), rows, replace=False)]
        y = reference[random.choice(len(reference), rows, replace=False)]
        within = sum(_off_diagonal_sum(_kernel(side, side)) for side in (x, y))
        total += within / (rows * (rows - 1)) - 2.0 * _kernel(x, y).mean(dtype=np.float64)
    return float(total / subsets)


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    base = x @ y.T * x.dtype.type(1.0 / x.shape[1]) + x.dtype.type(1.0)
    return base * base * base


def _off_diagonal_sum(kernel: np.ndarray) -> float:
    return float(kernel.sum(dtype=np.float64) - np.trace(kernel, dtype=np.float64))


def compute(evidence: Evidence) -> dict[str, Estimate]:
    """The metrics "fid", "kid", "is", "precision" and "recall". The spread without each block is that of the metrics
    on all samples, which splits and subsets do not change."""
    own, reference, block = evidence.features, evidence.reference, evidence.block
    if own.logits is None:
        raise UserError("suite torch-fidelity needs an Inception's logits; its network alone gives them")
    distance = kid(own.pooled, reference.features.pooled)  # first, for it may refuse
    precision, recall = precision_recall.estimate(own.pooled, reference.features.pooled, block)
    return {
        "fid": replace(
            frechet.estimate(own.pooled, reference.statistics, block), value=fid(own.pooled, reference.features.pooled)
        ),
        "kid": replace(kernel_distance.estimate(own.pooled, reference.features.pooled, block), value=distance),
        "is": replace(inception_score.estimate(own.logits, block), value=score(own.logits)),
        "precision": precision,
        "recall": recall,
    }
