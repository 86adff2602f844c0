"""The Inception Score of Salimans et al. (arXiv:1606.03498, sec. 4): exp of the mutual information between image and
class.

By default the score is of all samples at once and does not depend on their order. ADM's evaluator
(openai/guided-diffusion, evaluations/evaluator.py, `compute_inception_score`) averages over splits of 5,000 consecutive
rows, which makes the score depend on the order of the file: see `inception_score_by_splits`.
"""

import numpy as np

from evaluators.intervals import Estimate, assign_blocks
from evaluators.metric_inputs import MetricInputs
from harness.errors import UserError
from harness.io.arrays import release_pages

ROWS_AT_ONCE = 4096  # bounds the memory of a few float64 arrays (rows, K)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities float64 (N, K) of logits (N, K)."""
    z = np.asarray(logits, dtype=np.float64)
    z = z - z.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def _negative_entropy(p: np.ndarray) -> np.ndarray:
    """Sum of p log p over the last axis; a class with p = 0 adds 0."""
    return np.sum(p * np.log(np.where(p > 0.0, p, 1.0)), axis=-1)


def estimate(logits: np.ndarray, block: np.ndarray) -> Estimate:
    """Inception Score of logits (N, K), from 1 to K; block int64 (N,)."""
    value, left_out = _scores(logits, block, int(block.max()) + 1)
    plain = assign_blocks(len(block))
    if not np.array_equal(block, plain):  # the last bits of the value do not depend on labels and copies
        value, _ = _scores(logits, plain, int(plain.max()) + 1)
    return Estimate(value=value, left_out=left_out)


def estimate_by_splits(logits: np.ndarray, block: np.ndarray, split_size: int) -> Estimate:
    """As `estimate`, the mean score over splits of consecutive rows, the last one shorter and with the same weight.

    Without a block, every split is without its rows of that block. A short last split has most of the variance, which the
    jackknife of the score of all rows does not see.
    """
    blocks = int(block.max()) + 1
    starts = range(0, len(logits), split_size)
    splits = [_scores(logits[i : i + split_size], block[i : i + split_size], blocks) for i in starts]
    return Estimate(
        value=float(np.mean([value for value, _ in splits])),
        left_out=np.mean([left_out for _, left_out in splits], axis=0),
    )


def _scores(logits: np.ndarray, block: np.ndarray, blocks: int) -> tuple[float, np.ndarray]:
    """(score of logits (N, K), scores (B,) without each block). A block may be empty; no row has the score of one, 1."""
    sizes = np.bincount(block, minlength=blocks)
    # Sums over the rows of each block: of p (B, K), and of sum_k p log p (B,).
    p_sums, p_log_p = np.zeros((blocks, logits.shape[1])), np.zeros(blocks)
    for start in range(0, len(logits), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        log_p = log_softmax(logits[rows])
        p = np.exp(log_p)  # (n, K)
        member = np.eye(blocks)[block[rows]]  # (n, B) one-hot
        p_sums += member.T @ p
        p_log_p += member.T @ np.sum(p * log_p, axis=1)
        release_pages(logits)

    def score(p_sum: np.ndarray, p_log_p_sum: np.ndarray, count: np.ndarray) -> np.ndarray:
        """Scores of one or several sets of `count` rows, from their sums of p (..., K) and of sum_k p log p (...)."""
        count = np.maximum(count, 1)
        return np.exp(p_log_p_sum / count - _negative_entropy(np.maximum(p_sum, 0.0) / np.expand_dims(count, -1)))

    kept = len(logits) - sizes
    left_out = score(p_sums.sum(axis=0) - p_sums, p_log_p.sum() - p_log_p, kept)
    left_out = np.where(kept > 0, left_out, 1.0)
    return float(score(p_sums.sum(axis=0), np.asarray(p_log_p.sum()), np.asarray(len(logits), np.float64))), left_out


def inception_score_by_splits(probabilities: np.ndarray, split_size: int = 5000) -> float:
    """ADM's order-dependent score of probabilities (N, K): mean over splits of consecutive rows, the last one shorter.

    Computed in the dtype of the probabilities; ADM's are float32.
    """
    scores = []
    for start in range(0, len(probabilities), split_size):
        part = probabilities[start : start + split_size]
        kl = part * (np.log(part) - np.log(np.mean(part, axis=0, keepdims=True)))
        scores.append(np.exp(np.mean(np.sum(kl, axis=1))))
    return float(np.mean(scores))


def compute(inputs: MetricInputs) -> dict[str, Estimate]:
    """The metric "is". Raises UserError for features without logits."""
    if inputs.features.logits is None:
        raise UserError(f"metric is needs logits, but {inputs.reference.extractor.name} has no classifier")
    return {"is": estimate(inputs.features.logits, inputs.block)}
