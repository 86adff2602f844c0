"""A PNG of the most suspicious samples beside their nearest training images in feature space.

Distances are those of the metric `authenticity`: the picture shows whether a low share means copies or a small data set.
"""

import os
from pathlib import Path

import numpy as np

from evaluators.authenticity import find_neighbours, training_features
from evaluators.metric_inputs import MetricInputs

ROWS = 12
NEIGHBOURS = 5


def write_picture(
    inputs: MetricInputs, path: str | os.PathLike[str], rows: int = ROWS, neighbours: int = NEIGHBOURS
) -> Path:
    """Write the picture to `path` and return it: one row per sample, the most suspicious first.

    The caption of a sample is its index, with "copy?" if it is not authentic. The caption of a training image is its
    index and its distance from the sample, divided by `Neighbours.training_distance`: below 1 is suspicious (see
    `_ratio_text`).
    """
    from reports.neighbours import write_neighbours

    count = min(neighbours, len(inputs.training))
    nearest = find_neighbours(inputs.features.pooled, training_features(inputs), count)
    shown = nearest.most_suspicious[:rows]
    return write_neighbours(
        inputs.images[shown],
        np.asarray(inputs.training)[nearest.index[shown]],
        path,
        sample_captions=[f"{i}{'' if nearest.authentic[i] else ' copy?'}" for i in shown],
        neighbour_captions=[
            [
                f"{j}: {_ratio_text(d, nearest.training_distance[i])}"
                for j, d in zip(nearest.index[i], nearest.distance[i], strict=True)
            ]
            for i in shown
        ],
    )


def _ratio_text(distance: float, training_distance: float) -> str:
    """distance / training_distance, for a caption: "equal" for distance 0, else "apart" for training_distance 0."""
    if distance == 0.0:
        return "equal"
    return f"{distance / training_distance:.2f}" if training_distance > 0.0 else "apart"
