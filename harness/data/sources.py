"""Where images in classes come from: class folders, ILSVRC's tars, webdataset shards, a Hugging Face data set's parquet.

Every kind gives a `Listing`: all images, in the order of (label, file name), and a way to read them in units of whatever
is read well at once. Nothing is decoded here; that a label fits its class is decided here.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from harness.data import imagenet
from harness.data.prepared import CHUNK_IMAGES, chunk_sizes
from harness.errors import Refusal
from harness.image_files import SUFFIXES, Entry, class_labels
from harness.image_sources import natural, readable, shown

KINDS = (
    "class folders (DIR/CLASS/*.JPEG), ILSVRC2012_img_train.tar (or the folder of its class tars), webdataset shards "
    "(*.tar with KEY.jpg and KEY.cls), the parquet files of a Hugging Face data set"
)
MOST_CLASSES = 100_000  # ImageNet-21k has 21,841; a larger number is a date or an identifier, not a label
TRAINING = "train"  # of files and folders that name their part, these


class ToRead(NamedTuple):
    """One image: its row, what messages call it, and its bytes when they are asked for (in any thread)."""

    row: int
    name: str
    read: Callable[[], bytes]


@dataclass(frozen=True, kw_only=True)
class Listing:
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
    read: Callable[[int], Iterator[ToRead]]
    notes: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """Hash of what is listed: classes, labels and names."""
        digest = hashlib.sha256("\0".join(self.classes).encode())
        digest.update(np.ascontiguousarray(self.labels, "<i8"))
        digest.update("\0".join(self.names).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def open_listing(source: Path, dataset: str) -> Listing:
    """List the images at `source` for the data set `dataset`; of "imagenet" the classes must be the 1,000, in order."""
    from harness.data import source_parquet, source_tars  # these know Listing, so they come second

    if not source.exists():
        raise Refusal(f"--from {source}: no such file or folder; images are prepared from {KINDS}")
    with readable(source):
        if source.is_file():
            if source.suffix.lower() == ".parquet":
                return source_parquet.listing(source, [source], dataset)
            if source.suffix.lower() == ".tar":
                return source_tars.listing(source, [source], dataset)
            raise Refusal(f"--from {source}: this kind of file cannot be prepared; wanted are {KINDS}")
        for place in (source, source / "data"):  # where the hub's data sets have them
            if parquet := _part(place.glob("*.parquet")):
                return source_parquet.listing(source, parquet, dataset)
        inside = _visible(source)
        tars = [each for each in inside if each.suffix.lower() == ".tar" and each.is_file()]
        if official := [each for each in tars if each.name == source_tars.OFFICIAL]:
            return source_tars.listing(source, official, dataset)
        if tars:
            return source_tars.listing(source, _part(tars), dataset)
        return _class_folders(source, dataset)


def ordered(
    kind: str,
    classes: Sequence[str],
    labels: Sequence[int] | np.ndarray,
    names: Sequence[str],
    entry: Callable[[int], Entry],  # of image i as it was found
    notes: Sequence[str],
) -> Listing:
    """A listing of files that can be read in any order, which is then that of the rows."""
    order = row_order(labels, names)
    labels, names = np.asarray(labels, np.int64)[order], [names[i] for i in order]

    def read(unit: int) -> Iterator[ToRead]:
        for row in range(unit * CHUNK_IMAGES, min((unit + 1) * CHUNK_IMAGES, len(order))):
            found = entry(int(order[row]))
            yield ToRead(row, found.name, found.read)

    return Listing(
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
    if last >= MOST_CLASSES:
        raise Refusal(f"--from {source}: label {last} is beyond {MOST_CLASSES:,} classes; number the classes from 0")
    return [str(each) for each in range(last + 1)]


def row_order(labels: Sequence[int] | np.ndarray, names: Sequence[str]) -> np.ndarray:
    """The order of (label, name without its ending, name), as places in what was found: int64 (N,)."""
    keys = [(int(label), name.rpartition(".")[0] or name, name) for label, name in zip(labels, names, strict=True)]
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)


def _visible(folder: Path) -> list[Path]:
    try:
        return sorted(each for each in folder.iterdir() if not each.name.startswith("."))
    except OSError as error:
        raise Refusal(f"{folder} cannot be listed: {error.strerror or error}; check its permissions") from error


def _part(paths: Iterable[Path]) -> list[Path]:
    """Shards in natural order; where names tell training from other parts, those for training."""
    found = natural(each for each in paths if not each.name.startswith("."))
    return [each for each in found if re.search(rf"(^|[^a-z]){TRAINING}", each.name.lower())] or found


def _class_folders(source: Path, dataset: str) -> Listing:
    folders = [each for each in _visible(source) if each.is_dir()]
    below = next((each for each in folders if each.name == TRAINING), None)
    if below is not None and not any(_is_image(each) for each in _visible(below)):
        return _class_folders(below, dataset)
    if not folders:
        raise Refusal(f"--from {source}: no class folders in it; images are prepared from {KINDS}")
    if dataset == imagenet.NAME:
        imagenet.check_folders(str(source), [each.name for each in folders])
    classes, by_name = named_classes(source, [each.name for each in folders])
    labels, names, inside_of, others = [], [], [], []
    for folder in folders:
        with readable(folder), os.scandir(folder) as inside:
            for each in inside:  # an entry knows whether it is a folder: a million calls less
                if each.name.startswith("."):
                    continue
                if each.is_dir():
                    raise Refusal(f"{shown(each.path)}: a folder inside a class folder; images belong in DIR/CLASS")
                if each.name.lower().endswith(SUFFIXES):
                    labels.append(by_name[folder.name])
                    names.append(each.name)
                    inside_of.append(folder)
                else:
                    others.append(each.name)
    if not names:
        raise Refusal(f"--from {source}: no images ({', '.join(SUFFIXES)}) in its {len(folders)} folders")
    notes = []
    if others:
        notes.append(
            f"{len(others)} files that are no images by their names were left out (first: {shown(min(others))})"
        )
    if dataset == imagenet.NAME:
        notes += imagenet.check_labels(str(source), np.array(labels), names)

    def entry(i: int) -> Entry:
        path = inside_of[i] / names[i]
        return Entry(name=shown(str(path.relative_to(source))), path=path)

    return ordered("class folders", classes, labels, names, entry, notes)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.is_dir()
