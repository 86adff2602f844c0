"""Images in classes from the parquet files of a Hugging Face data set: columns {image: {bytes, path}, label}.

Shards are shuffled, so a row group is read at once and each of its images is written to its own row.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from harness.data import imagenet
from harness.data.listing import ImageIndex, IndexEntry, row_order
from harness.errors import UserError
from harness.images.source import printable, readable

ROWS_PER_READ = 256


def index_parquet(source: Path, files: list[Path], dataset: str) -> ImageIndex:
    """The index of the images in `files`. source: their folder, or the only file itself."""
    parquet = _pyarrow()
    labels: list[int] = []
    names: list[str] = []
    class_names: tuple[str, ...] | None = None  # of the first file that has them
    groups: list[tuple[Path, int, int]] = []  # file, row group, number of images before it
    sizes: list[int] = []  # images of each row group
    for path in files:
        with readable(path), parquet.ParquetFile(path) as file:
            _check_columns(path, file.schema_arrow)
            class_names = class_names or _class_names(file.schema_arrow)
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=["image.path", "label"])
                group_labels = table.column("label").to_pylist()
                if None in group_labels:
                    raise UserError(f"{path}: image {group_labels.index(None)} of row group {group} has no label")
                if group_labels:  # an empty row group is no unit
                    groups.append((path, group, len(labels)))
                    sizes.append(len(group_labels))
                labels += group_labels
                paths = [each["path"] for each in table.column("image").to_pylist()]
                names += [_name(each, len(names) + i) for i, each in enumerate(paths)]
    if not labels:
        raise UserError(f"--from {source}: there are no images in its {len(files)} parquet files")
    if min(labels) < 0:
        raise UserError(
            f"{source}: image {labels.index(min(labels))} has label {min(labels)}, as in splits without labels: name the "
            "files of the training split"
        )
    notes = []
    if dataset == imagenet.NAME:
        notes = imagenet.check_labels(str(source), np.array(labels), names)
        classes = imagenet.classes()
    else:
        classes = tuple(class_names or (str(each) for each in range(max(labels) + 1)))
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
            for batch in file.iter_batches(ROWS_PER_READ, row_groups=[group], columns=["image.bytes"]):
                for image in batch.column("image"):
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


def _check_columns(path: Path, schema: Any) -> None:
    """UserError where a file does not have the columns that the datasets library writes. schema: a pyarrow.Schema."""
    import pyarrow

    def has_columns() -> bool:
        image, label = schema.field("image").type, schema.field("label").type
        parts = {image.field(i).name: image.field(i).type for i in range(image.num_fields)}
        binary = pyarrow.types.is_binary(parts["bytes"]) or pyarrow.types.is_large_binary(parts["bytes"])
        return binary and "path" in parts and pyarrow.types.is_integer(label)

    try:
        sound = has_columns()
    except (KeyError, AttributeError):  # one of the columns or of their parts does not exist
        sound = False
    if not sound:
        raise UserError(
            f"{path} has columns {printable(', '.join(schema.names))}; wanted are image (a struct of bytes and path) and label (whole "
            "numbers), as the datasets library writes them"
        )


def _class_names(schema: Any) -> tuple[str, ...] | None:
    """The class names that the datasets library stores in the schema (its type ClassLabel); None: there are none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(str(each) for each in features["label"]["names"])
    except (KeyError, TypeError, ValueError):
        return None


def _name(path: str | None, i: int) -> str:
    """The file name in `path`, without its folder; where it has none, `i`, the image's position in all files."""
    base = (path or "").replace("\\", "/").rpartition("/")[2]
    return imagenet.plain_name(base) if base else f"{i:010d}"
