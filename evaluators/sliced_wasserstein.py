"""MIND, the Monge Inception Distance of Berthet et al. (arXiv:2605.06797): the sliced squared 2-Wasserstein distance.

    3 D / L * sum over L directions u of W2^2(u . X, u . Y),  u uniform on the unit sphere of the D feature dimensions

where W2^2 of two sets of n numbers is the mean squared difference of the sorted numbers (after toshas/torch-fidelity
a51aa64, torch_fidelity/metric_mind.py, which computes in float32; here it is float64). With the factor 3 D, two sets
that differ by a shift s score 3 |s|^2.

The value falls as n grows, so only values at equal n compare: n is 5,000, or the size of the smaller set, and a larger
set is reduced by a fixed random choice. There are 1,000 directions, as in torch-fidelity. Choice and directions come
from numpy's RandomState(0), whose stream is frozen, so they are the same for everyone. Another 1,000 directions change
the value by a few tenths of a percent; the interval does not cover this, and a difference of two values is free of it.
"""

from math import gcd

import numpy as np

from evaluators.distances import centred
from evaluators.intervals import Estimate, assign_blocks
from evaluators.metric_inputs import MetricInputs

SAMPLES = 5000
DIRECTIONS = 1000
DIRECTIONS_AT_ONCE = 50  # bounds the memory: 50 x 5,000 projections of either set, sorted
SEED = 0


def directions(dim: int, count: int = DIRECTIONS, seed: int = SEED) -> np.ndarray:
    """Random directions: float64 (count, dim), rows of length 1."""
    u = np.random.RandomState(seed).standard_normal((count, dim))
    return u / np.linalg.norm(u, axis=1, keepdims=True)


def choose(count: int, n: int, seed: int = SEED) -> np.ndarray:
    """A fixed random choice of n of `count` rows: their indices, ascending int64 (n,)."""
    return np.sort(np.random.RandomState(seed).permutation(count)[:n])


def _transport(n: int, m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Optimal transport from n to m sorted numbers in P moves: source int64 (P,), target int64 (P,), mass float64 (P,).

    Move i carries mass[i] from the number at index source[i] to that at index target[i]; the masses add up to 1.
    """
    common = n // gcd(n, m) * m  # least common multiple; the total mass in integer units
    # cumulated mass after each move: a move ends where a number of either side has no mass left
    ends = np.union1d(np.arange(1, n + 1) * (common // n), np.arange(1, m + 1) * (common // m))
    starts = np.concatenate([[0], ends[:-1]])
    return starts // (common // n), starts // (common // m), (ends - starts) / common


def estimate(
    features: np.ndarray,
    reference: np.ndarray,
    block: np.ndarray,
    u: np.ndarray,  # directions of length 1
) -> Estimate:
    """MIND of features (n, D) and reference (m, D) along directions u (L, D); block int64 (n,).

    Sets of unequal size, such as all samples but one block and the reference, are compared by optimal transport, which
    may split the mass of a number.
    """
    x, y = centred(features, reference)
    sizes = np.bincount(block)
    full_plan = _transport(len(x), len(y))
    block_plans = [_transport(len(x) - size, len(y)) for size in sizes]
    value, left_out = 0.0, np.zeros(len(sizes))
    for start in range(0, len(u), DIRECTIONS_AT_ONCE):
        some = u[start : start + DIRECTIONS_AT_ONCE]
        q = np.sort(some @ y.T, axis=1)  # (l, m) sorted projections of the reference
        p = some @ x.T  # (l, n) projections of the samples
        order = np.argsort(p, axis=1)
        p, block_of = np.take_along_axis(p, order, axis=1), block[order]  # sorted, with the block of each number
        value += _cost(p, q, full_plan)
        for b, plan in enumerate(block_plans):
            left_out[b] += _cost(p[block_of != b].reshape(len(p), -1), q, plan)
    scale = 3.0 * x.shape[1] / len(u)
    return Estimate(value=scale * value, left_out=scale * left_out)


def _cost(p: np.ndarray, q: np.ndarray, plan: tuple[np.ndarray, np.ndarray, np.ndarray]) -> float:
    """Sum over directions of W2^2 between the sorted rows of p (l, n) and q (l, m). plan: of `_transport(n, m)`."""
    source, target, mass = plan
    move = np.take(p, source, axis=1) - np.take(q, target, axis=1)  # (l, P)
    return float(np.einsum("lp,lp,p->", move, move, mass))


def compute(inputs: MetricInputs) -> dict[str, Estimate]:
    """The metric "mind"."""
    features, reference = inputs.features.pooled, inputs.reference.features.pooled
    n = min(len(features), len(reference), SAMPLES)
    chosen, block = choose(len(features), n), inputs.block
    if n < len(
        features
    ):  # the blocks of the chosen samples; those of all have about as many of each class and all copies
        plain = inputs.labels is None and inputs.copies is None
        block = assign_blocks(n) if plain else np.unique(inputs.block[chosen], return_inverse=True)[1]
    features, reference = features[chosen], reference[choose(len(reference), n)]
    return {"mind": estimate(features, reference, block, directions(features.shape[1]))}
