"""The handwritten digits of scikit-learn: the test part of UCI's "Optical Recognition of Handwritten Digits"."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from harness.data.images import ImageSet
from harness.errors import UserError

MAX_COUNT = 16  # a value is the number of inked pixels in a cell of 4x4: 0..16


def load(folder: Path | None = None) -> ImageSet:
    """1,797 images, uint8 (8, 8, 1): the counts 0..16 scaled to 0..255 and rounded; labels 0..9."""
    if folder is not None:
        raise UserError(f"data set 'digits' comes with scikit-learn and takes no --data (given: {folder})")
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / MAX_COUNT)).astype(np.uint8)[..., np.newaxis]
    return ImageSet(name="digits", images=images, labels=digits.target.astype(np.int64))
