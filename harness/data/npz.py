"""Images from an .npz file of ADM's layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from harness.data.images import ImageSet
from harness.errors import UserError
from harness.runs.samples import read_samples


def load(path: Path) -> ImageSet:
    """Images and labels of the file; labels are needed, for the models are class-conditional."""
    samples = read_samples(path)
    if samples.labels is None:
        raise UserError(f"{path} has no labels (arr_1); a class-conditional model needs one for each image")
    return ImageSet(name="npz", images=np.array(samples.images), labels=np.array(samples.labels))
