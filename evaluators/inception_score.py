"""The Inception Score of Salimans et al. (arXiv:1606.03498, sec. 4): exp of the mutual information between image and
class.

The default takes all samples at once and does not know their order. ADM's evaluator (openai/guided-diffusion,
evaluations/evaluator.py, `compute_inception_score`) averages over splits of 5,000 consecutive rows in file order,
which makes the score depend on that order; it is kept as a function of its own.
"""

import numpy as np

from evaluators.evidence import Evidence
from evaluators.intervals import Estimate
from harness.io.arrays import release_pages

ROWS_AT_ONCE = 4096  # bounds the memory: some arrays float64 (rows, K)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities float64 (N, K) of logits (N, K)."""
    z = np.asarray(logits, dtype=np.float64)
    z = z - z.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def _negative_entropy(p: np.ndarray) -> np.ndarray:
    """Sum of p log p over the last axis; a class that nobody chose adds 0."""
    return np.sum(p * np.log(np.where(p > 0.0, p, 1.0)), axis=-1)


def estimate(logits: np.ndarray, block: np.ndarray) -> Estimate:
    """Score of logits (N, K), at least 1 and at most K, and without each block int64 (N,)."""
    sizes = np.bincount(block)
    sums, owns = np.zeros((len(sizes), logits.shape[1])), np.zeros(len(sizes))  # (B, K), (B,)
    for start in range(0, len(logits), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        log_p = log_softmax(logits[rows])
        p = np.exp(log_p)  # (n, K)
        member = np.eye(len(sizes))[block[rows]]  # (n, B) one-hot
        sums += member.T @ p
        owns += member.T @ np.sum(p * log_p, axis=1)
        release_pages(logits)

    def score(p_sum, own_sum, count):
        return np.exp(own_sum / count - _negative_entropy(p_sum / np.expand_dims(count, -1)))

    left_out = score(sums.sum(axis=0) - sums, owns.sum() - owns, len(logits) - sizes)
    return Estimate(value=float(score(sums.sum(axis=0), owns.sum(), np.float64(len(logits)))), left_out=left_out)


def inception_score_by_splits(probabilities: np.ndarray, split_size: int = 5000) -> float:
    """ADM's order-dependent score of probabilities (N, K): mean over splits of consecutive rows, a ragged last one
    included.

    Computed in the dtype given: ADM's own numbers are float32.
    """
    scores = []
    for start in range(0, len(probabilities), split_size):
        part = probabilities[start : start + split_size]
        kl = part * (np.log(part) - np.log(np.mean(part, axis=0, keepdims=True)))
        scores.append(np.exp(np.mean(np.sum(kl, axis=1))))
    return float(np.mean(scores))


def compute(evidence: Evidence) -> dict[str, Estimate]:
    """The metric "is"."""
    return {"is": estimate(evidence.features.logits, evidence.block)}
