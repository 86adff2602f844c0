"""`ImageIndex`: the list of all images of a source, in the order of (label, file name), before any is decoded."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from harness.data.prepared import CHUNK_IMAGES, chunk_sizes
from harness.errors import UserError
from harness.images.files import Entry
from harness.images.source import class_labels, printable

MAX_CLASSES = 100_000  # ImageNet-21k has 21,841; a larger number is a date or an identifier, not a label

UNLABELLED = "unlabelled"  # name of the one class of images without labels
NO_LABELS = "there are no labels: all images are one class"


class IndexEntry(NamedTuple):
    """One image: its row in the prepared data set, its name in messages, and a function that reads its file's bytes.

    `read` may be called in any thread.
    """

    row: int
    name: str
    read: Callable[[], bytes]


@dataclass(frozen=True, kw_only=True)
class ImageIndex:
    """All images of a source, to be read unit by unit: a unit is a part of the source that is read at once.

    kind: of source, in words. classes: names, in the order of labels. labels: int64 (N,), ascending, one per row of the
    prepared data set. names: of the image files, in the same order. sizes: number of images of each unit. in_order:
    whether unit i holds exactly the rows of chunk i, in order; otherwise a unit holds any rows, in any order. read:
    read(unit) yields the images of that unit. notes: lines for the user.
    """

    kind: str
    classes: tuple[str, ...]
    labels: np.ndarray
    names: Sequence[str]
    sizes: Sequence[int]
    in_order: bool
    read: Callable[[int], Iterator[IndexEntry]]
    notes: tuple[str, ...] = ()

    def with_notes(self, notes: Iterable[str]) -> ImageIndex:
        """A copy with further notes, which come first."""
        return dataclasses.replace(self, notes=(*notes, *self.notes))

    @property
    def sha256(self) -> str:
        """Hash of classes, labels and names; the pixels are not read for it."""
        digest = hashlib.sha256("\0".join(self.classes).encode("utf-8", "surrogateescape"))
        digest.update(np.ascontiguousarray(self.labels, "<i8").data)
        digest.update("\0".join(self.names).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def index_files(
    kind: str,
    classes: Sequence[str],
    labels: Sequence[int] | np.ndarray,
    names: Sequence[str],
    entry: Callable[[int], Entry],
    notes: Sequence[str],
) -> ImageIndex:
    """The index of files that can be opened in any order, so that they are read in the order of rows.

    labels, names: of the files, in any order. entry: entry(i) is the i-th file in that order.
    """
    order = row_order(labels, names)

    def read(unit: int) -> Iterator[IndexEntry]:  # unit `unit` is chunk `unit`
        for row in range(unit * CHUNK_IMAGES, min((unit + 1) * CHUNK_IMAGES, len(order))):
            file = entry(int(order[row]))
            yield IndexEntry(row, file.name, file.read)

    return ImageIndex(
        kind=kind,
        classes=tuple(classes),
        labels=np.asarray(labels, np.int64)[order],
        names=[names[i] for i in order],
        sizes=chunk_sizes(len(order)),
        in_order=True,
        read=read,
        notes=tuple(notes),
    )


def named_classes(source: Path, names: Iterable[str]) -> tuple[list[str], dict[str, int]]:
    """(names of all classes in the order of labels, label by name) of the class folders `names`, as in `class_labels`.

    If the folders are numbers, the classes are 0 to the largest one, also those without a folder. source: for messages.
    """
    labels, numbered = class_labels(names)
    return (numbered_classes(source, max(labels.values())) if numbered else list(labels)), labels


def check_no_empty_class(source: Path, index: ImageIndex) -> None:
    """UserError, which names it, where a class has no image: samples would be drawn of it, and nothing was trained."""
    empty = np.flatnonzero(np.bincount(index.labels, minlength=len(index.classes)) == 0)
    if not len(empty):
        return
    first = f"class {printable(index.classes[empty[0]])} (label {empty[0]})"
    more = f", and {len(empty) - 1:,} more have none" if len(empty) > 1 else ""
    numbered = index.classes == tuple(map(str, range(len(index.classes))))
    remedy = "number the classes from 0, without a gap" if numbered else "add images of it, or remove it"
    raise UserError(f"--from {source}: {first} has no image{more}; {remedy}")


def numbered_classes(source: Path, last: int) -> list[str]:
    """The classes 0 to `last`, named by their numbers; UserError where `last` cannot be a label."""
    if last >= MAX_CLASSES:
        raise UserError(f"--from {source}: label {last} is beyond {MAX_CLASSES:,} classes; number the classes from 0")
    return [str(label) for label in range(last + 1)]


def row_order(labels: Sequence[int] | np.ndarray, names: Sequence[str]) -> np.ndarray:
    """The order of rows: positions in `labels` sorted by (label, name without its suffix, name), int64 (N,).

    The suffix comes last, so that the order does not depend on whether a source writes .JPEG or .jpg.
    """
    keys = [(int(label), name.rpartition(".")[0] or name, name) for label, name in zip(labels, names, strict=True)]
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)
