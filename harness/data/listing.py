"""Where images in classes come from: class folders, ILSVRC's tars, webdataset shards, a Hugging Face data set's parquet.

Every kind gives a `Listing`: all images, in the order of (label, file name), and a way to read them in units of whatever
is read well at once. Nothing is decoded here; that a label fits its class is decided here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from harness.data.prepared import CHUNK_IMAGES, chunk_sizes
from harness.errors import UserError
from harness.images.files import Entry
from harness.images.open import class_labels

MAX_CLASSES = 100_000  # ImageNet-21k has 21,841; a larger number is a date or an identifier, not a label


class IndexEntry(NamedTuple):
    """One image: its row, what messages call it, and its bytes when they are asked for (in any thread)."""

    row: int
    name: str
    read: Callable[[], bytes]


@dataclass(frozen=True, kw_only=True)
class ImageIndex:
    """All images of a source. kind: in words. classes: names, in the order of labels. labels: int64 (N,), ascending.
    names: of the files, in the same order. sizes: images of each unit, a piece of the source that is read at once.
    in_order: unit i holds the rows of chunk i, in order; else any rows. read: the images of a unit. notes: what a user
    should know.
    """

    kind: str
    classes: tuple[str, ...]
    labels: np.ndarray
    names: Sequence[str]
    sizes: Sequence[int]
    in_order: bool
    read: Callable[[int], Iterator[IndexEntry]]
    notes: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """Hash of what is listed: classes, labels and names."""
        digest = hashlib.sha256("\0".join(self.classes).encode())
        digest.update(np.ascontiguousarray(self.labels, "<i8"))
        digest.update("\0".join(self.names).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def ordered(
    kind: str,
    classes: Sequence[str],
    labels: Sequence[int] | np.ndarray,
    names: Sequence[str],
    entry: Callable[[int], Entry],  # of image i as it was found
    notes: Sequence[str],
) -> ImageIndex:
    """A listing of files that can be read in any order, which is then that of the rows."""
    order = row_order(labels, names)
    labels, names = np.asarray(labels, np.int64)[order], [names[i] for i in order]

    def read(unit: int) -> Iterator[IndexEntry]:
        for row in range(unit * CHUNK_IMAGES, min((unit + 1) * CHUNK_IMAGES, len(order))):
            found = entry(int(order[row]))
            yield IndexEntry(row, found.name, found.read)

    return ImageIndex(
        kind=kind, classes=tuple(classes), labels=labels, names=names, sizes=chunk_sizes(len(order)), in_order=True,
        read=read, notes=tuple(notes),
    )  # fmt: skip


def named_classes(source: Path, names: Iterable[str]) -> tuple[list[str], dict[str, int]]:
    """The classes in the order of labels, and the label of each of `names`, by the rule of evaluation: where all names
    are numbers they are the labels, as in .cls files."""
    labels, numbered = class_labels(names)
    return (numbers(source, max(labels.values())) if numbered else list(labels)), labels


def numbers(source: Path, last: int) -> list[str]:
    """Names of the classes 0 to `last`, which have none but their numbers."""
    if last >= MAX_CLASSES:
        raise UserError(f"--from {source}: label {last} is beyond {MAX_CLASSES:,} classes; number the classes from 0")
    return [str(each) for each in range(last + 1)]


def row_order(labels: Sequence[int] | np.ndarray, names: Sequence[str]) -> np.ndarray:
    """The order of (label, name without its ending, name), as places in what was found: int64 (N,)."""
    keys = [(int(label), name.rpartition(".")[0] or name, name) for label, name in zip(labels, names, strict=True)]
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)
