"""Authenticity of Alaa et al. (arXiv:2102.08921): the share of samples that are not copies of training images.

A sample is authentic if its distance to the nearest training image is larger than the distance from that image to its
nearest other training image. Stein et al. (arXiv:2306.04675) report this estimator in percent as AuthPct
(layer6ai-labs/dgm-eval d57a6d2, dgm_eval/metrics/authpct.py, Euclidean distances in float32). Here it is a share,
computed in float64.

Held-out real images do not score 1, because they lie as near to the training set as its images lie to each other:
Gaussian data scores 0.42 in 2 dimensions, 0.56 in 8 and 0.85 in 512. Compare with the score of a held-out set against
a training set of the same size. A high score is weak evidence: samples that resemble nothing are authentic as well.
"""

from dataclasses import dataclass

import numpy as np

from evaluators.distances import centred, exact_squared_distances, squared_distances, squared_radii
from evaluators.intervals import Estimate, block_sums
from evaluators.metric_inputs import MetricInputs


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """The k nearest training images of each of N samples, in feature space.

    index: int64 (N, k), indices of the training images, nearest first. distance: float64 (N, k), Euclidean distances to
    them. training_distance: float64 (N,), distance from the nearest training image to its nearest other training image.
    """

    index: np.ndarray
    distance: np.ndarray
    training_distance: np.ndarray

    @property
    def authentic(self) -> np.ndarray:
        """bool (N,): whether each sample is authentic."""
        return self.distance[:, 0] > self.training_distance

    @property
    def most_suspicious(self) -> np.ndarray:
        """int64 (N,): all sample indices in ascending order of distance to the nearest image / training_distance.

        The sample most likely to be a copy is the first.
        """
        with np.errstate(divide="ignore", invalid="ignore"):  # 0 / 0 is a copy of a duplicated training image: ratio 0
            ratio = self.distance[:, 0] / self.training_distance
            return np.argsort(np.where(np.isnan(ratio), 0.0, ratio), kind="stable")


def find_neighbours(features: np.ndarray, training: np.ndarray, k: int = 1) -> Neighbours:
    """The k nearest rows of training (T, D), T > 1 and T >= k, for every row of features (N, D)."""
    x, y = centred(features, training)
    index = np.empty((len(x), k), dtype=np.int64)
    squared = np.empty((len(x), k))
    for rows, d in squared_distances(x, y):  # (rows, T)
        near = np.argpartition(d, k - 1, axis=1)[:, :k] if k > 1 else d.argmin(axis=1)[:, None]
        sample_row = np.repeat(np.arange(rows.start, rows.stop), k)
        # exact: an identical image is at distance 0, not at a rounding error
        exact = exact_squared_distances(x, y, sample_row, near.ravel()).reshape(near.shape)
        order = np.argsort(exact, axis=1, kind="stable")
        index[rows] = np.take_along_axis(near, order, axis=1)
        squared[rows] = np.take_along_axis(exact, order, axis=1)
    training_distance = np.sqrt(squared_radii(y, 1))[index[:, 0]]
    return Neighbours(index=index, distance=np.sqrt(squared), training_distance=training_distance)


def estimate(features: np.ndarray, training: np.ndarray, block: np.ndarray) -> Estimate:
    """Share of rows of features (N, D) that are authentic against training (T, D); block int64 (N,)."""
    authentic = find_neighbours(features, training).authentic.astype(np.float64)
    hits = block_sums(authentic, block)
    left_out = (hits.sum() - hits) / (len(authentic) - np.bincount(block))
    return Estimate(value=float(authentic.mean()), left_out=left_out, trials=len(authentic))


def training_features(inputs: MetricInputs) -> np.ndarray:
    """Features (T, D) of the training images: the reference's if both are the same array of images, else computed."""
    if inputs.training is inputs.reference.images:
        return inputs.reference.features.pooled
    from evaluators.reference import extract

    return extract(inputs.training, inputs.reference.extractor, "training features").pooled


def compute(inputs: MetricInputs) -> dict[str, Estimate]:
    """The metric "authenticity"."""
    return {"authenticity": estimate(inputs.features.pooled, training_features(inputs), inputs.block)}
