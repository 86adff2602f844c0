"""Images in classes from tars: ILSVRC's tar of one tar a class (or the folder of those), and webdataset shards."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from harness.data import imagenet
from harness.data.listing import NO_LABELS, UNLABELLED, ImageIndex, index_files, named_classes, numbered_classes
from harness.errors import UserError
from harness.images.files import SUFFIXES, Entry, is_system_member
from harness.images.source import printable, readable
from harness.images.tars import class_of_member, json_label, tar_members

OFFICIAL = "ILSVRC2012_img_train.tar"


def index_tars(source: Path, tars: list[Path], dataset: str) -> ImageIndex:
    """The index of the images in `tars`: one tar of class tars, class tars named by WordNet ids, or webdataset's shards.

    UserError where a tar with images lies beside class tars.

    source: the folder of the tars, or the only tar itself.
    """
    if len(tars) == 1:
        with readable(tars[0]):
            members = [each for each in tar_members(tars[0]) if not is_system_member(each[0])]
        inner = [each for each in members if each[0].lower().endswith(".tar")]
        if inner:
            beside = [name for name, *_ in members if not name.lower().endswith(".tar")]
            if any(name.lower().endswith(SUFFIXES) for name in beside):
                raise UserError(f"{tars[0]}: tars and images side by side; {OFFICIAL} holds only tars")
            class_tars = [(Path(name).stem, tars[0], begin, size) for name, begin, size in inner]
            return _class_tars(source, class_tars, dataset, beside)
    of_classes = named_by_class(tars)
    others = [each for each in tars if each not in of_classes]
    # Shards may have such names, too: labels within decide.
    if not of_classes or (others and any(_holds(each, (".cls", ".json")) for each in of_classes)):
        return _shards(source, tars, dataset)
    for other in others:
        if _holds(other, SUFFIXES):
            raise UserError(
                f"--from {source}: {printable(other.name)} holds images and lies beside {len(of_classes)} class tars (first: "
                f"{of_classes[0].name}), which say nothing of its classes; move it elsewhere"
            )
    index = _class_tars(source, [(each.stem, each, 0, None) for each in of_classes], dataset)
    left_out = ", ".join(printable(each.name) for each in others)
    return index.with_notes([f"tars without images were left out: {left_out}"] if others else [])


def named_by_class(tars: Iterable[Path]) -> list[Path]:
    """The tars that are named by a WordNet id, as ILSVRC's tars of one class are."""
    return [each for each in tars if re.fullmatch(imagenet.WORDNET_ID, each.stem)]


def _holds(path: Path, endings: tuple[str, ...]) -> bool:
    """Whether a tar has a member whose name ends in one of `endings`."""
    with readable(path):
        return any(name.lower().endswith(endings) and not is_system_member(name) for name, *_ in tar_members(path))


