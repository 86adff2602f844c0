"""Images in npz and npy: streamed from the zip, or mapped where they are stored as they are; checksums compared."""

from __future__ import annotations

import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from harness.errors import UserError
from harness.images.source import WANTED, WHOLE_BYTES, Damaged, ImageSource, hint, per_call, printable, readable
from harness.io.arrays import release_pages


class _Header(NamedTuple):
    dtype: np.dtype
    fortran: bool
    shape: tuple[int, ...]
    length: int  # bytes up to the data
    raw: bytes


# numpy evaluates this dictionary as Python; a pattern says no to the same things without evaluating anything
_ITEM = (
    r"\s*['\"](?:descr['\"]\s*:\s*['\"](?P<descr>[^'\"]{1,16})['\"]"
    r"|fortran_order['\"]\s*:\s*(?P<fortran>True|False)|shape['\"]\s*:\s*\((?P<shape>[0-9L,\s]*)\))\s*,?\s*"
)


def _read_header(stream, where: str) -> _Header:
    start = stream.read(8)
    if len(start) < 8 or start[:6] != b"\x93NUMPY" or start[6] not in (1, 2, 3):
        raise Damaged(f"{where} is not an npy array")
    field = stream.read(2 if start[6] == 1 else 4)
    size = int.from_bytes(field, "little")
    text = stream.read(size) if size <= 1 << 16 else b""
    if len(text) != size or size == 0:
        raise Damaged(f"{where} has a broken npy header")
    raw = start + field + text
    found: dict[str, str] = {}
    position, body = 0, text.decode("latin1").strip()
    inner = body[1:-1] if body[:1] == "{" and body[-1:] == "}" else ""
    while match := re.compile(_ITEM).match(inner, position):
        found |= {key: value for key, value in match.groupdict().items() if value is not None}
        position = match.end()
    if position != len(inner) or len(found) != 3:
        raise Damaged(f"{where} is not a plain npy array")
    dtype = np.dtype(found["descr"])
    if dtype.hasobject:
        raise UserError(f"{where} holds Python objects, which would have to be executed; {WANTED}")
    sizes = tuple(int(each.rstrip("L")) for each in found["shape"].replace(" ", "").split(",") if each)
    return _Header(dtype, found["fortran"] == "True", sizes, len(raw), raw)


