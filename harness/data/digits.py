"""The handwritten digits of scikit-learn: the test part of UCI's "Optical Recognition of Handwritten Digits"."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np

from harness.data.images import ImageSet
from harness.errors import UserError

MAX_COUNT = 16  # a value is the number of inked pixels in a cell of 4x4: 0..16
FILE = Path("datasets", "data", "digits.csv.gz")  # in scikit-learn; a line: 64 counts and the label


def load(folder: Path | None = None) -> ImageSet:
    """1,797 images, uint8 (8, 8, 1): the counts 0..16 scaled to 0..255 and rounded; labels 0..9."""
    if folder is not None:
        raise UserError(f"data set 'digits' comes with scikit-learn and takes no --data (given: {folder})")
    counts, labels = _read()
    images = np.rint(counts.reshape(-1, 8, 8) * (255 / MAX_COUNT)).astype(np.uint8)[..., np.newaxis]
    return ImageSet(name="digits", images=images, labels=labels.astype(np.int64))


def _read() -> tuple[np.ndarray, np.ndarray]:
    """Counts float64 (1797, 64) and labels (1797,)."""
    package = find_spec("sklearn")  # not imported: that takes longer than all the rest of a start
    folders = [] if package is None else list(package.submodule_search_locations or ())
    for file in (Path(folder) / FILE for folder in folders):
        if file.is_file():
            rows = np.loadtxt(file, delimiter=",")
            return rows[:, :-1], rows[:, -1]
    from sklearn.datasets import load_digits  # another layout of the package, or none

    digits = load_digits()
    return digits.data, digits.target
