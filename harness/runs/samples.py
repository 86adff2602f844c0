"""Sample sets on disk: `samples.npz` in the layout of ADM's evaluator, and a JSON sidecar that says how it was made.

Layout (openai/guided-diffusion, evaluations/README.md): `arr_0` uint8 (N, H, W, C), RGB or grey, 0 to 255; `arr_1`
int64 (N,) labels. The file is an uncompressed zip, so it can be written and read a shard at a time: 50,000 images at
256 pixels are 10 GB.
"""

import json
import os
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from harness.errors import RunError, UserError
from harness.io.files import sha256_file

CHUNK_BYTES = 1 << 22
WANTED = "wanted uint8 (N, H, W, C) in [0, 255] with C 1 or 3"


@dataclass(frozen=True, kw_only=True)
class SampleSet:
    """images: uint8 (N, H, W, C), read-only, mapped from the file where it is stored uncompressed.
    labels: int64 (N,), None where the file has no arr_1. sha256: of the whole file.
    """

    images: np.ndarray
    labels: np.ndarray | None
    sha256: str
    path: Path


def sidecar_path(path: Path) -> Path:
    """samples.npz -> samples.json."""
    return Path(path).with_suffix(".json")


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears under its name only when it is complete and on the disk; an error leaves what was there
    before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        if hasattr(os, "O_DIRECTORY"):  # the rename itself must survive a power cut; Windows has no such call
            folder = os.open(path.parent, os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        raise RunError(f"{path} could not be written: {error.strerror or error}; nothing was left behind") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_samples(path: Path, shards: Iterable[np.ndarray], labels: np.ndarray, sidecar: dict) -> str:
    """Write a sample set and its sidecar; returns the npz's sha256. The same content gives the same bytes.

    shards: uint8 (n, H, W, C) arrays in sample order, N = len(labels) images in all; one is held at a time.
    labels: integers (N,). sidecar: JSON-serialisable facts; `images`, `shape` and `sha256` are added to it.
    The sidecar is written last: a sample set is complete when its sidecar is there and names the npz's hash.
    """
    path = Path(path)
    labels = np.ascontiguousarray(labels, dtype="<i8")
    iterator = iter(shards)
    first = next(iterator, None)
    if labels.ndim != 1 or first is None:
        raise ValueError(f"labels must be (N,) with at least one image to write, got labels {labels.shape}")
    shape = (len(labels), *first.shape[1:])
    sidecar_path(path).unlink(missing_ok=True)  # it describes the file that is about to be replaced
    with _replacing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with _member(archive, "arr_0.npy") as out:
            np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": shape})
            written = 0
            for shard in _chain(first, iterator):
                if shard.dtype != np.uint8 or shard.ndim != 4 or shard.shape[1:] != shape[1:]:
                    raise ValueError(f"shard is {shard.dtype} {shard.shape}, expected uint8 (n, {shape[1:]})")
                out.write(np.ascontiguousarray(shard).data)
                written += len(shard)
            if written != len(labels):
                raise ValueError(f"{written} images came for {len(labels)} labels")
        with _member(archive, "arr_1.npy") as out:
            np.lib.format.write_array(out, labels, version=(1, 0), allow_pickle=False)
    digest = sha256_file(path)
    facts = {**sidecar, "images": shape[0], "shape": list(shape[1:]), "sha256": digest}
    with _replacing(sidecar_path(path)) as file:
        file.write((json.dumps(facts, indent=2, sort_keys=True) + "\n").encode())
    return digest


def _chain(first: np.ndarray, rest: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    yield first
    yield from rest


def _member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    # A fixed date, or the same samples would hash differently tomorrow.
    return archive.open(zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0)), "w", force_zip64=True)


def read_sidecar(path: Path) -> dict:
    """The facts beside the npz at `path`; UserError where there are none or they are not JSON."""
    side = sidecar_path(path)
    try:
        facts = json.loads(side.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{side} is missing: it says how {Path(path).name} was made") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{side} cannot be read as JSON: {error}") from error
    if not isinstance(facts, dict):
        raise UserError(f"{side} must hold one JSON object")
    return facts