class _TarImages:
    """Where the images in tars are, in the order in which they were added; uses little memory for ImageNet's 1.3 million."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._tars: list[Path] = []
        # of each image: index of its tar in _tars, byte of the tar where it begins, size in bytes
        self._tar_index, self._begin, self._size = array("q"), array("q"), array("q")

    def add(self, path: Path, name: str, begin: int, size: int) -> None:
        """Add the image of `size` bytes from byte `begin` of the tar in `path`."""
        if not self._tars or self._tars[-1] != path:
            self._tars.append(path)
        self.names.append(name)
        self._tar_index.append(len(self._tars) - 1)
        self._begin.append(begin)
        self._size.append(size)

    def entry(self, i: int) -> Entry:
        """The image that was added as number `i`, from 0."""
        path = self._tars[self._tar_index[i]]
        name = printable(f"{path.name}:{self.names[i]}")
        return Entry(name=name, path=path, offset=self._begin[i], size=self._size[i])


def _class_tars(
    source: Path, tars: Sequence[tuple[str, Path, int, int | None]], dataset: str, beside: Sequence[str] = ()
) -> ImageIndex:
    """The index of `tars`, one for each class: (class, file, byte where the tar begins, its bytes or None: up to the end).

    beside: names of what lies beside the tars and is left out.
    """
    tars = sorted(tars)
    classes = [name for name, *_ in tars]
    if len(set(classes)) != len(classes):
        raise UserError(f"{source}: two tars of one class; remove one")
    if dataset == imagenet.NAME:
        imagenet.check_folders(str(source), classes)
    classes, by_name = named_classes(source, classes)
    found = _TarImages()
    labels: list[int] = []
    others: list[str] = [*beside]
    for name, path, begin, size in tars:
        with readable(f"{path}: {name}.tar"):
            for member, offset, length in tar_members(path, begin, size):
                base = member.rpartition("/")[2]
                if is_system_member(member):
                    continue
                if base.lower().endswith(SUFFIXES):
                    found.add(path, base, offset, length)
                    labels.append(by_name[name])
                else:
                    others.append(base)
    return _index(source, "ILSVRC tars", classes, labels, found, others, dataset)


def _shards(source: Path, tars: list[Path], dataset: str) -> ImageIndex:
    """The index of shards: webdataset's, KEY.jpg beside KEY.cls or KEY.json, or images in class folders, or without labels."""
    found, earlier = _TarImages(), 0  # earlier: number of images in the shards before the current one
    labels: list[int] = []
    others: list[str] = []
    members: list[str] = []  # names of the images
    kinds: set[str] = set()  # how the shards are labelled
    for path in tars:
        described: dict[tuple[str, str], Entry] = {}  # the .json members
        keys: list[tuple[str, str]] = []  # of the shard's images: folder, and name up to the first dot
        classes: dict[tuple[str, str], int] = {}
        seen: set[str] = set()
        with readable(path):
            for name, offset, size in tar_members(path):
                if name in seen:
                    raise UserError(f"{path}: it holds {printable(name)} twice; pack it again")
                seen.add(name)
                if is_system_member(name):
                    continue
                folder, _, base = name.rpartition("/")
                key, _, kind = base.partition(".")  # webdataset: members that agree up to the first dot are one example
                if base.lower().endswith(SUFFIXES):
                    keys.append((folder, key))
                    found.add(path, base, offset, size)
                    members.append(name)
                elif kind == "json":
                    described[folder, key] = Entry(name=name, path=path, offset=offset, size=size)
                elif kind == "cls":
                    classes[folder, key] = _read_label(path, name, offset, size)
                # metadata, which webdataset packs beside an image, needs no note
                elif kind not in ("txt", "__key__"):
                    others.append(base)
        if not keys and not classes:
            continue
        if not classes:
            from_json = {key: json_label(described[key]) for key in keys if key in described}
            if keys and len(from_json) == len(set(keys)) and None not in from_json.values():
                classes = {key: label for key, label in from_json.items() if label is not None}
        if keys and not classes:
            kinds.add("without labels")
            earlier += len(keys)
            labels += [0] * len(keys)
            continue
        kinds.add("labels")
        if len(set(keys)) != len(keys):
            raise UserError(f"{path}: two images share a name up to the first dot, so one .cls would label both")
        unlabelled = next((found.names[earlier + i] for i, key in enumerate(keys) if key not in classes), None)
        if unlabelled is not None or len(classes) != len(keys):  # more classes than keys: a .cls without an image
            alone = "a .cls" if unlabelled is None else printable(unlabelled)
            raise UserError(f"{path}: {alone} has no partner; every image needs one KEY.cls")
        labels += [classes[key] for key in keys]
        earlier += len(keys)
    if len(kinds) > 1:
        raise UserError(f"--from {source}: some of its tars have labels (.cls, .json) and others have none; add them")
    if kinds == {"without labels"}:
        return _folders_or_unlabelled(source, members, found, others, dataset)
    return _index(source, "webdataset shards", None, labels, found, others, dataset)


def _folders_or_unlabelled(
    source: Path, members: list[str], found: _TarImages, others: list[str], dataset: str
) -> ImageIndex:
    """The index of tars of class folders, as cat/1.jpg; or, without such folders, of images without labels."""
    if (folders := class_of_member(members)) is not None:
        if dataset == imagenet.NAME:
            imagenet.check_folders(str(source), sorted(set(folders)))
        classes, by_name = named_classes(source, sorted(set(folders)))
        labels = [by_name[each] for each in folders]
        return _index(source, "tars of class folders", classes, labels, found, others, dataset)
    index = _index(source, "tars without labels", [UNLABELLED], [0] * len(members), found, others, dataset)
    return index.with_notes([NO_LABELS])


def _read_label(path: Path, name: str, offset: int, size: int) -> int:
    """The number in the .cls member `name`, `size` bytes from byte `offset` of the tar."""
    text = Entry(name=name, path=path, offset=offset, size=size).read(limit=20).strip()
    if re.fullmatch(rb"[0-9]{1,9}", text) is None:
        raise UserError(
            f"{path}:{printable(name)}: a label must be one whole number, not {printable(text.decode('latin-1'))!r}"
        )
    return int(text)


def _index(
    source: Path,
    kind: str,
    classes: list[str] | None,  # None: named by their numbers
    labels: list[int],
    found: _TarImages,
    others: list[str],  # names of the members that are not images
    dataset: str,
) -> ImageIndex:
    """The index of the images `found`, with a note on other members; UserError where there are no images.

    labels: of the images, in the order of `found`. For ImageNet the labels are checked.
    """
    if not labels:
        raise UserError(f"--from {source}: no images ({', '.join(SUFFIXES)}) in it")
    notes = (
        [f"{len(others)} members that are not images were left out (first: {printable(others[0])})"] if others else []
    )
    if dataset == imagenet.NAME:
        notes += imagenet.check_labels(str(source), np.array(labels), found.names)
        classes = list(imagenet.classes())
    if classes is None:
        classes = numbered_classes(source, max(labels))
    return index_files(kind, classes, labels, found.names, found.entry, notes)
