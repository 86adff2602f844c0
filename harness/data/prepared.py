"""Prepared data sets: images of one size in one folder, which training maps and never reads as a whole.

    DIR/images.npy    uint8 (N, H, W, C) in [0, 255], C order
    DIR/labels.npy    int64 (N,) in [0, len(classes))
    DIR/meta.json     `Meta`: what it is, how it was made, and a hash of every chunk

`harness data prepare` makes the folder, which has another name until it is complete; `harness data verify` compares every
chunk with its hash. `load` reads no pixels and takes the data set's hash from meta.json: ImageNet at 256 is 252 GB.

The images are in the order of (label, name of the source's file), whatever kind of source they came from, so the same
images have the same hash. That hash, `Meta.sha256`, covers the hashes of all chunks, the shape and the list of classes. A
chunk is 256 consecutive images (the last one fewer), hashed by `chunk_sha256`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.data.images import ImageSet
from harness.errors import UserError
from harness.images.source import readable
from harness.io import files

SCHEMA = 1
CHUNK_IMAGES = 256
IMAGES, LABELS, META = "images.npy", "labels.npy", "meta.json"
MAKES_IT = "`harness data prepare` makes it"
EDITED = "contradicts its own hash: edited or damaged; prepare the data set again"


@dataclass(frozen=True, kw_only=True)
class Meta:
    """The content of meta.json.

    name: of the data set. shape: (N, H, W, C). crop: name of the method that cropped images to H x W. classes: names, in
    the order of labels. chunks: `chunk_sha256` of each CHUNK_IMAGES images, hexadecimal. source: kind of the source and
    hash of its index, no paths. notes: lines for the user, on single files. software: versions that decide pixels.
    """

    name: str
    shape: tuple[int, int, int, int]
    crop: str
    classes: tuple[str, ...]
    chunks: tuple[str, ...]
    source: dict[str, Any]
    notes: tuple[str, ...] = ()
    software: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def images(self) -> int:
        """Number of images, N."""
        return self.shape[0]

    @property
    def resolution(self) -> int:
        """Pixels per side, H = W."""
        return self.shape[1]

    @property
    def sha256(self) -> str:
        """Content hash of the data set: images, labels, classes and their order."""
        content = {"shape": self.shape, "chunk_images": CHUNK_IMAGES, "chunks": self.chunks, "classes": self.classes}
        return files.sha256_json({"schema": SCHEMA, **content})

    def write(self, folder: Path) -> None:
        """Write meta.json, atomically."""
        document = {"schema": SCHEMA, "sha256": self.sha256, "chunk_images": CHUNK_IMAGES, **dataclasses.asdict(self)}
        files.write_json(folder / META, document)


def chunk_sha256(images: np.ndarray, labels: np.ndarray) -> str:
    """Hash of a chunk: the bytes of its images uint8 (n, H, W, C), then its labels int64 (n,), little-endian."""
    digest = hashlib.sha256(np.ascontiguousarray(images).data)
    digest.update(np.ascontiguousarray(labels, "<i8").data)
    return digest.hexdigest()


def chunk_count(images: int) -> int:
    """Number of chunks of a data set of `images` images."""
    return -(-images // CHUNK_IMAGES)


def chunk_sizes(images: int) -> list[int]:
    """Number of images of each chunk of a data set of `images` images."""
    return [min(CHUNK_IMAGES, images - start) for start in range(0, images, CHUNK_IMAGES)]


def stored_chunk_sha256(path: Path, data_start: int, shape: tuple[int, ...], chunk: int, labels: np.ndarray) -> str:
    """`chunk_sha256` of chunk number `chunk` in a file of images.

    data_start: byte of `path` where the images begin. shape: (N, H, W, C). labels: int64 (N,), of all images. The file
    is read and not mapped, because mapped pages count as this process's memory.
    """
    first, image_bytes = chunk * CHUNK_IMAGES, int(np.prod(shape[1:]))
    chunk_labels = labels[first : first + CHUNK_IMAGES]
    with path.open("rb") as file:
        file.seek(data_start + first * image_bytes)
        data = file.read(len(chunk_labels) * image_bytes)
    return chunk_sha256(np.frombuffer(data, np.uint8), chunk_labels)


def is_prepared(folder: Path) -> bool:
    """Whether `folder` looks like a prepared data set."""
    return all((folder / name).is_file() for name in (IMAGES, LABELS, META))


def class_names(source_paths: Mapping[str, str]) -> tuple[tuple[str, ...], ...]:
    """The name of each class of the prepared images that latents were made of, in the order of labels.

    source_paths: see `harness.data.examples`. Empty where the images are not known or no longer there.
    """
    folder = Path(source_paths.get("images", ""))
    return tuple((name,) for name in read_meta(folder).classes) if is_prepared(folder) else ()


def read_meta(folder: Path) -> Meta:
    """The meta.json of a prepared data set; UserError for another folder, and for a document that contradicts itself."""
    if not is_prepared(folder):
        raise UserError(f"{folder} is no prepared data set ({IMAGES}, {LABELS} or {META} is missing); {MAKES_IT}")
    path = folder / META
    data = files.read_json(path, "data set file")
    try:
        if data["schema"] > SCHEMA:
            raise UserError(f"{path} was written by a newer harness (schema {data['schema']}); update this one")
        shape = tuple(int(side) for side in data["shape"])
        if len(shape) != 4:
            raise UserError(f"{path} {EDITED}")
        meta = Meta(
            name=str(data["name"]),
            shape=shape,
            crop=str(data["crop"]),
            classes=tuple(str(each) for each in data["classes"]),
            chunks=tuple(str(each) for each in data["chunks"]),
            source=dict(data["source"]),
            notes=tuple(str(each) for each in data["notes"]),
            software=dict(data["software"]),
        )
        sound = (
            min(meta.shape) > 0
            and data["chunk_images"] == CHUNK_IMAGES
            and len(meta.chunks) == chunk_count(meta.images)
            and data["sha256"] == meta.sha256
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):  # a ValueError, too
            raise
        raise UserError(f"{path} is not a data set file of this harness ({type(error).__name__}: {error})") from error
    if not sound:
        raise UserError(f"{path} {EDITED}")
    return meta


def damaged_chunks(folder: Path, meta: Meta, progress: Callable[[int], object], threads: int) -> list[int]:
    """Numbers of the chunks that differ from their hashes; every byte is read.

    progress: called after every chunk with its number of images. threads: number of threads that read and hash.
    """
    images, labels = open_arrays(folder, meta)
    with ThreadPoolExecutor(threads) as pool:

        def sound(chunk: int) -> bool:
            # `offset` of a memory map: the byte of the file where its data begin
            sha256 = stored_chunk_sha256(folder / IMAGES, images.offset, meta.shape, chunk, labels)
            return sha256 == meta.chunks[chunk]

        damaged = []
        for chunk, (fine, size) in enumerate(
            zip(pool.map(sound, range(len(meta.chunks))), chunk_sizes(meta.images), strict=True)
        ):
            progress(size)
            if not fine:
                damaged.append(chunk)
    return damaged


def open_arrays(folder: Path, meta: Meta) -> tuple[np.memmap, np.ndarray]:
    """Images uint8 (N, H, W, C), mapped read-only, and labels int64 (N,), in memory; UserError unless they fit `meta`."""
    images = _map_array(folder / IMAGES, np.dtype(np.uint8), meta.shape)
    labels = np.array(_map_array(folder / LABELS, np.dtype(np.int64), meta.shape[:1]))
    outside = (labels < 0) | (labels >= len(meta.classes))
    if outside.any():
        row = int(np.argmax(outside))
        raise UserError(
            f"{folder / LABELS}: image {row} has label {labels[row]}, and there are {len(meta.classes)} classes: damaged; "
            "prepare the data set again"
        )
    return images, labels


def _map_array(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.memmap:
    """The npy at `path`, mapped read-only; UserError unless it has this dtype and shape."""
    with readable(path):
        array = np.lib.format.open_memmap(path, mode="r")  # np.load would also open a zip, which is no array
    if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
        raise UserError(f"{path} is {array.dtype} {array.shape} where {META} says {dtype} {shape}; prepare it again")
    return array


def load(folder: Path) -> ImageSet:
    """The data set in `folder`, its images mapped: only labels and meta.json are read."""
    meta = read_meta(folder)
    images, labels = open_arrays(folder, meta)
    return ImageSet(name=meta.name, images=images, labels=labels, known_sha256=meta.sha256)


def missing(folder: Path | None, resolution: int | None = None) -> str | None:
    """Why `folder` cannot be used at `resolution` (None: any), with the command that makes it, in one line; None: it can."""
    if folder is None:
        return f"name a folder of `harness data prepare` with --data{_command('NAME', resolution)}"
    return _mismatch(folder, resolution, "NAME")


def load_imagenet(folder: Path) -> ImageSet:
    """Prepared ImageNet; UserError for another data set."""
    if (problem := missing_imagenet(folder)) is not None:
        raise UserError(f"data set 'imagenet': {problem}")
    return load(folder)


def missing_imagenet(folder: Path | None, resolution: int | None = None) -> str | None:
    """As `missing`, for ImageNet: another data set in `folder` is a reason too."""
    if folder is None:
        return f"name its prepared folder with --data{_command('imagenet', resolution)}"
    if (problem := _mismatch(folder, resolution, "imagenet")) is not None:
        return problem
    name = read_meta(folder).name
    return None if name == "imagenet" else f"{folder} is data set {name!r}{_command('imagenet', resolution)}"


def _mismatch(folder: Path, resolution: int | None, name: str) -> str | None:
    """Why `folder` is no prepared data set of `resolution`, in one line; None: it is. name: the data set in the command."""
    if not folder.is_dir() or not is_prepared(folder):
        return f"{folder} is no prepared data set{_command(name, resolution)}"
    try:
        meta = read_meta(folder)
    except UserError as error:
        return str(error)
    if resolution is not None and meta.resolution != resolution:
        return f"{folder} was prepared at {meta.resolution} pixels, {resolution} are wanted{_command(name, resolution)}"
    return None


def _command(name: str, resolution: int | None) -> str:
    """The end of a message, from the semicolon on: the command that makes the data set."""
    size = "" if resolution is None else f" --resolution {resolution}"
    return f"; `harness data prepare {name} --from PATH --out DIR{size}` makes it"


def facts(meta: Meta) -> dict[str, Any]:
    """The fields of `meta` and its sha256, as `harness data prepare --json` prints them; "chunks" is their number."""
    return {**dataclasses.asdict(meta), "sha256": meta.sha256, "chunks": len(meta.chunks)}