def read_samples(path: Path, classes: int | None = None, minimum: int = 1) -> SampleSet:
    """Open a sample set and check it from end to end (every byte against the zip's checksums); nothing in it is
    executed.

    classes: labels must lie in 0 .. classes - 1; None: not checked. minimum: fewest images accepted.
    Raises UserError, in one line, for whatever is wrong with the file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; samples are read from an npz with arr_0 and, if there are labels, arr_1"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if "arr_0.npy" not in names:
                found = ", ".join(sorted(names)[:5]) or "nothing"
                raise UserError(f"{path}: no array arr_0 (found {found}); {WANTED}")
            images = _read_array(path, archive, "arr_0")
            labels = _read_array(path, archive, "arr_1") if "arr_1.npy" in names else None
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError, _Damaged) as error:
        if isinstance(error, RunError):
            raise
        hint = "" if zipfile.is_zipfile(path) else ": not an npz, or one that was cut off while it was written"
        raise UserError(f"{path} cannot be read ({error}){hint}; make it again") from error
    _check_images(path, images, minimum)
    return SampleSet(
        images=images, labels=_check_labels(path, labels, len(images), classes), sha256=sha256_file(path), path=path
    )


def read_first(path: Path, count: int) -> tuple[np.ndarray, np.ndarray | None]:
    """The first `count` images (uint8 (n, H, W, C)) and labels (int64 (n,), None without any) of a sample set, and no
    more of the file: 50,000 images are not read to show ten, and their checksum is not asked.

    Raises UserError, in one line, for whatever is wrong with what is read.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            images = _read_head(path, archive, "arr_0", count)
            labels = _read_head(path, archive, "arr_1", count) if "arr_1.npy" in archive.namelist() else None
    except (zipfile.BadZipFile, EOFError, OSError, KeyError, NotImplementedError, RuntimeError, _Damaged) as error:
        if isinstance(error, RunError):
            raise
        raise UserError(f"{path} cannot be read ({error}); make it again") from error
    _check_images(path, images, 1)
    return images, _check_labels(path, labels, len(images), None)


class _Damaged(Exception):
    """An array whose header and bytes do not agree."""


def _read_header(path: Path, member: IO[bytes], name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether the order is Fortran's, dtype); the member stands at its data afterwards."""
    try:
        version = np.lib.format.read_magic(member)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise _Damaged(f"{name} has npy version {version}")
        shape, fortran, dtype = readers[version](member)
    except ValueError as error:
        raise _Damaged(f"{name} is not an npy array: {str(error).splitlines()[0]}") from error
    if dtype.hasobject:
        raise UserError(f"{path}: {name} holds Python objects, which would have to be executed; {WANTED}")
    return shape, fortran, dtype


def _read_head(path: Path, archive: zipfile.ZipFile, name: str, count: int) -> np.ndarray:
    """The first `count` rows of an array."""
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as member:
        shape, fortran, dtype = _read_header(path, member, name)
        if not shape or (fortran and len(shape) > 1):
            raise _Damaged(f"{name} is no array of rows")
        row = int(np.prod(shape[1:], dtype=object)) * dtype.itemsize
        rows = min(shape[0], count)
        if rows * row > info.file_size:  # before anything of the stated size is allocated
            raise _Damaged(f"{name} says {dtype} {shape} but holds {info.file_size} bytes")
        data = member.read(rows * row)
    if len(data) != rows * row:
        raise _Damaged(f"{name} is cut off")
    return np.frombuffer(data, dtype=dtype).reshape(rows, *shape[1:])


def _read_array(path: Path, archive: zipfile.ZipFile, name: str) -> np.ndarray:
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as member:
        shape, fortran, dtype = _read_header(path, member, name)
        offset = member.tell()
        count = int(np.prod(shape, dtype=object)) if shape else 1
        if count * dtype.itemsize != info.file_size - offset:  # before anything of the stated size is allocated
            raise _Damaged(f"{name} says {dtype} {shape} but holds {info.file_size - offset} bytes")
        order = "F" if fortran else "C"
        if info.compress_type != zipfile.ZIP_STORED:
            data = member.read()  # raises where the checksum differs
            return np.frombuffer(data, dtype=dtype).reshape(shape, order=order)
        while member.read(CHUNK_BYTES):  # the checksum again, without holding the images
            pass
    if count == 0:
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "r", _data_offset(path, info) + offset, shape, order)


def _data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Where a stored member's bytes start: after its local header, whose extra field may differ from the
    directory's."""
    with path.open("rb") as file:
        file.seek(info.header_offset + 26)
        lengths = file.read(4)
    return info.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")


def _check_images(path: Path, images: np.ndarray, minimum: int) -> None:
    found = f"arr_0 is {images.dtype} {images.shape}"
    if images.dtype != np.uint8:
        if images.ndim and images.size and images.dtype.kind in "iuf":
            head = np.asarray(images[:64])
            found += f" with values in [{head.min():.4g}, {head.max():.4g}]"
        raise UserError(f"{path}: {found}; {WANTED}")
    if images.ndim != 4 or 0 in images.shape[1:] or images.shape[3] not in (1, 3):
        first = images.ndim == 4 and images.shape[1] in (1, 3)
        raise UserError(f"{path}: {found}{', channels first' if first else ''}; {WANTED}")
    if len(images) < minimum:
        raise UserError(f"{path}: {len(images)} images are fewer than the {minimum} needed; draw more samples")


def _check_labels(path: Path, labels: np.ndarray | None, n: int, classes: int | None) -> np.ndarray | None:
    if labels is None:
        return None
    if labels.dtype.kind not in "iu" or labels.shape != (n,):
        raise UserError(f"{path}: arr_1 is {labels.dtype} {labels.shape}; wanted one integer label an image, ({n},)")
    outside = np.zeros(n, dtype=bool) if classes is None else (labels < 0) | (labels >= classes)
    if outside.any():
        i = int(np.argmax(outside))
        raise UserError(f"{path}: label {labels[i]} of image {i} is outside the {classes} classes (0 to {classes - 1})")
    return np.array(labels, dtype=np.int64)
