"""The classes of ImageNet (ILSVRC2012), and checks that labels are in their order.

A label is the position of the class's WordNet id in the sorted list of the 1,000 ids, as in every published checkpoint.
The devkit numbers the same classes differently (ILSVRC2012_ID in meta.mat), and one class too many or too few shifts all
labels after it; a model trained on such labels is wrong without any error.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from harness.errors import UserError
from harness.images.source import printable

NAME = "imagenet"
TRAINING_IMAGES = 1_281_167
WORDNET_ID = r"n[0-9]{8}"


@functools.cache
def _table() -> tuple[tuple[str, int, str], ...]:
    """(WordNet id, ILSVRC2012_ID, name in English) of the 1,000 classes, in the order of labels."""
    lines = (Path(__file__).parent / "imagenet_classes.txt").read_text(encoding="ascii").splitlines()
    cells = (line.split(maxsplit=2) for line in lines if not line.startswith("#"))
    rows = tuple((wordnet_id, int(number), name) for wordnet_id, number, name in cells)
    assert len(rows) == 1000 and [row[0] for row in rows] == sorted(row[0] for row in rows)
    return rows


def classes() -> tuple[str, ...]:
    """The 1,000 WordNet ids in the order of labels."""
    return tuple(wordnet_id for wordnet_id, *_ in _table())


def class_names(source_paths: Mapping[str, str]) -> tuple[tuple[str, ...], ...]:
    """The names of each class in the order of labels: in English, and its WordNet id. source_paths: not used."""
    return tuple((name, wordnet_id) for wordnet_id, _, name in _table())


def devkit_ids() -> dict[str, int]:
    """ILSVRC2012_ID (1 to 1000) by WordNet id."""
    return {wordnet_id: number for wordnet_id, number, _ in _table()}


def plain_name(name: str) -> str:
    """The file name as in ImageNet's tar. The copy on the Hugging Face hub appends the class, which is removed here:

    n01440764_10026_n01440764.JPEG becomes n01440764_10026.JPEG.
    """
    return re.sub(rf"^((?:{WORDNET_ID}|ILSVRC2012_val)_[0-9]+)_{WORDNET_ID}(?=\.|$)", r"\1", name)


def named_class(name: str) -> str | None:
    """The WordNet id at the beginning or end of a file name without its suffix; None: there is none."""
    stem = name.partition(".")[0]
    found = re.match(rf"({WORDNET_ID})_", stem) or re.search(rf"_({WORDNET_ID})$", stem)
    return found[1] if found else None


def check_folders(source: str, names: Sequence[str]) -> None:
    """UserError where the class folders (or tars) `names` in `source` are not the 1,000 classes."""
    known, found = set(classes()), set(names)
    if found == known:
        return
    strange, missing = sorted(found - known), sorted(known - found)
    if strange and all(re.fullmatch("[0-9]+", each) for each in names):
        raise UserError(
            f"{source}: the class folders are numbers, which may be in the devkit's order or in that of labels; rename "
            f"each to its WordNet id ({classes()[0]}, ...)"
        )
    parts = []
    if missing:
        parts.append(f"{len(missing)} of the 1,000 classes are missing (first: {missing[0]})")
    if strange:
        parts.append(f"{len(strange)} folders are no class of ImageNet (first: {printable(strange[0])})")
    raise UserError(
        f"{source}: {' and '.join(parts)}; all labels after them would be shifted. Complete or remove them, or prepare a "
        "data set of your own under another name than imagenet"
    )


def check_labels(source: str, labels: np.ndarray, names: Sequence[str]) -> list[str]:
    """UserError where labels contradict the WordNet ids in file names, lie outside 0 to 999, or leave a class empty.

    Returns notes for the user: names without a WordNet id, another number of images than in the training set.
    source: named in messages. labels: int64 (N,). names: of the files, in the order of `labels`.
    """
    order = {name: label for label, name in enumerate(classes())}
    # label of the class in each file's name, int64 (N,); -1: no class in the name
    expected = np.array([order.get(named_class(name) or "", -1) for name in names], np.int64)
    named = expected >= 0
    wrong = np.flatnonzero(named & (labels != expected))
    if len(wrong):
        devkit = np.array([number for _, number, _ in _table()], np.int64)  # ILSVRC2012_ID of each label
        for shift, text in ((1, "the order of the devkit (ILSVRC2012_ID of meta.mat, from 0)"), (0, "ILSVRC2012_ID")):
            if np.array_equal(labels[named], devkit[expected[named]] - shift):
                raise UserError(
                    f"{source}: the labels are {text}, not positions in the sorted list of WordNet ids: file "
                    f"{printable(names[wrong[0]])} has label {labels[wrong[0]]} and should have {expected[wrong[0]]}; map "
                    "them first"
                )
        if np.array_equal(labels[named], expected[named] + 1):
            raise UserError(f"{source}: the labels begin at 1, and ImageNet's at 0; subtract 1")
        raise UserError(
            f"{source}: {len(wrong):,} of {len(labels):,} labels contradict their file names (first: "
            f"{printable(names[wrong[0]])} has label {labels[wrong[0]]}, its name says {classes()[expected[wrong[0]]]}, "
            f"which is {expected[wrong[0]]}); ImageNet's labels are positions in the sorted list of WordNet ids"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high > 999:
        raise UserError(f"{source}: label {low if low < 0 else high} is outside ImageNet's 0 to 999")
    empty = np.flatnonzero(np.bincount(labels, minlength=1000) == 0)
    if len(empty):
        raise UserError(
            f"{source}: {len(empty)} of the 1,000 classes have no image (first: {classes()[empty[0]]}, label {empty[0]})"
        )
    notes = []
    if not named.all():
        notes.append(f"{np.count_nonzero(~named):,} file names have no WordNet id: their labels were not checked")
    if len(labels) != TRAINING_IMAGES:
        notes.append(f"{len(labels):,} images where ImageNet's training set has {TRAINING_IMAGES:,}")
    return notes
