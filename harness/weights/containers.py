"""Readers of weight files that run nothing in them: torch's two formats, and safetensors.

    torch.save since 1.6: a zip with <folder>/data.pkl and the bytes of each storage in <folder>/data/<key>
    torch.save before:    three small pickles, the object, the list of its storages, then their bytes
    safetensors:          the length of a JSON header, the header, the bytes

Formats: torch 2.13 torch/serialization.py (_load, _legacy_load); safetensors 0.8. Pickles are read by
`harness.weights.pickles`: no class or function that a file names is ever imported.
"""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from harness.errors import UserError
from harness.io.text import check_plain
from harness.weights import pickles
from harness.weights.objects import (
    CONSTRUCTORS,
    StorageKey,
    escaped,
    foreign_symbols,
    module_tensors,
    resolve_tensors,
    storage_of,
)
from harness.weights.pickles import Malformed, Unsuitable
from harness.weights.tensors import DTYPES, MAX_AXES, Storage, Stored, raw_dtype

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C  # value of the first pickle of torch's older format
PROTOCOL_VERSION = 1001  # value of the second
# Limits of the bytes that describe tensors, about 100 times what 1000 tensors need; the objects made of them take up to
# 20 times as much memory.
LONGEST_PICKLE = 1 << 24  # 1000 tensors: 150 kB
LONGEST_DIRECTORY = 1 << 24  # of a zip file; 1000 tensors: 80 kB
LONGEST_HEADER = 1 << 24  # 1000 tensors: 130 kB; safetensors itself allows 100 MB


@dataclass(frozen=True, kw_only=True)
class FileContents:
    """The contents of a weight file.

    value: the saved object, of plain data. Its tensors are `Stored`; objects of other classes and results of other
    functions are placeholders (`pickles.Call`).
    """

    path: Path
    container: str  # "torch zip", "TorchScript", "torch legacy" or "safetensors"
    value: Any
    symbols: tuple[str, ...] = ()  # classes and functions that the file names, other than those of tensors
    metadata: dict[str, str] = field(default_factory=dict)  # of safetensors


def open_file(path: Path) -> FileContents:
    """The contents of a weight file; UserError for other files, damaged ones, and formats that would run code."""
    check_plain(path, "weights")
    try:
        with path.open("rb") as file:
            head = file.read(512)
            file.seek(0)
            if head[:4] == b"PK\x03\x04":  # zip
                return _open_zip(path, file)
            if head[257:262] == b"ustar":
                raise UserError(
                    f"{path} is in torch's tar format of before 2017, which is not supported; save it again"
                )
            if len(head) > 8 and head[8:9] == b"{":  # JSON after the 8 bytes of its length
                return _open_safetensors(path, file)
            if head[:1] == b"\x80":  # opcode PROTO, with which a pickle begins
                return _open_legacy(path, file)
            raise UserError(f"{path} {_reason_not_weights(head)}")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except Unsuitable as error:
        raise UserError(f"{path} {escaped(str(error))}") from error
    except (Malformed, RecursionError) as error:
        raise UserError(f"{path} is damaged or no weight file: {escaped(str(error))}") from error


def _reason_not_weights(head: bytes) -> str:
    """What a file without weights is, and what to do about it: a message that continues the file's name.

    head: the first bytes of the file.
    """
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the weights; fetch the file itself (git lfs pull)"
    if head.lstrip()[:1] == b"<":
        return "is a web page, not weights; fetch the file again"
    if not head:
        return "is empty; fetch it again"
    return "is neither a torch file nor a safetensors file; fetch it again, or name another"


# The three formats ------------------------------------------------------------------------------------------------


class _LimitedReads:
    """A file in which one read of more than LONGEST_DIRECTORY bytes raises `Unsuitable`.

    `zipfile` reads the whole directory (the list of members) in one call, so a directory that would fill the memory is
    refused before it is read.
    """

    def __init__(self, file: IO[bytes]):
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, count: int = -1) -> bytes:
        # Without a count, zipfile reads only the end record: at most the last 64 kB of the file.
        if count > LONGEST_DIRECTORY:
            raise Unsuitable("is a zip file of more members than weights have; save the state dict alone")
        return self.file.read(count)


