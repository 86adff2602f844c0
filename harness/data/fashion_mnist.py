"""Fashion-MNIST (Xiao, Rasul, Vollgraf 2017, arXiv:1708.07747): 70,000 articles of clothing, 28x28 grey, 10 classes.

The four files are those of https://github.com/zalandoresearch/fashion-mnist, gzipped (as published, or as in Debian's
package dataset-fashion-mnist, without the names in their gzip headers) or unpacked. The files of MNIST have the same
names, so the content is compared with hashes, taken from the package.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from harness.data.cache_dir import downloads
from harness.data.idx import read_idx
from harness.data.images import ImageSet
from harness.errors import UserError

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
PADDING = 2  # pixels of background on each side: 28 -> 32
BACKGROUND = 0
CLASSES = 10
NAMES = (  # of the classes, in the order of labels: the table "Labels" of the repository's README
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

# name, dimensions, sha256 of the values without the header; in the order of the data set
FILES = (
    ("train-images-idx3-ubyte", 3, "2e487a6c89124f78f2d7521542223cafe96f7123c3ca13d447772ac6ecbb3012"),
    ("train-labels-idx1-ubyte", 1, "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7"),
    ("t10k-images-idx3-ubyte", 3, "c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a"),
    ("t10k-labels-idx1-ubyte", 1, "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9"),
)


def missing(folder: Path | None, resolution: int | None = None) -> str | None:
    """What is missing, with the ways to get it, in one line; None: nothing. resolution: ignored."""
    try:
        _files(folder)
    except UserError as error:
        return str(error)
    return None


def class_names(source_paths: Mapping[str, str]) -> tuple[tuple[str, ...], ...]:
    """The name of each class, in the order of labels. source_paths: not used."""
    return tuple((name,) for name in NAMES)


def load(folder: Path | None = None) -> ImageSet:
    """70,000 images, uint8 (32, 32, 1), padded with the background; labels 0..9.

    The 60,000 images for training come first, then the 10,000 for testing: a generative model does not need the split,
    and a reference of all images is better.
    """
    paths = _files(folder)
    arrays = [_read(path, dimensions, sha256) for path, (_, dimensions, sha256) in zip(paths, FILES, strict=True)]
    images, labels = np.concatenate(arrays[::2]), np.concatenate(arrays[1::2])  # images and labels alternate in FILES
    images = np.pad(images, ((0, 0), (PADDING, PADDING), (PADDING, PADDING)), constant_values=BACKGROUND)
    return ImageSet(name="fashion-mnist", images=images[..., np.newaxis], labels=labels.astype(np.int64))


def _read(path: Path, dimensions: int, sha256: str) -> np.ndarray:
    """The uint8 array in an IDX file; UserError where the hash of its values is not `sha256`."""
    values = read_idx(path, dimensions)
    found_sha256 = hashlib.sha256(values.data).hexdigest()
    if found_sha256 != sha256:
        raise UserError(
            f"{path} is not Fashion-MNIST's: its values {values.shape} have sha256 {found_sha256[:12]}..., expected "
            f"{sha256[:12]}... (MNIST's files have the same names); `harness data fetch fashion-mnist` gets the right ones"
        )
    return values


def _files(folder: Path | None) -> list[Path]:
    """Paths of the four files in `folder`; None: in the folder of `harness data fetch`, or else of Debian's package.

    UserError where a file is missing. The first of the two folders that holds any of the files must hold all of them.
    """
    candidates = (downloads("fashion-mnist"), DEBIAN) if folder is None else (folder,)
    for candidate in candidates:
        paths = [_file(candidate, name) for name, *_ in FILES]
        found = [path for path in paths if path is not None]
        if len(found) == len(FILES):
            return found
        if found or folder is not None:
            missing_file = FILES[paths.index(None)][0]
            problem = "no such folder" if not candidate.is_dir() else f"no file {missing_file}.gz in it"
            raise UserError(
                f"Fashion-MNIST in {candidate}: {problem}; `harness data fetch fashion-mnist` gets all four files"
            )
    raise UserError(
        "Fashion-MNIST is not on this machine: `harness data fetch fashion-mnist` gets it (30 MB), or `apt-get install "
        "dataset-fashion-mnist`, or name a folder that holds its four .gz files with --data"
    )


def _file(folder: Path, name: str) -> Path | None:
    """The path of the file `name` in `folder`, gzipped or unpacked; None where there is neither."""
    return next((path for path in (folder / f"{name}.gz", folder / name) if path.is_file()), None)
