"""The share of samples that are copies of training images: a cheap test of memorisation.

Images are compared by the Euclidean distance of their pixels. A sample counts as a copy if its distance to the nearest
training image is at most the 1 % quantile of the distances between training images and their nearest neighbours. So
held-out real images score about 1 % by construction (`EXPECTED_SHARE`), the threshold follows data set and resolution,
and an exact copy always counts.
Pixel distances find exact or nearly exact copies only: a shifted or recoloured training image is not found.
"""

from dataclasses import dataclass

import numpy as np

from evaluators.intervals import Estimate, block_sums
from evaluators.metric_inputs import MetricInputs
from harness.io.progress import Bar

EXPECTED_SHARE = 0.01
MAX_SIDE = 32  # pixels; larger images are compared by the sums of boxes of pixels
THRESHOLD_IMAGES = 2000  # evenly spaced training images from which the 1 % quantile is estimated
ROWS_PER_BLOCK = 1024


@dataclass(frozen=True, kw_only=True)
class Copies:
    """Copies of training images among N samples.

    share: of samples with distance <= threshold. is_copy: bool (N,). nearest: int64 (N,), index of the nearest training
    image. distance: float64 (N,), to that image: root mean square over the compared pixels, in grey levels (0 to 255).
    threshold: in the same unit.
    """

    share: float
    is_copy: np.ndarray
    nearest: np.ndarray
    distance: np.ndarray
    threshold: float


def _box_sums(images: np.ndarray) -> tuple[np.ndarray, float]:
    """Images uint8 (N, H, W, C) as rows uint32 (N, P), and the divisor from a distance of rows to RMS grey levels.

    A row holds the sums of square boxes of pixels, at most MAX_SIDE boxes along a side; small images keep their pixels.
    Pixels right of and below the last whole box are left out.
    """
    n, height, width, channels = images.shape
    box = -(-max(height, width) // MAX_SIDE)  # side of a box in pixels
    h, w = height // box, width // box
    sums = np.empty((n, h * w * channels), dtype=np.uint32)  # integers, so that equal images are at exactly 0
    for i in range(0, n, ROWS_PER_BLOCK):
        part = images[i : i + ROWS_PER_BLOCK, : h * box, : w * box]
        boxes = part.reshape(-1, h, box, w, box, channels)
        sums[i : i + ROWS_PER_BLOCK] = boxes.sum(axis=(2, 4), dtype=np.uint32).reshape(len(part), -1)
    return sums, box * box * float(np.sqrt(sums.shape[1]))


def _nearest(x: np.ndarray, y: np.ndarray, itself: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Index (N,) of the nearest row of y to each row of x, and the squared distance (N,) to it.

    itself: int64 (N,); x[i] is row itself[i] of y, which is not counted as its neighbour. None: all rows count.
    """
    index, best = np.zeros(len(x), dtype=np.int64), np.full(len(x), np.inf)
    with Bar("distances", len(y), "images") as bar:
        for j in range(0, len(y), ROWS_PER_BLOCK):
            v = y[j : j + ROWS_PER_BLOCK].astype(np.float64)
            v_norm = np.einsum("np,np->n", v, v)
            for i in range(0, len(x), ROWS_PER_BLOCK):
                rows = slice(i, i + ROWS_PER_BLOCK)
                u = x[rows].astype(np.float64)
                d = np.einsum("np,np->n", u, u)[:, None] + v_norm - 2.0 * (u @ v.T)  # exact: integers below 2^53
                if itself is not None:
                    own_column = itself[rows] - j
                    in_block = np.flatnonzero((own_column >= 0) & (own_column < len(v)))
                    d[in_block, own_column[in_block]] = np.inf
                column = d.argmin(axis=1)
                closest = d[np.arange(len(d)), column]
                better = closest < best[rows]
                index[rows] = np.where(better, column + j, index[rows])
                best[rows] = np.where(better, closest, best[rows])
            bar.advance(len(v))
    return index, best


def find_copies(images: np.ndarray, training: np.ndarray) -> Copies:
    """Find the images uint8 (N, H, W, C) that are copies of training images uint8 (T, H, W, C), T >= 2."""
    x, unit = _box_sums(images)
    y, _ = _box_sums(training)
    # unique: truncating a rounding error may repeat an index
    chosen = np.unique(np.linspace(0, len(y) - 1, min(len(y), THRESHOLD_IMAGES)).astype(np.int64))
    training_distance = np.sqrt(_nearest(y[chosen], y, itself=chosen)[1])
    threshold = float(np.quantile(training_distance, EXPECTED_SHARE))
    nearest, squared_distance = _nearest(x, y)
    distance = np.sqrt(squared_distance)
    is_copy = distance <= threshold
    return Copies(
        share=float(is_copy.mean()),
        is_copy=is_copy,
        nearest=nearest,
        distance=distance / unit,
        threshold=threshold / unit,
    )


def compute(inputs: MetricInputs) -> dict[str, Estimate]:
    """The metric "copies"."""
    found = find_copies(inputs.images, inputs.training)
    hits = block_sums(found.is_copy.astype(np.float64), inputs.block)
    left_out = (hits.sum() - hits) / (len(found.is_copy) - np.bincount(inputs.block))
    return {"copies": Estimate(value=found.share, left_out=left_out, trials=len(found.is_copy))}
