"""Opens what `harness data prepare` takes: class folders, ILSVRC's tars, webdataset shards, or parquet files of the hub.

`open_index` recognises the kind of source and lists its images (`ImageIndex`). Nothing is decoded here, but labels are
checked against classes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from harness.data import imagenet, source_parquet, source_tars
from harness.data.listing import NO_LABELS, UNLABELLED, ImageIndex, check_no_empty_class, index_files, named_classes
from harness.errors import UserError
from harness.images.files import SUFFIXES, SYSTEM_FOLDERS, Entry, check_image_file, notes_on_left_out
from harness.images.source import natural_sorted, printable, readable

KINDS = (
    "class folders (DIR/CLASS/*.JPEG), a folder of images without labels, ILSVRC2012_img_train.tar (or the folder of its "
    "class tars), webdataset shards (*.tar with KEY.jpg and KEY.cls or KEY.json), tars of class folders, the parquet files "
    "of a Hugging Face data set"
)
TRAINING = "train"  # begins the names of files and folders of the training split


def open_index(source: Path, dataset: str) -> ImageIndex:
    """The index of the images at `source` for the data set `dataset`.

    UserError for a source that cannot be read, for a class without images and, if `dataset` is "imagenet", for classes
    other than its 1,000.
    """
    if not source.exists():
        raise UserError(f"--from {source}: no such file or folder; images are prepared from {KINDS}")
    with readable(source):
        index = _index_file(source, dataset) if source.is_file() else _index_folder(source, dataset)
    check_no_empty_class(source, index)
    return index


def _index_file(source: Path, dataset: str) -> ImageIndex:
    if source.suffix.lower() == ".parquet":
        return source_parquet.index_parquet(source, [source], dataset)
    if source.suffix.lower() == ".tar":
        return source_tars.index_tars(source, [source], dataset)
    raise UserError(f"--from {source}: this kind of file cannot be prepared; wanted are {KINDS}")


def _index_folder(source: Path, dataset: str) -> ImageIndex:
    """The index of the images in a folder: of its parquet files, of its tars, or of its class folders."""
    inside = _visible(source)
    tars = [each for each in inside if each.suffix.lower() == ".tar" and each.is_file()]
    tables = [each for each in inside if each.suffix.lower() == ".parquet" and each.is_file()]
    if tars and tables:  # webdataset packs metadata beside its shards; images in both would be two data sets
        if source_parquet.holds_images(tables[0]):
            raise UserError(
                f"--from {source}: images in .tar and in .parquet files side by side; name the ones to prepare"
            )
        tables = []
    if not tars and not tables and (source / "data").is_dir():  # repositories of the hub have their files in data/
        inside = [*inside, *_visible(source / "data")]
        tables = [each for each in inside if each.suffix.lower() == ".parquet" and each.is_file()]
    if official := [each for each in tars if each.name == source_tars.OFFICIAL]:
        tars = official
    # Of class tars no name has the word, which another tar beside them may have.
    chosen = natural_sorted(tars) if source_tars.named_by_class(tars) else _training_split(tables or tars)
    if not chosen:
        return _class_folders(source, dataset)
    read = set(chosen)
    left_out = [each for each in inside if each not in read and each.is_file()]
    index_chosen = source_parquet.index_parquet if tables else source_tars.index_tars
    return index_chosen(source, chosen, dataset).with_notes(_on_files_beside(left_out))


def _on_files_beside(paths: Sequence[Path]) -> list[str]:
    """A note on files that are not read because they do not belong to the images that are."""
    if not paths:
        return []
    return [
        f"{len(paths)} files beside the images were left out (first: {printable(min(each.name for each in paths))})"
    ]


def _visible(folder: Path) -> list[Path]:
    """The sorted paths in a folder, without those that begin with a dot."""
    try:
        return sorted(each for each in folder.iterdir() if not each.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder} cannot be listed: {error.strerror or error}; check its permissions") from error


def _training_split(paths: Iterable[Path]) -> list[Path]:
    """The shards in natural order: those with a word in their names that begins with "train", or all if no name has one."""
    shards = natural_sorted(each for each in paths if not each.name.startswith("."))
    return [each for each in shards if re.search(rf"(^|[^a-z]){TRAINING}", each.name.lower())] or shards


def _class_folders(source: Path, dataset: str) -> ImageIndex:
    """The index of the images in DIR/CLASS. DIR is `source`/train if that exists and holds no images itself, else `source`."""
    visible = _visible(source)
    folders = [each for each in visible if each.is_dir() and each.name not in SYSTEM_FOLDERS]
    train = next((each for each in folders if each.name == TRAINING), None)
    if train is not None and not any(_is_image(each) for each in _visible(train)):  # with images it would be a class
        beside = [each.name for each in visible if each != train]
        note = f"only {TRAINING}/ was read, without {printable(', '.join(beside))} beside it"
        return _class_folders(train, dataset).with_notes([note] if beside else [])
    images = [each for each in visible if _is_image(each)]
    if images and not any(_holds_image(each) for each in folders):
        return _flat(source, images, [each for each in visible if each not in set(images)], dataset)
    if not folders:
        raise UserError(f"--from {source}: no class folders in it; images are prepared from {KINDS}")
    if dataset == imagenet.NAME:
        imagenet.check_folders(str(source), [each.name for each in folders])
    else:  # a folder without images is no class, unless its name is a number, which says that it is one
        kept = [each for each in folders if re.fullmatch("[0-9]+", each.name) or _holds_image(each)]
        if not kept:
            raise UserError(f"--from {source}: no images ({', '.join(SUFFIXES)}) in its {len(folders)} folders")
        folders = kept
    classes, by_name = named_classes(source, [each.name for each in folders])
    labels: list[int] = []
    names: list[str] = []
    parents: list[Path] = []
    others: list[str] = []
    for folder in folders:
        with readable(folder), os.scandir(folder) as inside:
            # The order is arbitrary; `index_files` sorts. An entry of scandir knows whether it is a folder, which saves a
            # million system calls.
            for each in inside:
                if each.name.startswith("."):
                    continue
                if each.is_dir():
                    if each.name in SYSTEM_FOLDERS:
                        continue
                    raise UserError(
                        f"{printable(each.path)}: a folder inside a class folder; images belong in DIR/CLASS"
                    )
                if each.name.lower().endswith(SUFFIXES):
                    check_image_file(each)
                    labels.append(by_name[folder.name])
                    names.append(each.name)
                    parents.append(folder)
                else:
                    others.append(each.name)
    if not names:
        raise UserError(f"--from {source}: no images ({', '.join(SUFFIXES)}) in its {len(folders)} folders")
    notes = []
    if others:
        notes.append(
            f"{len(others)} files that are no images by their names were left out (first: {printable(min(others))})"
        )
    left_out = {each.name for each in visible if each.is_dir()} - set(by_name)
    notes += notes_on_left_out([], sorted(left_out))
    notes += _on_files_beside([each for each in visible if not each.is_dir()])
    if dataset == imagenet.NAME:
        notes += imagenet.check_labels(str(source), np.array(labels), names)

    def entry(i: int) -> Entry:
        path = parents[i] / names[i]
        return Entry(name=printable(str(path.relative_to(source))), path=path)

    return index_files("class folders", classes, labels, names, entry, notes)


def _flat(source: Path, images: list[Path], others: list[Path], dataset: str) -> ImageIndex:
    """The index of images without labels, in one folder."""
    if dataset == imagenet.NAME:
        raise UserError(f"--from {source}: images without class folders; {imagenet.NAME} is prepared with its classes")
    for each in images:
        check_image_file(each)
    notes = [NO_LABELS, *notes_on_left_out([], [each.name for each in others if each.is_dir()])]
    notes += _on_files_beside([each for each in others if not each.is_dir()])

    def entry(i: int) -> Entry:
        return Entry(name=printable(images[i].name), path=images[i])

    return index_files(
        "a folder without classes", [UNLABELLED], [0] * len(images), [each.name for each in images], entry, notes
    )


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.is_dir()


def _holds_image(folder: Path) -> bool:
    """Whether a file of an image, or another folder, lies in `folder`. A folder inside is refused later."""
    with readable(folder), os.scandir(folder) as inside:
        return any(
            (each.is_dir() and each.name not in SYSTEM_FOLDERS) or each.name.lower().endswith(SUFFIXES)
            for each in inside
            if not each.name.startswith(".")
        )