def _open_zip(path: Path, file: IO[bytes]) -> FileContents:
    """torch.save since 1.6, or a TorchScript archive, of which only the tensors are read. UserError for other zip files."""
    try:
        with zipfile.ZipFile(_LimitedReads(file)) as archive:
            listed = archive.infolist()
            members = {info.filename: info for info in listed}
    except Unsuitable:  # of _LimitedReads; it is a ValueError, which the next clause would catch
        raise
    except (
        zipfile.BadZipFile, struct.error, EOFError, ValueError, KeyError, IndexError, NotImplementedError,
        RuntimeError, OverflowError, MemoryError,
    ) as error:  # fmt: skip
        raise UserError(f"{path} is damaged or cut short ({escaped(str(error))}); fetch it again") from error
    pickled = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    is_script = any(name.endswith("/constants.pkl") or "/code/" in name for name in members)
    if len(pickled) != 1:
        raise UserError(f"{path} is a zip file, but not one of torch.save; name the file inside it")
    if len(listed) != len(members):
        raise Malformed("two of its members have one name")
    # Tensors are read straight from their bytes in the file, so nothing may be compressed.
    folder = pickled[0].removesuffix("data.pkl")
    if is_script:  # its program, which is compressed, is not read
        members = {
            name: info
            for name, info in members.items()
            if name in (pickled[0], f"{folder}byteorder") or name.startswith(f"{folder}data/")
        }
    if any(
        info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size for info in members.values()
    ):
        raise UserError(f"{path} was compressed after it was saved; unpack it and save it with torch.save again")
    stored = _storages(path, file, members)
    big_endian = f"{folder}byteorder" in stored and _read_small(file, stored[f"{folder}byteorder"], 16) != b"little"
    program = io.BytesIO(_read_small(file, stored[pickled[0]], LONGEST_PICKLE))
    data = f"{folder}data/"
    storages = {name.removeprefix(data): storage for name, storage in stored.items() if name.startswith(data)}
    budget = pickles.Budget()
    seen: set[str] = set()  # keys of storages for which the budget was raised

    def persistent(identifier: object) -> StorageKey:
        storage = storage_of(identifier)
        if storage.key in storages and storage.key not in seen:  # a storage that the file really has
            seen.add(storage.key)
            budget.grant(pickles.UNITS_A_STORAGE)
        return storage

    reading = pickles.read(program, CONSTRUCTORS, persistent, budget)
    value = module_tensors(reading.value) if is_script else reading.value
    return FileContents(
        path=path,
        container="TorchScript" if is_script else "torch zip",
        value=resolve_tensors(value, path, storages, big_endian),
        symbols=foreign_symbols(reading.symbols),
    )


def _storages(path: Path, file: IO[bytes], members: Mapping[str, zipfile.ZipInfo]) -> dict[str, Storage]:
    """Where the bytes of each member of a zip are, by the member's name.

    `Malformed` where two members overlap or one reaches beyond the file.
    """
    storages, size, end = {}, path.stat().st_size, 0
    for name, info in sorted(members.items(), key=lambda item: item[1].header_offset):
        if not end <= info.header_offset < size:
            raise Malformed(f"member {name} is not where the directory says")
        file.seek(info.header_offset)
        # The header before a member's bytes: 30 bytes, of which the last four are the lengths of the two fields that
        # follow it (name and extra).
        header = file.read(30)
        if header[:4] != b"PK\x03\x04" or len(header) < 30:
            raise Malformed(f"member {name} is not where the directory says")
        start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        end = start + info.file_size
        if end > size:
            raise Malformed(f"member {name} reaches beyond the file")
        storages[name] = Storage(start, info.file_size, info.CRC)
    return storages


def _read_small(file: IO[bytes], storage: Storage, limit: int) -> bytes:
    """The content of a member of a zip, compared with its checksum; `Unsuitable` above `limit` bytes."""
    if storage.nbytes > limit:
        raise Unsuitable(
            f"asks for more than weights need ({storage.nbytes:,} bytes to describe its tensors, where {limit:,} are"
            " enough) and is not read; save the state dict alone"
        )
    file.seek(storage.start)
    content = file.read(storage.nbytes)
    if zlib.crc32(content) != storage.crc:
        raise Malformed("its description of the tensors does not match its checksum")
    return content


