"""Arrays and images in npz and npy files: the one reader of npz, which trusts nothing that a file says.

Headers are parsed without evaluating them and Python objects are refused, so nothing in a file is executed; sizes are
compared with the zip's directory before memory is asked for, and every array that is read to its end is compared with
its checksum. Images are streamed from the zip, or mapped where they are stored uncompressed.

Layout of sample sets and references (openai/guided-diffusion, evaluations/README.md): arr_0 uint8 (N, H, W, C), arr_1
integers (N,).
"""

from __future__ import annotations

import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from harness.errors import UserError
from harness.images.source import (
    WANTED,
    WHOLE_BYTES,
    Damaged,
    ImageSource,
    images_per_chunk,
    mistake_hint,
    printable,
    readable,
    slices,
)  # fmt: skip
from harness.io.arrays import release_pages

HEAD_BYTES = 1 << 20  # read of an array that is refused, to tell its range of values in the message
NO_CHECKSUM = "an npy has no checksum: damaged pixels cannot be detected"


class Header(NamedTuple):
    """The header of an npy. fortran: whether the array is in Fortran order. raw: bytes of the npy before the array."""

    dtype: np.dtype
    fortran: bool
    shape: tuple[int, ...]
    raw: bytes

    @property
    def nbytes(self) -> int:
        """Bytes of the array, by its header."""
        count = 1
        for side in self.shape:  # Python's integers: a header may name sizes beyond 64 bits
            count *= side
        return count * self.dtype.itemsize


# numpy evaluates this dictionary as Python; the pattern accepts the same headers without evaluating anything
_ITEM = re.compile(
    r"\s*['\"](?:descr['\"]\s*:\s*['\"](?P<descr>[^'\"]{1,16})['\"]"
    r"|fortran_order['\"]\s*:\s*(?P<fortran>True|False)|shape['\"]\s*:\s*\((?P<shape>[0-9L,\s]*)\))\s*,?\s*"
)


def _read_header(stream: IO[bytes], name: str) -> Header:
    """Read the header of the npy that begins at the position of `stream`, and leave `stream` at the array's first byte.

    name: used in messages.
    """
    start = stream.read(8)  # six bytes that every npy begins with, then the major and minor version of the format
    if len(start) < 8 or start[:6] != b"\x93NUMPY" or start[6] not in (1, 2, 3):
        raise Damaged(f"{name} is not an npy array")
    field = stream.read(2 if start[6] == 1 else 4)
    size = int.from_bytes(field, "little")
    text = stream.read(size) if size <= 1 << 16 else b""  # a longer header is not read, and is broken as well
    if len(text) != size or size == 0:
        raise Damaged(f"{name} has a broken npy header")
    fields: dict[str, str] = {}  # descr, fortran and shape as text
    position, body = 0, text.decode("latin1").strip()
    inner = body[1:-1] if body[:1] == "{" and body[-1:] == "}" else ""
    while match := _ITEM.match(inner, position):
        fields |= {key: value for key, value in match.groupdict().items() if value is not None}
        position = match.end()
    if position != len(inner) or len(fields) != 3:
        raise Damaged(f"{name} is not a plain npy array")
    dtype = np.dtype(fields["descr"])
    if dtype.hasobject:
        raise UserError(f"{name} holds Python objects, which would have to be executed; {WANTED}")
    shape = tuple(int(side.rstrip("L")) for side in fields["shape"].replace(" ", "").split(",") if side)
    return Header(dtype, fields["fortran"] == "True", shape, start + field + text)


