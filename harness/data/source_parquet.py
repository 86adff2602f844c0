"""Images from the parquet files of a Hugging Face data set: columns {image: {bytes, path}, label}, or of other names.

Shards are shuffled, so a row group is read at once and each of its images is written to its own row.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from harness.data import imagenet
from harness.data.listing import NO_LABELS, UNLABELLED, ImageIndex, IndexEntry, row_order
from harness.errors import UserError
from harness.images.source import printable, readable
from harness.io.text import parse_json

ROWS_PER_READ = 256
LABELS = ("label", "labels", "fine_label", "cls", "class")  # names of the column of labels, the first that there is


class Columns(NamedTuple):
    """The names of the columns of a file: of images, and of labels (None: there are none)."""

    image: str
    label: str | None


def index_parquet(source: Path, files: list[Path], dataset: str) -> ImageIndex:
    """The index of the images in `files`. source: their folder, or the only file itself."""
    parquet = _pyarrow()
    labels: list[int] = []
    names: list[str] = []
    class_names: tuple[str, ...] | None = None  # of the first file that has them
    groups: list[tuple[Path, int, int]] = []  # file, row group, number of images before it
    sizes: list[int] = []  # images of each row group
    columns: Columns | None = None  # of the first file
    without_bytes, first_path = 0, ""
    for path in files:
        with readable(path), parquet.ParquetFile(path) as file:
            found = _columns(path, file.schema_arrow)
            columns = columns or found
            if found != columns:
                raise UserError(
                    f"{path} has columns {_text(found)}, and {files[0]} {_text(columns)}; prepare one of them"
                )
            class_names = class_names or _class_names(file.schema_arrow, columns.label)
            wanted = [f"{columns.image}.path", *([] if columns.label is None else [columns.label])]
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=wanted)
                paths = [each["path"] for each in table.column(columns.image).to_pylist()]
                group_labels = [0] * len(paths) if columns.label is None else table.column(columns.label).to_pylist()
                if None in group_labels:
                    raise UserError(f"{path}: image {group_labels.index(None)} of row group {group} has no label")
                if group_labels:  # an empty row group is no unit
                    groups.append((path, group, len(labels)))
                    sizes.append(len(group_labels))
                labels += group_labels
                names += [_name(each, len(names) + i) for i, each in enumerate(paths)]
                if lost := _nulls(file, group, f"{columns.image}.bytes"):
                    first_path = first_path or str(next(filter(None, paths), ""))
                    without_bytes += lost
    if without_bytes:
        raise UserError(
            f"--from {source}: {without_bytes:,} of its {len(labels):,} images have no bytes, but paths (first: "
            f"{printable(first_path)}); prepare the folder of the images, or save the table with the images in it"
        )
    if not labels:
        raise UserError(f"--from {source}: there are no images in its {len(files)} parquet files")
    if min(labels) < 0:
        raise UserError(
            f"{source}: image {labels.index(min(labels))} has label {min(labels)}, as in splits without labels: name the "
            "files of the training split"
        )
    assert columns is not None
    notes = [] if columns.label == LABELS[0] else [f"labels are the column {columns.label}"]
    if columns.label is None:
        notes = [f"{NO_LABELS}, no column is one of {', '.join(LABELS)}"]
    if dataset == imagenet.NAME:
        notes += imagenet.check_labels(str(source), np.array(labels), names)
        classes = imagenet.classes()
    else:
        numbers = (str(each) for each in range(max(labels) + 1))
        classes = (UNLABELLED,) if columns.label is None else tuple(class_names or numbers)
        if max(labels) >= len(classes):
            raise UserError(
                f"{source}: label {max(labels)} is outside the {len(classes)} classes that its schema names"
            )
    order = row_order(labels, names)
    rows = np.empty(len(order), np.int64)  # row of each image in the data set, by its position in the files
    rows[order] = np.arange(len(order))

    def read(unit: int) -> Iterator[IndexEntry]:  # a unit is a row group
        path, group, first = groups[unit]
        with readable(path), parquet.ParquetFile(path) as file:
            i = first
            for batch in file.iter_batches(ROWS_PER_READ, row_groups=[group], columns=[f"{columns.image}.bytes"]):
                for image in batch.column(columns.image):
                    data: bytes = image["bytes"].as_py() or b""  # None becomes an empty file, which `decode` reports
                    name = f"{path.name}:{printable(names[i])}"
                    # bytes(data) is `data`; a lambda would return the `data` of the loop's last image
                    yield IndexEntry(int(rows[i]), name, functools.partial(bytes, data))
                    i += 1

    return ImageIndex(
        kind="parquet",
        classes=classes,
        labels=np.asarray(labels, np.int64)[order],
        names=[names[i] for i in order],
        sizes=sizes,
        in_order=False,
        read=read,
        notes=tuple(notes),
    )


def _pyarrow() -> Any:
    """The module pyarrow.parquet; UserError where it is not installed."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(
            f"parquet files are read by pyarrow, which cannot be imported ({error}); pip install pyarrow"
        ) from error
    return parquet