def _open_legacy(path: Path, file: IO[bytes]) -> FileContents:
    """torch.save before 1.6. UserError for pickles that torch.save did not write."""
    budget = pickles.Budget()  # shared by the five pickles

    def read_next(
        constructors: pickles.Constructors, persistent: Callable[[Any], Any] | None = None
    ) -> pickles.Reading:
        """Read the pickle at the position of `file`, of at most LONGEST_PICKLE bytes, and move behind it."""
        begin = file.tell()
        stream = io.BytesIO(file.read(LONGEST_PICKLE))
        reading = pickles.read(stream, constructors, persistent, budget)
        file.seek(begin + stream.tell())
        return reading

    # The five pickles in their order: magic number, version, system, object, keys of storages.
    try:
        magic = read_next({}).value
    except Unsuitable:  # a kind of Malformed, whose own message is wanted
        raise
    except Malformed:  # a pickle of something else, which the next lines refuse
        magic = None
    if type(magic) is not int or magic != MAGIC_NUMBER:
        raise UserError(f"{path} is a pickle, but not one of torch.save; such files hold programs and are not read")
    if read_next({}).value != PROTOCOL_VERSION:
        raise Malformed("an unknown version of torch's older format")
    system = read_next({}).value
    big_endian = isinstance(system, dict) and system.get("little_endian") is False
    storages: dict[str, StorageKey] = {}

    def persistent(identifier: object) -> Any:
        if isinstance(identifier, tuple) and identifier and identifier[0] == "module":
            # ("module", class, source file, source code): the class of a pickled network, as a Symbol
            return identifier[1] if len(identifier) > 1 else None
        storage = storage_of(identifier)
        storages.setdefault(storage.key, storage)
        return storage

    reading = read_next(CONSTRUCTORS, persistent)
    keys = read_next({}).value
    if not isinstance(keys, list) or not all(isinstance(key, str) and key in storages for key in keys):
        raise Malformed("its list of storages names one that no tensor has")
    size = path.stat().st_size
    by_key = {}  # where the bytes of each storage are
    for key in keys:  # for each storage the file has the number of its elements, then the elements
        count = file.read(8)
        nbytes = storages[key].count * raw_dtype(storages[key].dtype).itemsize
        if len(count) < 8 or file.tell() + nbytes > size:
            raise UserError(f"{path} is cut short: it ends within its tensors; fetch it again")
        if struct.unpack("<q", count)[0] != storages[key].count:
            raise Malformed(f"storage {key} is not of the size that its tensors have")
        by_key[key] = Storage(file.tell(), nbytes)
        file.seek(nbytes, io.SEEK_CUR)
    value = resolve_tensors(reading.value, path, by_key, big_endian)
    return FileContents(path=path, container="torch legacy", value=value, symbols=foreign_symbols(reading.symbols))


def _open_safetensors(path: Path, file: IO[bytes]) -> FileContents:
    """A safetensors file; UserError where header, shapes and offsets contradict each other or the file's size."""
    size = path.stat().st_size
    (length,) = struct.unpack("<Q", file.read(8))
    if 8 + length > size:
        raise UserError(f"{path} is damaged or cut short: its header is longer than the file; fetch it again")
    if length > LONGEST_HEADER:
        raise Unsuitable(f"asks for more than weights need (a header of {length:,} bytes) and is not read")
    try:
        header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        tensors, end = {}, 0  # end: of the tensor before; each tensor must begin there
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, stop = entry["data_offsets"]
            if len(entry["shape"]) > MAX_AXES:
                raise Malformed(f"{name} has more than {MAX_AXES} axes")
            shape = tuple(entry["shape"])
            if entry["dtype"] not in DTYPES:
                raise Malformed(f"{name} is of the dtype {entry['dtype']}, which is not supported")
            if not all(type(n) is int and 0 <= n < 2**48 for n in (begin, stop, *shape)) or begin != end:
                raise Malformed(f"{name} has an impossible offset or shape")
            tensor = Stored(file=path, dtype=entry["dtype"], shape=shape, start=8 + length + begin)
            if stop - begin != tensor.nbytes:
                raise Malformed(f"{name} is not of the size of its shape")
            tensors[name], end = tensor, stop
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is a damaged safetensors file: {escaped(str(error))}") from error
    if 8 + length + end != size:
        what = "cut short" if 8 + length + end > size else "longer than its header says"
        raise UserError(f"{path} is damaged: it is {what}; fetch it again")
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UserError(f"{path} is a damaged safetensors file: its metadata is not text")
    ordered = {name: tensors[name] for name in header}  # the order of the header, not that of the bytes
    return FileContents(path=path, container="safetensors", value=ordered, metadata=metadata)
