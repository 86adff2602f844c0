"""The data set "npz": images and labels of an .npz in the layout of ADM's evaluator."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from harness.data.images import ImageSet
from harness.images.npz import read_npz

WITHOUT_LABELS = (
    "has no labels (arr_1); a class-conditional model needs one for each image, and the protocol has num_classes"
)


def load(path: Path) -> ImageSet:
    """The images and labels of the file, in memory; without labels all are 0, and only training without classes fits."""
    images, labels = read_npz(Path(path))
    labelled = labels is not None
    labels = np.zeros(len(images), np.int64) if labels is None else labels
    # a copy: `read_npz` may have mapped the file
    return ImageSet(name="npz", images=np.array(images), labels=labels, labelled=labelled)
