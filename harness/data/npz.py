"""The data set "npz": images and labels of an .npz in the layout of ADM's evaluator."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from harness.data.images import ImageSet
from harness.errors import UserError
from harness.images.npz import read_npz


def load(path: Path) -> ImageSet:
    """The images and labels of the file, in memory; UserError where there are no labels: training is class-conditional."""
    images, labels = read_npz(Path(path))
    if labels is None:
        raise UserError(f"{path} has no labels (arr_1); a class-conditional model needs one for each image")
    return ImageSet(name="npz", images=np.array(images), labels=labels)  # a copy: `read_npz` may have mapped the file
