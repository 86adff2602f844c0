"""The most suspicious samples beside the training images nearest to them in feature space, as one PNG.

What is near is what `authenticity` sees: the picture shows whether a low share means copies or just a small data set.
"""

import os
from pathlib import Path

import numpy as np

from evaluators.authenticity import find_neighbours, training_features
from evaluators.evidence import Evidence

ROWS = 12
NEIGHBOURS = 5


def draw(evidence: Evidence, path: str | os.PathLike, rows: int = ROWS, neighbours: int = NEIGHBOURS) -> Path:
    """Writes the picture: below a sample its index, and whether it is authentic; below a training image its index and
    its distance over that from the first training image to its own nearest, so that below 1 is suspicious."""
    from reports.neighbours import write_neighbours

    count = min(neighbours, len(evidence.training) - 1)
    found = find_neighbours(evidence.features.pooled, training_features(evidence), count)
    shown = found.most_suspicious[:rows]
    return write_neighbours(
        evidence.images[shown],
        np.asarray(evidence.training)[found.index[shown]],
        path,
        sample_captions=[f"{i}{'' if found.authentic[i] else ' copy?'}" for i in shown],
        neighbour_captions=[
            [f"{j}: {_ratio(d, found.own[i])}" for j, d in zip(found.index[i], found.distance[i], strict=True)]
            for i in shown
        ],
    )


def _ratio(distance: float, own: float) -> str:
    if distance == 0.0:
        return "equal"
    return f"{distance / own:.2f}" if own > 0.0 else "apart"