def _check_array(where: str, header: _Header, payload: int, stream) -> None:
    """Refuse what is no image array; `payload` is the number of bytes behind the header, `stream` stands on them."""
    dtype, shape = header.dtype, header.shape
    count = 1
    for each in shape:
        count *= each
    if count * dtype.itemsize != payload:  # before anything of the stated size is asked for
        raise Damaged(f"{where} says {dtype} {shape} but holds {payload} bytes")
    if dtype == np.uint8 and len(shape) == 4 and 0 not in shape[1:] and shape[3] in (1, 3):
        if shape[0] == 0:
            raise UserError(f"{where}: there are no images")
        return
    head = None
    if dtype.kind in "iufb" and dtype.itemsize and count:
        head = np.frombuffer(stream.read(min(payload, 1 << 20) // dtype.itemsize * dtype.itemsize), dtype)
    raise UserError(f"{where} is {dtype} {shape}{hint(shape, head)}; {WANTED}")


def _streamed(stream, shape: tuple[int, ...], size: int) -> Iterator[np.ndarray]:
    """uint8 arrays from C-ordered bytes; `stream` stands on the first."""
    left, step = shape[0], per_call(shape, size)
    while left:
        n = min(step, left)
        data = stream.read(n * shape[1] * shape[2] * shape[3])
        yield np.frombuffer(data, np.uint8).reshape(n, *shape[1:])  # ValueError where bytes are missing
        left -= n
    if stream.read(1):  # a zip member's checksum is compared at its end
        raise Damaged("there are more bytes than images")


def _fortran(where: str, stream, header: _Header) -> np.ndarray:
    size = int(np.prod(header.shape, dtype=object))
    if size > WHOLE_BYTES:
        raise UserError(f"{where} is {size / 2**30:.1f} GiB in Fortran order; save np.ascontiguousarray of it")
    data = np.frombuffer(stream.read(size), np.uint8)
    if stream.read(1):
        raise Damaged("there are more bytes than images")
    return np.ascontiguousarray(data.reshape(header.shape, order="F"))


def open_npy(path: Path) -> ImageSource:
    with path.open("rb") as file:
        header = _read_header(file, str(path))
        _check_array(str(path), header, path.stat().st_size - header.length, file)
        whole = _fortran(str(path), file, header) if header.fortran else None
    mapped = np.memmap(path, np.uint8, "r", header.length, header.shape) if whole is None else whole
    return ImageSource(
        str(path),
        header.shape[1:],
        lambda size: (mapped[i : i + size] for i in range(0, len(mapped), size)),
        count=header.shape[0],
        mapped=mapped,
        notes=["an npy has no checksum: damaged pixels cannot be told"],
    )


def open_npz(path: Path) -> ImageSource:
    with zipfile.ZipFile(path) as archive:
        infos: dict[str, zipfile.ZipInfo] = {}
        for info in archive.infolist():
            if info.filename in infos:
                raise Damaged(f"it holds {info.filename} twice")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise UserError(
                    f"{path}: {printable(info.filename)} is neither stored nor deflated; save it with numpy"
                )
            with archive.open(info):  # compares the directory's name with the one beside the data
                infos[info.filename] = info
        names = [printable(name.removesuffix(".npy")) for name in infos]
        if "arr_0.npy" not in infos:
            if "mu" in names and "sigma" in names:
                raise UserError(
                    f"{path} holds statistics (mu, sigma) and no images (arr_0); it can only be a reference"
                )
            found = ", ".join(sorted(names)[:5]) or "nothing"
            raise UserError(f"{path}: no array arr_0 (found {found}); {WANTED}")
        info = infos["arr_0.npy"]
        where = f"{path}: arr_0"
        with archive.open(info) as member:
            header = _read_header(member, where)
            _check_array(where, header, info.file_size - header.length, member)
        whole = None
        if header.fortran:
            with archive.open(info) as member:
                member.read(header.length)
                whole = _fortran(where, member, header)
        labels = _read_labels(path, archive, infos.get("arr_1.npy"), header.shape[0])
    mapped = whole
    if whole is not None:
        chunks = lambda size: (whole[i : i + size] for i in range(0, len(whole), size))  # noqa: E731
    elif info.compress_type == zipfile.ZIP_STORED:
        stored = _Stored(path, info, header)
        mapped, chunks = stored.images, stored.chunks
    else:
        chunks = lambda size: _deflated(path, info.filename, header, size)  # noqa: E731
    return ImageSource(
        str(path),
        header.shape[1:],
        chunks,
        count=header.shape[0],
        labels=labels,
        extra_arrays=[name for name in names if name not in ("arr_0", "arr_1")],
        mapped=mapped,
    )


def _deflated(path: Path, name: str, header: _Header, size: int) -> Iterator[np.ndarray]:
    with readable(path), zipfile.ZipFile(path) as archive, archive.open(name) as member:
        member.read(header.length)
        yield from _streamed(member, header.shape, size)


class _Stored:
    """A member stored as it is: mapped, and compared with the zip's checksum in the first pass."""

    def __init__(self, path: Path, info: zipfile.ZipInfo, header: _Header):
        with path.open("rb") as file:
            file.seek(info.header_offset + 26)  # the local header's own lengths: they may differ from the directory's
            name, extra = struct.unpack("<HH", file.read(4))
        start = info.header_offset + 30 + name + extra + header.length
        if info.compress_size != info.file_size or start - header.length + info.file_size > path.stat().st_size:
            raise Damaged("its directory contradicts its content")
        self.images = np.memmap(path, np.uint8, "r", start, header.shape)
        self._path, self._info, self._raw, self._sound = path, info, header.raw, False

    def chunks(self, size: int) -> Iterator[np.ndarray]:
        crc, step = zlib.crc32(self._raw), per_call(self.images.shape, size)
        for i in range(0, len(self.images), step):
            chunk = self.images[i : i + step]
            if not self._sound:
                crc = zlib.crc32(chunk, crc)
            yield chunk
            release_pages(self.images)  # 50,000 images of 256x256 are 10 GB
        if not self._sound and crc != self._info.CRC:
            raise UserError(f"{self._path}: arr_0 differs from its checksum: damaged; make it again")
        self._sound = True


def _read_labels(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo | None, count: int) -> np.ndarray | None:
    if info is None:
        return None
    with archive.open(info) as member:
        header = _read_header(member, f"{path}: arr_1")
        dtype, shape = header.dtype, header.shape
        if dtype.kind not in "iu" or shape != (count,):
            raise UserError(f"{path}: arr_1 is {dtype} {shape}; wanted one integer label an image, ({count},)")
        if count * dtype.itemsize != info.file_size - header.length:
            raise Damaged(f"arr_1 says {dtype} {shape} but holds {info.file_size - header.length} bytes")
        return np.frombuffer(member.read(), dtype).astype(np.int64)