class NpzFile:
    """An open npz: its arrays by name. Made by `open_npz_file`.

    Refused when it is opened: two members of one name, and compression that numpy does not write.
    """

    def __init__(self, path: Path, archive: zipfile.ZipFile):
        self.path, self._archive = path, archive
        self._infos: dict[str, zipfile.ZipInfo] = {}
        for info in archive.infolist():
            if info.filename in self._infos:
                raise Damaged(f"it holds {printable(info.filename)} twice")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise UserError(
                    f"{path}: {printable(info.filename)} is neither stored nor deflated; save it with numpy"
                )
            with archive.open(info):  # compares the name in the directory with the one beside the data
                self._infos[info.filename] = info

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the arrays as the file gives them; apply `printable` before one is shown in a message."""
        return tuple(name.removesuffix(".npy") for name in self._infos)

    def info(self, name: str) -> zipfile.ZipInfo:
        """The zip member of the array `name`; KeyError where there is none."""
        return self._infos[f"{name}.npy"]

    def header(self, name: str) -> Header:
        """The header of the array `name`; `Damaged` where it contradicts the member's size."""
        info = self.info(name)
        with self._archive.open(info) as member:
            header = _read_header(member, f"{self.path}: {name}")
        _check_size(name, header, info.file_size)
        return header

    def read(self, name: str, rows: int | None = None) -> np.ndarray:
        """The array `name`, read into memory and compared with its checksum.

        rows: number of first rows to read instead of all; then the checksum is not compared, and Fortran order is refused.
        """
        header = self.header(name)
        if rows is not None and (not header.shape or (header.fortran and len(header.shape) > 1)):
            raise Damaged(f"{name} is no array of rows")
        shape, nbytes = header.shape, header.nbytes
        if rows is not None and shape[0] > rows:
            shape, nbytes = (rows, *shape[1:]), nbytes // shape[0] * rows
        with self.stream(name, header) as member:
            data = member.read() if rows is None else member.read(nbytes)  # at its end zipfile compares the checksum
        if len(data) != nbytes:
            raise Damaged(f"{name} is cut off")
        return np.frombuffer(data, header.dtype).reshape(shape, order="F" if header.fortran else "C")

    @contextmanager
    def stream(self, name: str, header: Header) -> Iterator[IO[bytes]]:
        """The bytes of the array `name`, without its header. header: as `self.header` returns it."""
        with self._archive.open(self.info(name)) as member:
            member.read(len(header.raw))
            yield member

    def damaged_member(self) -> str | None:
        """The first member that differs from its checksum; every byte is read. None: all are sound."""
        return self._archive.testzip()


@contextmanager
def open_npz_file(path: Path) -> Iterator[NpzFile]:
    """The npz at `path`, opened; UserError where it cannot be read, also within the block."""
    with readable(path):
        if not zipfile.is_zipfile(path):
            # is_zipfile is False also for a file that does not exist or cannot be opened. `open` then raises an OSError
            # that says so, and `readable` reports it instead of the next line.
            with path.open("rb"):
                raise Damaged("it is not an npz")
        with zipfile.ZipFile(path) as archive:
            yield NpzFile(path, archive)


def open_npz(path: Path, *, any_arr_1: bool = False) -> ImageSource:
    """The images of an npz and their labels, if there are any. UserError for statistics alone and for other arrays.

    any_arr_1: an arr_1 that holds no labels is left out with a note, not refused: ADM's evaluator reads arr_0 alone.
    """
    notes = []
    with open_npz_file(path) as file:
        header, shape = _image_header(file)
        info, labels = file.info("arr_0"), None
        try:
            labels = _read_labels(file, shape[0])
        except UserError as error:
            if not any_arr_1:
                raise
            notes.append(f"{error}; its images have no labels")
        extra = [printable(name) for name in file.names if name not in ("arr_0", "arr_1")]
        images: np.ndarray | None = None
        chunks: Callable[[int], Iterator[np.ndarray]] = partial(_deflated_chunks, path, header, shape)
        if header.fortran:
            with file.stream("arr_0", header) as member:
                images = _from_fortran(f"{path}: arr_0", member, header)
            chunks = slices(images)
        elif info.compress_type == zipfile.ZIP_STORED:
            stored = _StoredImages(path, info, header, shape)
            images, chunks = stored.images, stored.chunks
    return ImageSource(
        str(path), shape[1:], chunks, count=shape[0], labels=labels, extra_arrays=extra, mapped=images, notes=notes
    )


