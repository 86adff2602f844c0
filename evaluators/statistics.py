"""Mean and covariance of features: float64, streaming, mergeable.

Merging follows Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances"
(1979): every block is centred on its own mean, so no large squares cancel, and blocks may be merged in any order or by
any number of workers with the same result up to float64 rounding.
"""

from dataclasses import dataclass

import numpy as np

from harness.errors import Failure


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What a Frechet distance needs to know of a set.

    n: number of rows; None when the statistics came from a file that does not say.
    mean: float64 (D,). covariance: float64 (D, D), symmetric, normalised by n - 1 where made here.
    """

    n: int | None
    mean: np.ndarray
    covariance: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Moments:
    """A set under accumulation: n rows, their mean float64 (D,), and scatter float64 (D, D) = sum of (x - mean)(x - mean)^T."""

    n: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def from_features(cls, features: np.ndarray) -> "Moments":
        """Moments of (N, D) features, N >= 1, any float dtype; Failure when a value is not finite."""
        x = np.asarray(features, dtype=np.float64)
        assert x.ndim == 2 and len(x) > 0, x.shape
        if not np.isfinite(x).all():
            raise Failure("features are not finite: no statistics were computed")
        mean = x.mean(axis=0)
        x = x - mean
        return cls(n=len(x), mean=mean, scatter=x.T @ x)

    def merge(self, other: "Moments") -> "Moments":
        """Moments of the union of two disjoint sets."""
        n = self.n + other.n
        delta = other.mean - self.mean
        scatter = self.scatter + other.scatter + np.outer(delta, delta) * (self.n * other.n / n)
        return Moments(n=n, mean=self.mean + delta * (other.n / n), scatter=scatter)

    def finish(self, ddof: int = 1) -> Statistics:
        """Mean and covariance, normalised by n - ddof as np.cov does; n > ddof."""
        assert self.n > ddof, (self.n, ddof)
        covariance = self.scatter / (self.n - ddof)
        return Statistics(n=self.n, mean=self.mean, covariance=(covariance + covariance.T) / 2)


def statistics(features: np.ndarray, rows_per_block: int = 8192) -> Statistics:
    """Statistics of (N, D) features, N >= 2, read a block of rows at a time: a file map is never loaded whole."""
    total = Moments.from_features(features[:rows_per_block])
    for start in range(rows_per_block, len(features), rows_per_block):
        total = total.merge(Moments.from_features(features[start : start + rows_per_block]))
    return total.finish()
