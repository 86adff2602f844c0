"""Opening images by path: which reader a file, a folder or a pattern needs, and the labels that folders stand for."""

from __future__ import annotations

import glob
from pathlib import Path

from harness.errors import UserError
from harness.images.files import SUFFIXES, SYSTEM_FOLDERS, Entry, check_image_file, notes_on_left_out, source_of_files
from harness.images.npz import open_npy, open_npz
from harness.images.source import (
    LAYOUTS,
    ImageSource,
    class_labels,
    concatenated,
    label_outside,
    natural_sorted,
    printable,
    readable,
)  # fmt: skip
from harness.images.tars import open_tar
from harness.runs.pictures import is_picture

COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def open_images(path: str | Path, classes: int | None = None, *, any_arr_1: bool = False) -> ImageSource:
    """The images at `path`: a file, a folder, or a pattern such as `out/shard-*.npz`.

    Order: that of the array in npz and npy; image files and shards sorted naturally by name (2 before 10); tar members
    as they are stored. Labels: arr_1 of an npz; class folders (see `class_labels`); .cls members of a tar.
    classes: labels must lie in 0 .. classes - 1; None: not checked. any_arr_1: see `harness.images.npz.open_npz`; of a
    single npz. UserError for whatever cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        source = open_folder(path)
    elif path.is_file():
        source = open_file(path, any_arr_1=any_arr_1)
    elif any(sign in str(path) for sign in "*?["):
        shards = natural_sorted(Path(each) for each in glob.glob(str(path)))  # noqa: PTH207 (the pattern has a folder)
        source = concatenated(str(path), [open_file(each) for each in shards])
    else:
        raise UserError(f"{path}: no such file or folder; images are read from {LAYOUTS}")
    if source.labels is not None and classes is not None and (text := label_outside(source.labels, classes)):
        raise UserError(f"{path}: {text} (labels-outside)")  # the name of this check in `evaluators.guards`
    return source


def open_file(path: Path, *, any_arr_1: bool = False) -> ImageSource:
    """The images in an npz, an npy or a tar."""
    suffix = path.suffix.lower()
    with readable(path):
        if suffix == ".npz":
            return open_npz(path, any_arr_1=any_arr_1)
        if suffix == ".npy":
            return open_npy(path)
        if suffix == ".tar":
            return open_tar(path)
    if path.name.lower().endswith(COMPRESSED_TARS):
        raise UserError(
            f"{path}: the members of a compressed tar cannot be reached one by one; unpack it to .tar first"
        )
    raise UserError(f"{path}: unknown kind of file; images are read from {LAYOUTS}")


def open_folder(path: Path) -> ImageSource:
    """The images in a folder: image files, class folders of them, or shards (npz or tar)."""
    try:
        inside = [each for each in path.iterdir() if not each.name.startswith(".")]
    except OSError as error:
        raise UserError(f"{path} cannot be listed: {error.strerror or error}; check its permissions") from error
    shards = {suffix: [p for p in inside if p.suffix.lower() == suffix and p.is_file()] for suffix in (".npz", ".tar")}
    all_folders = {p for p in inside if p.is_dir()}
    images = [p for p in inside if p.suffix.lower() in SUFFIXES and p not in all_folders]
    if path / "run.json" in inside and not images and not any(shards.values()):
        sets = natural_sorted(each.parent for each in path.glob("samples/*/samples.npz"))
        remedy = (
            f"name one of its sample sets: {', '.join(map(str, sets))}" if sets else "harness sample draws its samples"
        )
        raise UserError(f"{path} is the folder of a run; {remedy}")
    folders = [p for p in all_folders if p.name not in SYSTEM_FOLDERS]
    if sum(map(bool, (shards[".npz"], shards[".tar"], images))) > 1:
        raise UserError(f"{path} holds npz, tar or image files side by side; name the ones to read")
    for found in shards.values():
        if found:  # the others are empty (see above)
            return concatenated(str(path), [open_file(each) for each in natural_sorted(found)])
    others = [p.name for p in inside if p not in all_folders and p.suffix.lower() not in SUFFIXES]
    labels: list[int] | None = None
    by_folder = {folder.name: _image_files(folder) for folder in folders}
    with_images = [name for name, (found, _) in by_folder.items() if found]
    left_out = [p.name for p in all_folders if p.name not in with_images]
    notes: list[str] = []
    if images and with_images:
        raise UserError(f"{path} holds images and folders of images: are these classes? Keep one of the two")
    if images:
        images = natural_sorted(images, lambda each: each.name)
    elif with_images:
        by_name, numbered = class_labels(with_images)
        meaning = "names of the folders" if numbered else "positions of the folders in sorted order"
        notes.append(f"labels are the {meaning}")
        images = [image for name in by_name for image in by_folder[name][0]]
        labels = [label for name, label in by_name.items() for _ in by_folder[name][0]]
        others += [each for name in with_images for each in by_folder[name][1]]
    if any(map(is_picture, images)):
        raise UserError(
            f"{path} holds pictures to look at, no samples (`harness sample --classes` made them); `harness sample` without "
            "--classes draws a sample set"
        )
    if not images:
        raise UserError(f"{path}: no images in it; images are read from {LAYOUTS}")
    notes += notes_on_left_out(others, left_out)
    for each in images:
        check_image_file(each)
    entries = [Entry(name=printable(str(each)), path=each) for each in images]
    with readable(path):
        return source_of_files(str(path), entries, labels, notes)


def _image_files(folder: Path) -> tuple[list[Path], list[str]]:
    """(image files of one folder in natural order, names of the other files). UserError for a folder inside it."""
    with readable(folder):
        inside = [each for each in folder.iterdir() if not each.name.startswith(".")]
    found = natural_sorted(
        (p for p in inside if p.suffix.lower() in SUFFIXES and not p.is_dir()), lambda each: each.name
    )
    deeper = next((p for p in inside if p.is_dir() and p.name not in SYSTEM_FOLDERS), None)
    if deeper is not None:
        raise UserError(f"{printable(str(deeper))}: a folder inside a class folder; keep images in DIR or in DIR/CLASS")
    return found, [p.name for p in inside if not p.is_dir() and p.suffix.lower() not in SUFFIXES]
