"""CIFAR-10 (Krizhevsky 2009, "Learning multiple layers of features from tiny images"): 32x32 RGB photographs, 10 classes.

The files are those of the binary version at https://www.cs.toronto.edu/~kriz/cifar.html; the Python version is a pickle,
which would have to be executed. A file is a sequence of records: a byte of the label, then 1,024 bytes of red, of green
and of blue, row by row. The 50,000 training images alone are the data set, as in published FIDs; the test batch is not read.
"""

from __future__ import annotations

import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from harness.data.cache_dir import downloads
from harness.data.images import ImageSet
from harness.errors import UserError
from harness.images.source import readable
from harness.io.text import check_plain

ARCHIVE = "cifar-10-binary.tar.gz"
FOLDER = "cifar-10-batches-bin"  # in the archive
BATCHES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
IMAGES_PER_BATCH = 10_000
SIDE, CHANNELS = 32, 3
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")  # batches.meta.txt
GET = "`harness data fetch cifar-10` gets it (170 MB)"


def missing(folder: Path | None, resolution: int | None = None) -> str | None:
    """What is missing, with the way to get it, in one line; None: nothing. resolution: ignored."""
    try:
        _find(folder)
    except UserError as error:
        return str(error)
    return None


def class_names(source_paths: Mapping[str, str]) -> tuple[tuple[str, ...], ...]:
    """The name of each class, in the order of labels. source_paths: not used."""
    return tuple((name,) for name in CLASSES)


def load(folder: Path | None = None) -> ImageSet:
    """The 50,000 training images, uint8 (32, 32, 3), in the order of the files; labels 0..9.

    folder: holds the archive or its unpacked files, itself or in `FOLDER`; or the archive. UserError for files that are
    missing, cut off, or of another layout.
    """
    found = _find(folder)
    batches = _of_archive(found) if found.is_file() else [_read(found / name) for name in BATCHES]
    parts = [_parse(f"{found}: {name}", data) for name, data in zip(BATCHES, batches, strict=True)]
    images, labels = (np.concatenate(each) for each in zip(*parts, strict=True))
    return ImageSet(name="cifar-10", images=images, labels=labels)


def _find(folder: Path | None) -> Path:
    """The archive, or the folder of unpacked files; UserError where there is neither."""
    place = downloads("cifar-10") if folder is None else folder
    if place.is_file():
        return place
    for candidate in (place, place / FOLDER):
        present = [name for name in BATCHES if (candidate / name).is_file()]
        if len(present) == len(BATCHES):
            return candidate
        if present:
            lost = next(name for name in BATCHES if name not in present)
            raise UserError(f"CIFAR-10 in {candidate}: no file {lost} in it; {GET}")
    if (place / ARCHIVE).is_file():
        return place / ARCHIVE
    if (place / "cifar-10-batches-py").is_dir() or (place / "data_batch_1").is_file():
        raise UserError(f"CIFAR-10 in {place} is the Python version, a pickle that is not read; {GET} in binary")
    where = "is not on this machine" if folder is None else f"is not in {place} ({ARCHIVE}, or {FOLDER}/)"
    raise UserError(f"CIFAR-10 {where}: {GET}, or name the folder that holds it with --data")


def _read(path: Path) -> bytes:
    check_plain(path, "data file")
    with readable(path), path.open("rb") as file:
        return file.read(_batch_bytes() + 1)


def _of_archive(path: Path) -> list[bytes]:
    """The bytes of the training batches in the archive, which is read once, from its start."""
    found: dict[str, bytes] = {}
    with readable(path):
        try:
            with tarfile.open(path, mode="r|gz") as tar:
                for member in tar:
                    name = member.name.removeprefix("./").removeprefix(f"{FOLDER}/")
                    if member.isreg() and name in BATCHES and (content := tar.extractfile(member)) is not None:
                        found[name] = content.read(_batch_bytes() + 1)
        except tarfile.TarError as error:
            raise UserError(f"{path} cannot be read ({error}); {GET}") from error
    if lost := [name for name in BATCHES if name not in found]:
        raise UserError(f"{path}: {lost[0]} is missing in it; {GET}")
    return [found[name] for name in BATCHES]


def _batch_bytes() -> int:
    return IMAGES_PER_BATCH * (1 + SIDE * SIDE * CHANNELS)


def _parse(name: str, data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """(images uint8 (N, 32, 32, 3), labels int64 (N,)) of a batch; UserError for another size, or a label beyond 9."""
    if len(data) != _batch_bytes():
        size = f"{len(data):,}" if len(data) < _batch_bytes() else "more"
        raise UserError(f"{name} has {size} bytes and a batch of CIFAR-10 {_batch_bytes():,}; {GET}")
    records = np.frombuffer(data, np.uint8).reshape(IMAGES_PER_BATCH, -1)
    labels = records[:, 0].astype(np.int64)
    if labels.max() >= len(CLASSES):
        raise UserError(f"{name}: image {labels.argmax()} has label {labels.max()}, beyond 0 to 9; {GET}")
    images = records[:, 1:].reshape(-1, CHANNELS, SIDE, SIDE).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), labels