def holds_images(path: Path) -> bool:
    """Whether the file has a column of images; otherwise it is a table of something else, such as metadata."""
    parquet = _pyarrow()
    with readable(path), parquet.ParquetFile(path) as file:
        return bool(_image_columns(file.schema_arrow))


def _image_columns(schema: Any) -> list[str]:
    """The names of the columns that are structs of bytes and path. schema: a pyarrow.Schema."""
    import pyarrow

    def is_image(kind: Any) -> bool:
        if not pyarrow.types.is_struct(kind):
            return False
        parts = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
        data = parts.get("bytes")
        # a column without a single value has the type null
        tests = (pyarrow.types.is_binary, pyarrow.types.is_large_binary, pyarrow.types.is_null)
        return data is not None and "path" in parts and any(test(data) for test in tests)

    return [field.name for field in schema if is_image(field.type)]


def _columns(path: Path, schema: Any) -> Columns:
    """The columns of images and labels; UserError where there is not one column of images, or labels are no numbers."""
    import pyarrow

    images = _image_columns(schema)
    image = next((each for each in ("image", "img") if each in images), images[0] if len(images) == 1 else None)
    label = next((each for each in LABELS if each in schema.names), None)
    if image is None or (label is not None and not pyarrow.types.is_integer(schema.field(label).type)):
        raise UserError(
            f"{path} has columns {printable(', '.join(schema.names))}; wanted are image (a struct of bytes and path) and label (whole "
            "numbers), as the datasets library writes them"
        )
    return Columns(image, label)


def _text(columns: Columns) -> str:
    return printable(f"{columns.image} and {columns.label}" if columns.label else f"{columns.image} without labels")


def _nulls(file: Any, group: int, column: str) -> int:
    """Number of rows of a row group without a value in `column`, by its statistics, or else by its first row.

    file: a pyarrow.parquet.ParquetFile.
    """
    meta = file.metadata.row_group(group)
    for i in range(meta.num_columns):
        each = meta.column(i)
        if each.path_in_schema == column and each.statistics is not None and each.statistics.has_null_count:
            return int(each.statistics.null_count)
    name, _, part = column.partition(".")
    first = next(file.iter_batches(1, row_groups=[group], columns=[column]), None)  # all values would be all images
    return meta.num_rows if first is not None and first.column(name)[0][part].as_py() is None else 0


def _class_names(schema: Any, label: str | None) -> tuple[str, ...] | None:
    """The class names that the datasets library stores in the schema (its type ClassLabel); None: there are none."""
    try:
        features = parse_json((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(str(each) for each in features[label]["names"])
    except (KeyError, TypeError, ValueError):
        return None


def _name(path: str | None, i: int) -> str:
    """The file name in `path`, without its folder; where it has none, `i`, the image's position in all files."""
    base = (path or "").replace("\\", "/").rpartition("/")[2]
    return imagenet.plain_name(base) if base else f"{i:010d}"
