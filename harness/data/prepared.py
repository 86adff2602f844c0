"""Prepared data sets: images of one size in one folder, which training maps and never reads as a whole.

    DIR/images.npy    uint8 (N, H, W, C) in [0, 255], C order
    DIR/labels.npy    int64 (N,) in [0, len(classes))
    DIR/meta.json     `Meta`: what it is, how it was made, and a hash of every chunk

`harness data prepare` makes the folder, under another name until it is whole; `harness data verify` compares every chunk
with its hash. `load` trusts what is there and takes the data set's hash from meta.json: ImageNet at 256 is 252 GB.

The images stand in the order of (label, name of the source's file), whatever kind of source they came from, so the same
images have the same hash. That hash, `Meta.sha256`, is defined here and nowhere else: over the hashes of all chunks, the
shape and the list of classes. A chunk is 256 images in a row (the last one fewer), its hash that of `chunk_sha256`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
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


@dataclass(frozen=True, kw_only=True)
class Meta:
    """What meta.json holds of a prepared data set.

    name: of the data set. shape: (N, H, W, C). crop: how images were brought to H x W. classes: names, in the order of
    labels. chunks: `chunk_sha256` of each CHUNK_IMAGES images, hexadecimal. source: its kind and the hash of its listing,
    no paths. notes: what a user should know of single files. software: versions that decide pixels.
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
        """N."""
        return self.shape[0]

    @property
    def resolution(self) -> int:
        """H = W."""
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
    digest = hashlib.sha256(np.ascontiguousarray(images))
    digest.update(np.ascontiguousarray(labels, "<i8"))
    return digest.hexdigest()


def chunk_count(images: int) -> int:
    """Number of chunks of so many images."""
    return -(-images // CHUNK_IMAGES)


def chunk_sizes(images: int) -> list[int]:
    """Images of each chunk of so many."""
    return [min(CHUNK_IMAGES, images - start) for start in range(0, images, CHUNK_IMAGES)]


def stored_chunk_sha256(path: Path, start: int, shape: tuple[int, ...], chunk: int, labels: np.ndarray) -> str:
    """`chunk_sha256` of chunk number `chunk` of the images that begin at byte `start` of `path`, read past any map: what
    is read through one counts as this process's memory. shape: (N, H, W, C). labels: int64 (N,), all of them."""
    first, size = chunk * CHUNK_IMAGES, int(np.prod(shape[1:]))
    here = labels[first : first + CHUNK_IMAGES]
    with path.open("rb") as file:
        file.seek(start + first * size)
        data = file.read(len(here) * size)
    return chunk_sha256(np.frombuffer(data, np.uint8), here)


def is_prepared(folder: Path) -> bool:
    """Whether `folder` looks like a prepared data set."""
    return all((folder / name).is_file() for name in (IMAGES, LABELS, META))


def read_meta(folder: Path) -> Meta:
    """The meta.json of a prepared data set; UserError for another folder, and for a document that contradicts itself."""
    if not is_prepared(folder):
        raise UserError(f"{folder} is no prepared data set (it lacks {IMAGES}, {LABELS} or {META}); {MAKES_IT}")
    path = folder / META
    data = files.read_json(path, "data set file")
    try:
        if data["schema"] > SCHEMA:
            raise UserError(f"{path} was written by a newer harness (schema {data['schema']}); update this one")
        meta = Meta(
            name=str(data["name"]),
            shape=tuple(int(each) for each in data["shape"]),
            crop=str(data["crop"]),
            classes=tuple(str(each) for each in data["classes"]),
            chunks=tuple(str(each) for each in data["chunks"]),
            source=dict(data["source"]),
            notes=tuple(str(each) for each in data["notes"]),
            software=dict(data["software"]),
        )
        sound = (
            len(meta.shape) == 4
            and min(meta.shape) > 0
            and data["chunk_images"] == CHUNK_IMAGES
            and len(meta.chunks) == chunk_count(meta.images)
            and data["sha256"] == meta.sha256
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not a data set file of this harness ({type(error).__name__}: {error})") from error
    if not sound:
        raise UserError(f"{path} contradicts its own hash: edited or damaged; prepare the data set again")
    return meta


def damaged_chunks(folder: Path, meta: Meta, progress: Callable[[int], object], threads: int) -> list[int]:
    """Numbers of the chunks that differ from their hashes; every byte is read. `progress` is told of images done."""
    images, labels = open_arrays(folder, meta)
    with ThreadPoolExecutor(threads) as pool:

        def sound(chunk: int) -> bool:
            found = stored_chunk_sha256(folder / IMAGES, images.offset, meta.shape, chunk, labels)
            return found == meta.chunks[chunk]

        damaged = []
        for chunk, (fine, size) in enumerate(
            zip(pool.map(sound, range(len(meta.chunks))), chunk_sizes(meta.images), strict=True)
        ):
            progress(size)
            if not fine:
                damaged.append(chunk)
    return damaged


def open_arrays(folder: Path, meta: Meta) -> tuple[np.ndarray, np.ndarray]:
    """(images uint8 (N, H, W, C), mapped read-only; labels int64 (N,), in memory), of the shapes that `meta` says."""
    images = _opened(folder / IMAGES, np.dtype(np.uint8), meta.shape)
    labels = np.array(_opened(folder / LABELS, np.dtype(np.int64), meta.shape[:1]))
    outside = (labels < 0) | (labels >= len(meta.classes))
    if outside.any():
        row = int(np.argmax(outside))
        raise UserError(
            f"{folder / LABELS}: image {row} has label {labels[row]}, and there are {len(meta.classes)} classes: damaged; "
            "prepare the data set again"
        )
    return images, labels


def _opened(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    with readable(path):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(array, np.memmap) or array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
        raise UserError(f"{path} is {array.dtype} {array.shape} where {META} says {dtype} {shape}; prepare it again")
    return array


def load(folder: Path) -> ImageSet:
    """The data set in `folder`, its images mapped: nothing but labels and meta.json is read."""
    meta = read_meta(folder)
    images, labels = open_arrays(folder, meta)
    return ImageSet(name=meta.name, images=images, labels=labels, known_sha256=meta.sha256)


def missing(folder: Path | None, resolution: int | None = None) -> str | None:
    """What keeps `folder` from being used at `resolution`, with the way out, in one line; None: nothing."""
    if folder is None:
        return f"name a folder of `harness data prepare` with --data{_command('NAME', resolution)}"
    return _unfit(folder, resolution, "NAME")


def load_imagenet(folder: Path) -> ImageSet:
    """ImageNet, prepared; another data set is refused."""
    if (lack := missing_imagenet(folder)) is not None:
        raise UserError(f"data set 'imagenet': {lack}")
    return load(folder)


def missing_imagenet(folder: Path | None, resolution: int | None = None) -> str | None:
    """As `missing`, of ImageNet."""
    if folder is None:
        return f"name its prepared folder with --data{_command('imagenet', resolution)}"
    if (lack := _unfit(folder, resolution, "imagenet")) is not None:
        return lack
    name = read_meta(folder).name
    return None if name == "imagenet" else f"{folder} is data set {name!r}{_command('imagenet', resolution)}"


def _unfit(folder: Path, resolution: int | None, name: str) -> str | None:
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
    size = "" if resolution is None else f" --resolution {resolution}"
    return f"; `harness data prepare {name} --from PATH --out DIR{size}` makes it"


def facts(meta: Meta) -> dict[str, Any]:
    """What a command prints as JSON."""
    return {**json.loads(json.dumps(dataclasses.asdict(meta))), "sha256": meta.sha256, "chunks": len(meta.chunks)}