def holds_statistics_alone(path: Path) -> bool:
    """Whether the file at `path` is an npz of statistics (mu, sigma) without images (arr_0)."""
    if path.suffix.lower() != ".npz" or not path.is_file():
        return False
    with open_npz_file(path) as file:
        return {"mu", "sigma"} <= set(file.names) and "arr_0" not in file.names


def open_npy(path: Path) -> ImageSource:
    """The images of an npy, mapped; it holds neither labels nor a checksum."""
    with path.open("rb") as file:
        header = _read_header(file, str(path))
        _check_size(str(path), header, path.stat().st_size)
        shape = _check_images(str(path), header, file)
        whole = _from_fortran(str(path), file, header) if header.fortran else None
    images = np.memmap(path, np.uint8, "r", len(header.raw), shape) if whole is None else whole
    return ImageSource(str(path), shape[1:], slices(images), count=shape[0], mapped=images, notes=[NO_CHECKSUM])


def read_npz(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """All images of an npz, uint8 (N, H, W, C), and their labels, int64 (N,) or None; every byte is checked.

    The images are read-only; they are mapped where they are stored uncompressed in C order.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; wanted an npz with arr_0 and, if there are labels, arr_1")
    with open_npz_file(path) as file:
        header, shape = _image_header(file)
        info = file.info("arr_0")
        labels = _read_labels(file, shape[0])
        if header.fortran or info.compress_type != zipfile.ZIP_STORED:
            return file.read("arr_0"), labels
        stored = _StoredImages(path, info, header, shape)
        for _ in stored.chunks(shape[0]):  # a complete pass compares the checksum
            pass
        return stored.images, labels


def read_npz_head(path: Path, count: int) -> tuple[np.ndarray, np.ndarray | None]:
    """The first `count` images of an npz, uint8 (n, H, W, C), and their labels, int64 (n,) or None.

    The other images are not read, so that ten of 50,000 can be shown at once; the images' checksum is not compared.
    """
    with open_npz_file(path) as file:
        _, shape = _image_header(file)
        labels = _read_labels(file, shape[0])
        return file.read("arr_0", count), None if labels is None else labels[:count]


def _check_size(name: str, header: Header, size: int) -> None:
    """Refuse an array whose bytes are not those that its header states, before memory is asked for."""
    if header.nbytes != size - len(header.raw):
        raise Damaged(f"{name} says {header.dtype} {header.shape} but holds {size - len(header.raw)} bytes")


def _image_header(file: NpzFile) -> tuple[Header, tuple[int, int, int, int]]:
    """The header of arr_0 and its shape (N, H, W, C)."""
    if "arr_0" not in file.names:
        names = [printable(name) for name in file.names]
        if "mu" in names and "sigma" in names:
            raise UserError(
                f"{file.path} holds statistics (mu, sigma) and no images (arr_0); it can only be a reference"
            )
        found = ", ".join(sorted(names)[:5]) or "nothing"
        raise UserError(f"{file.path}: no array arr_0 (found {found}); {WANTED}")
    header = file.header("arr_0")
    with file.stream("arr_0", header) as member:
        return header, _check_images(f"{file.path}: arr_0", header, member)


def _check_images(name: str, header: Header, stream: IO[bytes]) -> tuple[int, int, int, int]:
    """The shape (N, H, W, C) of an array of images; others are refused. `stream` stands on the array's first byte."""
    dtype, shape = header.dtype, header.shape
    if dtype == np.uint8 and len(shape) == 4 and 0 not in shape[1:] and shape[3] in (1, 3):
        if shape[0] == 0:
            raise UserError(f"{name}: there are no images")
        return (shape[0], shape[1], shape[2], shape[3])
    head = None
    if dtype.kind in "iufb" and dtype.itemsize and header.nbytes:
        # some of the values, for a hint in the message
        head = np.frombuffer(stream.read(min(header.nbytes, HEAD_BYTES) // dtype.itemsize * dtype.itemsize), dtype)
    raise UserError(f"{name} is {dtype} {shape}{mistake_hint(shape, head)}; {WANTED}")


def _read_labels(file: NpzFile, count: int) -> np.ndarray | None:
    """arr_1 as int64 (N,); None where there is none."""
    if "arr_1" not in file.names:
        return None
    header = file.header("arr_1")
    if header.dtype.kind not in "iu" or header.shape != (count,):
        raise UserError(
            f"{file.path}: arr_1 is {header.dtype} {header.shape}; wanted one integer label per image, ({count},)"
        )
    return file.read("arr_1").astype(np.int64)


def _read_batches(stream: IO[bytes], shape: tuple[int, int, int, int], size: int) -> Iterator[np.ndarray]:
    """Yields uint8 (n, H, W, C) of at most `size` images, read from `stream`, which stands on the first image.

    shape: (N, H, W, C). `Damaged` where more bytes follow.
    """
    left, step = shape[0], images_per_chunk(shape[1:], size)  # left: images that are not read yet
    while left:
        n = min(step, left)
        data = stream.read(n * shape[1] * shape[2] * shape[3])
        yield np.frombuffer(data, np.uint8).reshape(n, *shape[1:])  # ValueError where bytes are missing
        left -= n
    if stream.read(1):  # at the member's end zipfile compares its checksum
        raise Damaged("there are more bytes than images")


def _deflated_chunks(path: Path, header: Header, shape: tuple[int, int, int, int], size: int) -> Iterator[np.ndarray]:
    """`ImageSource.chunks` of images that are stored compressed."""
    with open_npz_file(path) as file, file.stream("arr_0", header) as member:
        yield from _read_batches(member, shape, size)


def _from_fortran(name: str, stream: IO[bytes], header: Header) -> np.ndarray:
    """A uint8 array in Fortran order, read into memory and copied to C order; UserError above WHOLE_BYTES."""
    if header.nbytes > WHOLE_BYTES:
        raise UserError(f"{name} is {header.nbytes / 2**30:.1f} GiB in Fortran order; save np.ascontiguousarray of it")
    data = np.frombuffer(stream.read(header.nbytes), np.uint8)
    if stream.read(1):  # at a member's end zipfile compares its checksum
        raise Damaged("there are more bytes than images")
    return np.ascontiguousarray(data.reshape(header.shape, order="F"))


class _StoredImages:
    """Images stored uncompressed: mapped, and compared with the zip's checksum in the first pass over `chunks`."""

    def __init__(self, path: Path, info: zipfile.ZipInfo, header: Header, shape: tuple[int, int, int, int]):
        with path.open("rb") as file:
            # lengths of name and extra field in the local header, which may differ from those in the zip's directory
            file.seek(info.header_offset + 26)
            name_bytes, extra_bytes = struct.unpack("<HH", file.read(4))
        start = info.header_offset + 30 + name_bytes + extra_bytes
        if info.compress_size != info.file_size or start + info.file_size > path.stat().st_size:
            raise Damaged("its directory contradicts its content")
        self.images = np.memmap(path, np.uint8, "r", start + len(header.raw), shape)
        self._path, self._info, self._raw = path, info, header.raw
        self._sound = False  # whether a pass has compared the checksum

    def chunks(self, size: int) -> Iterator[np.ndarray]:
        """Yields uint8 (n, H, W, C), views of the map; UserError after the last one where the checksum differs."""
        crc = zlib.crc32(self._raw)  # the zip's checksum covers the npy's header, too
        step = images_per_chunk(self.images.shape[1:], size)
        for i in range(0, len(self.images), step):
            chunk = self.images[i : i + step]
            if not self._sound:
                crc = zlib.crc32(chunk.data, crc)
            yield chunk
            release_pages(self.images)  # otherwise 50,000 images of 256x256 would count as 10 GB of memory in use
        if not self._sound and crc != self._info.CRC:
            raise UserError(f"{self._path}: arr_0 differs from its checksum: damaged; make it again")
        self._sound = True
