"""PNG, JPEG and WebP files: strict decoding, and folders of them.

Image files: 8-bit grey or RGB as stored; palettes and bilevel files are expanded without loss, an opaque alpha channel
is dropped, both with a note; 16 bits, real transparency, CMYK and animations are refused by name. EXIF orientation and
colour profiles are not applied (evaluators do not apply them either).
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from harness.errors import UserError
from harness.images.files import SUFFIXES, Entry, source_of_files
from harness.images.source import LAYOUTS, ImageSource, joined, natural, printable, readable


def open_folder(path: Path) -> ImageSource:
    try:
        inside = [each for each in path.iterdir() if not each.name.startswith(".")]
    except OSError as error:
        raise UserError(f"{path} cannot be listed: {error.strerror or error}; check its permissions") from error
    named = {suffix: [p for p in inside if p.suffix.lower() == suffix and p.is_file()] for suffix in (".npz", ".tar")}
    images = [p for p in inside if p.suffix.lower() in SUFFIXES]
    folders = [p for p in inside if p.is_dir()]
    if sum(map(bool, (named[".npz"], named[".tar"], images))) > 1:
        raise UserError(f"{path} holds npz, tar or image files side by side; name the ones that are meant")
    for suffix in (".npz", ".tar"):
        if named[suffix]:
            return joined(str(path), [open_file(each) for each in natural(named[suffix])])
    notes, labels = [], None
    if not images and folders:
        images, labels, ignored = _class_folders(path, folders, notes)
    else:
        ignored = len(inside) - len(images) - len(folders)
        if any(_image_files(folder)[0] for folder in folders):
            raise UserError(f"{path} holds images and folders of images: are these classes? Keep one of the two")
        images = natural(images, lambda each: each.name)
    if not images:
        raise UserError(f"{path}: no images in it; images are read from {LAYOUTS}")
    if ignored:
        notes.append(f"{ignored} files that are no images were left out")
    odd = next((each for each in images if not each.is_file()), None)
    if odd is not None:
        raise UserError(f"{printable(str(odd))}: a broken link or no plain file; remove it, or put the image there")
    entries = [Entry(name=printable(str(each)), path=each) for each in images]
    with readable(path):
        return source_of_files(str(path), entries, labels, notes)


def _image_files(folder: Path) -> tuple[list[Path], int]:
    """Image files of one folder in natural order, and the number of others; a folder inside it is refused."""
    with readable(folder):
        inside = [each for each in folder.iterdir() if not each.name.startswith(".")]
    found = natural((p for p in inside if p.suffix.lower() in SUFFIXES), lambda each: each.name)
    deeper = next((p for p in inside if p.is_dir()), None)
    if deeper is not None:
        raise UserError(f"{printable(str(deeper))}: a folder inside a class folder; keep images in DIR or in DIR/CLASS")
    return found, len(inside) - len(found)


def class_labels(names: Iterable[str]) -> tuple[dict[str, int], bool]:
    """The label of each class by its name, in their order, and whether the names are the labels: they are where all are
    whole numbers; otherwise a label is the place in sorted order."""
    names = sorted(names)
    if all(re.fullmatch(r"[0-9]{1,9}", each) for each in names):
        return {each: int(each) for each in sorted(names, key=int)}, True
    return {each: place for place, each in enumerate(names)}, False


def _class_folders(path: Path, folders: list[Path], notes: list[str]) -> tuple[list[Path], list[int], int]:
    by_name, numbered = class_labels(each.name for each in folders)
    where = "names of the folders" if numbered else "places of the folders in sorted order"
    notes.append(f"labels are the {where}")
    images, labels, ignored = [], [], 0
    for name, label in by_name.items():
        found, others = _image_files(path / name)
        images += found
        labels += [label] * len(found)
        ignored += others
    return images, labels, ignored


def open_images(path: str | Path, classes: int | None = None) -> ImageSource:
    """The images at `path`: a file, a folder, or a pattern such as `out/shard-*.npz`.

    Order: an npz's or npy's own; image files and shards naturally by name (2 before 10), tar members as they lie.
    Labels: arr_1 of an npz; subfolders of a folder (their number where all are called by one, else their place in
    sorted order, as torchvision does); .cls members of a tar. classes: labels must lie in 0 .. classes - 1.
    """
    from harness.images.open import open_folder  # these know ImageSource, so they come second

    path = Path(path)
    if path.is_dir():
        source = open_folder(path)
    elif path.is_file():
        source = open_file(path)
    elif any(sign in str(path) for sign in "*?["):
        found = natural(Path(each) for each in glob.glob(str(path)))  # noqa: PTH207 (the pattern has its own folder)
        source = joined(str(path), [open_file(each) for each in found])
    else:
        raise UserError(f"{path}: no such file or folder; images are read from {LAYOUTS}")
    if source.labels is not None and classes is not None:
        outside = (source.labels < 0) | (source.labels >= classes)
        if outside.any():
            i = int(np.argmax(outside))
            raise UserError(
                f"{path}: label {source.labels[i]} of image {i} is outside the {classes} classes (0 to {classes - 1}) (labels-outside)"
            )
    return source


def open_file(path: Path) -> ImageSource:
    from harness.images.npz import open_npy, open_npz
    from harness.images.tars import open_tar

    suffix = path.suffix.lower()
    with readable(path):
        if suffix == ".npz":
            return open_npz(path)
        if suffix == ".npy":
            return open_npy(path)
        if suffix == ".tar":
            return open_tar(path)
    if path.name.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
        raise UserError(f"{path}: a compressed tar cannot be read in places; unpack it to .tar first")
    raise UserError(f"{path}: unknown kind of file; images are read from {LAYOUTS}")
