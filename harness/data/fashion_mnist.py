"""Fashion-MNIST (Xiao, Rasul, Vollgraf 2017, arXiv:1708.07747): 70,000 articles of clothing, 28x28 grey, 10 classes.

The four files are those of https://github.com/zalandoresearch/fashion-mnist, gzipped (as published, or as Debian's
package dataset-fashion-mnist has them, without the names in their gzip headers) or unpacked. MNIST's have the same names:
the content is compared with hashes, taken from the package, so that the one is never trained on as the other.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from harness.data.cache_dir import downloads
from harness.data.idx import read_idx
from harness.data.images import ImageSet
from harness.errors import UserError

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
PADDING = 2  # pixels a side, 28 -> 32, of the background's value
BACKGROUND = 0
CLASSES = 10

# name, dimensions, sha256 of the values without the header: in the order of the data set
FILES = (
    ("train-images-idx3-ubyte", 3, "2e487a6c89124f78f2d7521542223cafe96f7123c3ca13d447772ac6ecbb3012"),
    ("train-labels-idx1-ubyte", 1, "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7"),
    ("t10k-images-idx3-ubyte", 3, "c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a"),
    ("t10k-labels-idx1-ubyte", 1, "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9"),
)


def missing(folder: Path | None, resolution: int | None = None) -> str | None:
    """What is lacking, with the ways to get it; None: nothing."""
    try:
        _folder(folder)
    except UserError as error:
        return str(error)
    return None


def load(folder: Path | None = None) -> ImageSet:
    """70,000 images (32, 32, 1) uint8, padded with the background; labels 0..9. First the 60,000 for training, then the
    10,000 for testing: a generative model has no use for the division, and its reference is better for all of them."""
    place = _folder(folder)
    arrays = [_read(_file(place, name), dimensions, sha256) for name, dimensions, sha256 in FILES]
    images, labels = np.concatenate(arrays[::2]), np.concatenate(arrays[1::2])
    images = np.pad(images, ((0, 0), (PADDING, PADDING), (PADDING, PADDING)), constant_values=BACKGROUND)
    return ImageSet(name="fashion-mnist", images=images[..., np.newaxis], labels=labels.astype(np.int64))


def _read(path: Path, dimensions: int, sha256: str) -> np.ndarray:
    values = read_idx(path, dimensions)
    found = hashlib.sha256(values).hexdigest()
    if found != sha256:
        raise UserError(
            f"{path} is not Fashion-MNIST's: its values {values.shape} have sha256 {found[:12]}..., expected "
            f"{sha256[:12]}... (MNIST's files have the same names); `harness data fetch fashion-mnist` gets the right ones"
        )
    return values


def _folder(folder: Path | None) -> Path:
    """Where the files are: in the folder given, else where `harness data fetch` or Debian's package puts them."""
    places = (downloads("fashion-mnist"), DEBIAN) if folder is None else (folder,)
    for place in places:
        lacking = [name for name, *_ in FILES if _file(place, name) is None]
        if not lacking:
            return place
        if len(lacking) < len(FILES) or folder is not None:
            what = "no such folder" if not place.is_dir() else f"no file {lacking[0]}.gz in it"
            raise UserError(f"Fashion-MNIST in {place}: {what}; `harness data fetch fashion-mnist` gets all four files")
    raise UserError(
        "Fashion-MNIST is not on this machine: `harness data fetch fashion-mnist` gets it (30 MB), or `apt-get install "
        "dataset-fashion-mnist`, or name a folder that holds its four .gz files with --data"
    )


def _file(place: Path, name: str) -> Path | None:
    return next((path for path in (place / f"{name}.gz", place / name) if path.is_file()), None)
