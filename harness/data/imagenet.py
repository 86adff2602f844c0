"""The classes of ImageNet (ILSVRC2012), and the ways in which labels are not in their order.

A label is the place of the class's WordNet id in the sorted list of the 1,000 ids: what every published checkpoint means
by it. The devkit numbers the same classes otherwise (ILSVRC2012_ID in meta.mat), and a tree with a class more or less
shifts all labels behind it; a model trained on either is wrong without any error.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from harness.errors import UserError
from harness.images.source import printable

NAME = "imagenet"
TRAINING_IMAGES = 1_281_167
WORDNET_ID = r"n[0-9]{8}"


@functools.cache
def _table() -> tuple[tuple[str, int], ...]:
    lines = (Path(__file__).parent / "imagenet_classes.txt").read_text(encoding="ascii").splitlines()
    rows = tuple((line.split()[0], int(line.split()[1])) for line in lines if not line.startswith("#"))
    assert len(rows) == 1000 and [name for name, _ in rows] == sorted(name for name, _ in rows)
    return rows


def classes() -> tuple[str, ...]:
    """The 1,000 WordNet ids in the order of labels."""
    return tuple(name for name, _ in _table())


def devkit_ids() -> dict[str, int]:
    """ILSVRC2012_ID (1 to 1000) by WordNet id."""
    return dict(_table())


def plain_name(name: str) -> str:
    """The file name as ImageNet has it: the copy on the Hugging Face hub repeats the class at its end."""
    return re.sub(rf"^((?:{WORDNET_ID}|ILSVRC2012_val)_[0-9]+)_{WORDNET_ID}(?=\.|$)", r"\1", name)


def named_class(name: str) -> str | None:
    """The WordNet id that a file name carries; None: it carries none."""
    stem = name.partition(".")[0]
    found = re.match(rf"({WORDNET_ID})_", stem) or re.search(rf"_({WORDNET_ID})$", stem)
    return found[1] if found else None


def check_folders(where: str, names: Sequence[str]) -> None:
    """Refuse folders (or tars) of classes that are not the 1,000; `where` holds them."""
    known, found = set(classes()), set(names)
    if found == known:
        return
    strange, lacking = sorted(found - known), sorted(known - found)
    if strange and all(re.fullmatch("[0-9]+", each) for each in names):
        raise UserError(
            f"{where}: the class folders are numbers, of which nobody can say whether they are the devkit's order or "
            f"that of labels; rename each to its WordNet id ({classes()[0]}, ...)"
        )
    parts = []
    if lacking:
        parts.append(f"{len(lacking)} of the 1,000 classes are missing (first: {lacking[0]})")
    if strange:
        parts.append(f"{len(strange)} folders are no class of ImageNet (first: {printable(strange[0])})")
    raise UserError(
        f"{where}: {' and '.join(parts)}; every label behind it would be shifted. Complete or remove them, or prepare a data "
        "set of your own under another name than imagenet"
    )


def check_labels(where: str, labels: np.ndarray, names: Sequence[str]) -> list[str]:
    """Refuse labels that are not in ImageNet's order, as far as file names tell. labels: int64 (N,); names: of the files.
    Returns notes: what could not be checked."""
    order = {name: place for place, name in enumerate(classes())}
    said = np.array([order.get(named_class(name) or "", -1) for name in names], np.int64)  # -1: not told
    told = said >= 0
    wrong = np.flatnonzero(told & (labels != said))
    if len(wrong):
        devkit = np.array([number for _, number in _table()], np.int64)
        for shift, text in ((1, "the order of the devkit (ILSVRC2012_ID of meta.mat, from 0)"), (0, "ILSVRC2012_ID")):
            if np.array_equal(labels[told], devkit[said[told]] - shift):
                raise UserError(
                    f"{where}: the labels are {text}, not places in the sorted list of WordNet ids: file "
                    f"{printable(names[wrong[0]])} has label {labels[wrong[0]]} and should have {said[wrong[0]]}; map them first"
                )
        if np.array_equal(labels[told], said[told] + 1):
            raise UserError(f"{where}: the labels begin at 1, and ImageNet's at 0; subtract 1")
        raise UserError(
            f"{where}: {len(wrong):,} of {len(labels):,} labels contradict their file names (first: "
            f"{printable(names[wrong[0]])} has label {labels[wrong[0]]}, its name says {classes()[said[wrong[0]]]}, which is "
            f"{said[wrong[0]]}); ImageNet's labels are places in the sorted list of WordNet ids"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high > 999:
        raise UserError(f"{where}: label {low if low < 0 else high} is outside ImageNet's 0 to 999")
    empty = np.flatnonzero(np.bincount(labels, minlength=1000) == 0)
    if len(empty):
        raise UserError(
            f"{where}: {len(empty)} of the 1,000 classes have no image (first: {classes()[empty[0]]}, label {empty[0]})"
        )
    notes = []
    if not told.all():
        notes.append(
            f"{np.count_nonzero(~told):,} file names carry no WordNet id, so nobody has compared their labels with them"
        )
    if len(labels) != TRAINING_IMAGES:
        notes.append(f"{len(labels):,} images where ImageNet's training set has {TRAINING_IMAGES:,}")
    return notes
