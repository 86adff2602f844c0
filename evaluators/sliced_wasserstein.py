"""MIND, the Monge Inception Distance of Berthet et al. (arXiv:2605.06797): the sliced squared 2-Wasserstein distance.

    3 D / L * sum over L directions u of W2^2(u . X, u . Y),  u uniform on the unit sphere of the D feature dimensions

where W2^2 of two sets of n numbers is the mean squared difference of the sorted numbers (after toshas/torch-fidelity
a51aa64, torch_fidelity/metric_mind.py, which computes in float32; here it is float64). The factor 3 D makes two sets
that differ by a shift s score 3 |s|^2.

Here n is 5,000, or the size of the smaller set: of a larger set a fixed random choice is taken, for the value falls as
n grows and only equal n compare. There are 1,000 directions, torch-fidelity's number. Choice and directions come from numpy's RandomState(0),
whose stream is frozen, so everybody's are the same: another 1,000 directions move the value by some tenths of a percent
of itself, which is in no difference of two values that were taken with these, and in no interval.
"""

from math import gcd

import numpy as np

from evaluators.distances import centred
from evaluators.evidence import Evidence
from evaluators.intervals import Estimate, assign_blocks

SAMPLES = 5000
DIRECTIONS = 1000
DIRECTIONS_AT_ONCE = 50  # bounds the memory: 50 x 5,000 projections of either set, sorted
SEED = 0


def directions(dim: int, count: int = DIRECTIONS, seed: int = SEED) -> np.ndarray:
    """float64 (count, dim), of length 1."""
    u = np.random.RandomState(seed).standard_normal((count, dim))
    return u / np.linalg.norm(u, axis=1, keepdims=True)


def choose(count: int, n: int, seed: int = SEED) -> np.ndarray:
    """Which n of `count` rows are used: ascending int64 (n,), all of them where n = count."""
    return np.sort(np.random.RandomState(seed).permutation(count)[:n])


def _matching(n: int, m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The optimal transport between n and m sorted numbers: which goes to which int64 (P,), (P,), and how much (P,)."""
    common = n // gcd(n, m) * m
    ends = np.union1d(np.arange(1, n + 1) * (common // n), np.arange(1, m + 1) * (common // m))  # of the shares
    starts = np.concatenate([[0], ends[:-1]])
    return starts // (common // n), starts // (common // m), (ends - starts) / common


def estimate(
    features: np.ndarray,
    reference: np.ndarray,
    block: np.ndarray,
    u: np.ndarray,
) -> Estimate:
    """MIND of features (n, D) and reference (m, D) along u (L, D), and without each block int64 (n,).

    Sets of unequal size, as without a block, are compared by their optimal transport, which splits numbers.
    """
    x, y = centred(features, reference)
    sizes = np.bincount(block)
    whole = _matching(len(x), len(y))
    parts = [_matching(len(x) - size, len(y)) for size in sizes]
    value, left_out = 0.0, np.zeros(len(sizes))
    for start in range(0, len(u), DIRECTIONS_AT_ONCE):
        some = u[start : start + DIRECTIONS_AT_ONCE]
        q = np.sort(some @ y.T, axis=1)  # (l, m)
        p = some @ x.T  # (l, n)
        order = np.argsort(p, axis=1)
        p, owner = np.take_along_axis(p, order, axis=1), block[order]
        value += _cost(p, q, whole)
        for b, matching in enumerate(parts):
            left_out[b] += _cost(p[owner != b].reshape(len(p), -1), q, matching)
    scale = 3.0 * x.shape[1] / len(u)
    return Estimate(value=scale * value, left_out=scale * left_out)


def _cost(p: np.ndarray, q: np.ndarray, matching: tuple[np.ndarray, np.ndarray, np.ndarray]) -> float:
    """Sum over directions of W2^2 between the sorted rows of p (l, n) and q (l, m)."""
    source, target, mass = matching
    move = np.take(p, source, axis=1) - np.take(q, target, axis=1)  # (l, P)
    return float(np.einsum("lp,lp,p->", move, move, mass, optimize=False))


def compute(evidence: Evidence) -> dict[str, Estimate]:
    """The metric "mind"."""
    features, reference = evidence.features.pooled, evidence.reference.features.pooled
    n = min(len(features), len(reference), SAMPLES)
    block = evidence.block if n == len(features) else assign_blocks(n)
    features, reference = features[choose(len(features), n)], reference[choose(len(reference), n)]
    return {"mind": estimate(features, reference, block, directions(features.shape[1]))}
