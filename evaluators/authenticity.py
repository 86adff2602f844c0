"""Authenticity of Alaa et al. (arXiv:2102.08921): the share of samples that are no copies of training images.

A sample is authentic if it is further from its nearest training image than that image is from its own nearest other
training image. This is the estimator that Stein et al. (arXiv:2306.04675) report as AuthPct, in percent
(layer6ai-labs/dgm-eval d57a6d2, dgm_eval/metrics/authpct.py, Euclidean distances in float32; here a share, in float64).

Fresh real images do not score 1, for they lie as near to the training set as its own images do: Gaussian ones 0.42 in
2 dimensions, 0.56 in 8 and 0.85 in 512. The value to compare with is that of a held-out set, beside a training set of
the same size. The other end says less: samples that resemble nothing are authentic as well.
"""

from dataclasses import dataclass

import numpy as np

from evaluators.distances import centred, exact, radii, squared_distances
from evaluators.evidence import Evidence
from evaluators.intervals import Estimate, block_sums


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """The nearest training images of N samples, in feature space.

    index: int64 (N, k), nearest first. distance: float64 (N, k), Euclidean, to those. own: float64 (N,), the distance
    of the nearest one to its own nearest other training image.
    """

    index: np.ndarray
    distance: np.ndarray
    own: np.ndarray

    @property
    def authentic(self) -> np.ndarray:
        """bool (N,)."""
        return self.distance[:, 0] > self.own

    @property
    def most_suspicious(self) -> np.ndarray:
        """int64 (N,): the samples, those first that are nearest to a training image for how close its images lie."""
        with np.errstate(divide="ignore", invalid="ignore"):  # 0 / 0, a copy of an image that is there twice, is 0
            return np.argsort(np.nan_to_num(self.distance[:, 0] / self.own, nan=0.0, posinf=np.inf), kind="stable")


def find_neighbours(features: np.ndarray, training: np.ndarray, k: int = 1) -> Neighbours:
    """The k nearest rows of training (T, D), T > 1 and T >= k, for every row of features (N, D)."""
    x, y = centred(features, training)
    index = np.empty((len(x), k), dtype=np.int64)
    squared = np.empty((len(x), k))
    for rows, d in squared_distances(x, y):  # (rows, T)
        near = np.argpartition(d, k - 1, axis=1)[:, :k] if k > 1 else d.argmin(axis=1)[:, None]
        own_row = np.repeat(np.arange(rows.start, rows.stop), k)
        found = exact(x, y, own_row, near.ravel()).reshape(near.shape)
        order = np.argsort(found, axis=1, kind="stable")
        index[rows] = np.take_along_axis(near, order, axis=1)
        squared[rows] = np.take_along_axis(found, order, axis=1)
    own = np.sqrt(radii(y, 1))[index[:, 0]]
    return Neighbours(index=index, distance=np.sqrt(squared), own=own)


def estimate(features: np.ndarray, training: np.ndarray, block: np.ndarray) -> Estimate:
    """Share of authentic rows of features (N, D) beside training (T, D), and without each block int64 (N,)."""
    authentic = find_neighbours(features, training).authentic.astype(np.float64)
    hits = block_sums(authentic, block)
    left_out = (hits.sum() - hits) / (len(authentic) - np.bincount(block))
    return Estimate(value=float(authentic.mean()), left_out=left_out, trials=len(authentic))


def training_features(evidence: Evidence) -> np.ndarray:
    """Features (T, D) of the training images: the reference's own where they are the same images, else computed."""
    if evidence.training is evidence.reference.images:
        return evidence.reference.features.pooled
    from evaluators.reference import extract

    return extract(evidence.training, evidence.reference.extractor, "training features").pooled


def compute(evidence: Evidence) -> dict[str, Estimate]:
    """The metric "authenticity"."""
    return {"authenticity": estimate(evidence.features.pooled, training_features(evidence), evidence.block)}
