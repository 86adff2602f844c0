"""The files that weights come in, opened without running anything in them: torch's two formats, and safetensors.

    torch.save since 1.6: a zip with <folder>/data.pkl and the bytes of each storage in <folder>/data/<key>
    torch.save before:    three small pickles, the object, the list of its storages, then their bytes
    safetensors:          the length of a JSON header, the header, the bytes

Format facts: torch 2.13 torch/serialization.py (_load, _legacy_load); safetensors 0.8. Pickles are read by
`harness.weights.pickles`: no class or function that a file names is ever imported.
"""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import IO, Any

from harness.errors import Refusal
from harness.weights import pickles
from harness.weights.pickles import Call, Malformed, Symbol
from harness.weights.tensors import BY_TORCH_NAME, DTYPES, Stored, raw_dtype

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C  # first pickle of torch's older format
PROTOCOL_VERSION = 1001  # and the second
LONGEST_PICKLE = 1 << 28  # bytes; that of 1000 tensors is 150 kB
LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit

_STORAGE_TYPES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "UntypedStorage": "U8",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A file's contents: `value` is its object with `Stored` tensors in it, plain data, and placeholders."""

    path: Path
    container: str  # "torch zip", "torch legacy" or "safetensors"
    value: Any
    symbols: tuple[str, ...] = ()  # classes and functions that it names beyond those that tensors need
    metadata: dict[str, str] = field(default_factory=dict)  # of safetensors


@dataclass(frozen=True)
class _Storage:
    """A run of elements in the file; `start` and `crc` are known later in the older format."""

    dtype: str
    key: str
    count: int
    first: int = 0  # element, for a view of a storage


class _Pending:
    """A tensor whose storage is known by key, until the places of the storages are known."""

    def __init__(self, storage: _Storage, dtype: str, offset: int, shape: tuple, strides: tuple):
        self.storage, self.dtype, self.offset, self.shape, self.strides = storage, dtype, offset, shape, strides


def open_file(path: Path) -> Opened:
    """The contents of a weight file. What is none, is damaged, or has a format that runs code is refused."""
    try:
        with path.open("rb") as file:
            head = file.read(512)
            file.seek(0)
            if head[:4] == b"PK\x03\x04":
                return _open_zip(path, file)
            if head[257:262] == b"ustar":
                raise Refusal(f"{path} is in torch's tar format of before 2017, which is not read; save it anew")
            if len(head) > 8 and head[8:9] == b"{":
                return _open_safetensors(path, file)
            if head[:1] == b"\x80":
                return _open_legacy(path, file)
            raise Refusal(f"{path} {_nature(head)}")
    except OSError as error:
        raise Refusal(f"{path}: {error.strerror or error}") from error
    except (Malformed, RecursionError) as error:
        raise Refusal(f"{path} is damaged or no weight file: {printable(str(error))}") from error


def printable(text: str) -> str:
    """A name out of a file with whatever could steer a terminal written out."""
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def _nature(head: bytes) -> str:
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the weights; fetch the file itself (git lfs pull)"
    if head.lstrip()[:1] == b"<":
        return "is a web page, not weights; fetch the file again"
    if not head:
        return "is empty; fetch it again"
    return "is neither a torch file nor a safetensors file; fetch it again, or name another"


# Calls that weight files are made of ------------------------------------------------------------------------------


def _ordered(*arguments: Any) -> dict[Any, Any]:
    return dict(arguments[0]) if arguments else {}


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any, dtype: str | None = None) -> _Pending:
    if not isinstance(storage, _Storage):
        raise Malformed("a tensor without a storage")
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or not all(type(n) is int and 0 <= n < 2**48 for n in numbers):
        raise Malformed("a tensor of an impossible shape")
    return _Pending(storage, dtype or storage.dtype, offset, tuple(shape), tuple(strides))


def _tensor_v3(storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any):
    name = BY_TORCH_NAME.get(dtype.name) if isinstance(dtype, Symbol) and dtype.module == "torch" else None
    if name is None:
        raise Malformed("a tensor of an unknown dtype")
    return _tensor(storage, offset, shape, strides, dtype=name)


def _typed(function: Any, kind: Any, arguments: Any, *_: Any) -> Any:
    """A tensor of a subclass, or with attributes: the tensor alone."""
    if isinstance(function, Symbol) and function.full in _CONSTRUCTORS and function.full != _TYPED:
        return _CONSTRUCTORS[function.full](*arguments)
    return Call(function, (kind, arguments))


def _encoded(text: Any, *_: Any) -> Any:
    return text.encode("latin-1") if isinstance(text, str) else text  # how protocol 2 writes bytes


_TYPED = "torch._tensor._rebuild_from_type_v2"
_CONSTRUCTORS: dict[str, Any] = {
    "collections.OrderedDict": _ordered,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    _TYPED: _typed,
    "torch.Size": lambda *shape: tuple(shape[0]) if shape else (),
    "_codecs.encode": _encoded,
}
_NEEDED = {
    *_CONSTRUCTORS,
    "torch.Tensor",
    "torch.nn.parameter.Parameter",
    "torch.device",
    "torch.storage.UntypedStorage",
}


def _foreign(symbols: dict[str, Symbol]) -> tuple[str, ...]:
    """Of the names in a file those that are not needed for tensors."""
    dtypes = {f"torch.{name}" for name in BY_TORCH_NAME}
    return tuple(
        printable(full)
        for full, symbol in symbols.items()
        if full not in _NEEDED
        and full not in dtypes
        and not (symbol.module in ("torch", "torch.cuda", "torch.storage") and symbol.name in _STORAGE_TYPES)
    )


def _storage(identifier: Any) -> _Storage:
    """The storage of a persistent identifier: ("storage", type, key, device, elements[, view])."""
    if not isinstance(identifier, tuple) or len(identifier) < 5 or identifier[0] != "storage":
        raise Malformed("it refers to something other than tensors")
    _, kind, key, _, count, *view = identifier
    dtype = _STORAGE_TYPES.get(kind.name) if isinstance(kind, Symbol) else None
    if dtype is None:
        raise Malformed(
            f"a tensor of the type {kind.name if isinstance(kind, Symbol) else type(kind).__name__}, which is not supported"
        )
    if type(count) is not int or not 0 <= count < 2**48 or not isinstance(key, str):
        raise Malformed("a storage of an impossible size")
    if view and view[0] is not None:
        _, first, count_seen = view[0]
        if not (type(first) is type(count_seen) is int and first >= 0 and 0 <= count_seen <= count - first):
            raise Malformed("a view beyond its storage")
        return _Storage(dtype, key, count, first)
    return _Storage(dtype, key, count)


class _Place:
    """Where the bytes of a storage lie."""

    def __init__(self, start: int, nbytes: int, crc: int | None = None):
        self.start, self.nbytes, self.crc = start, nbytes, crc


def _settled(value: Any, path: Path, places: dict[str, _Place], swapped: bool) -> Any:
    """`value` with its pending tensors in place: in dictionaries and lists, however they are nested."""
    made: dict[int, Any] = {}  # by identity: a file may hold one object twice, and itself
    waiting = [value] if isinstance(value, (dict, list)) else []

    def settle(item: Any) -> Any:
        if isinstance(item, _Pending):
            return _place(item, path, places, swapped)
        if isinstance(item, (dict, list)) and id(item) not in made:
            made[id(item)] = item
            waiting.append(item)
        return item

    while waiting:
        holder = waiting.pop()
        for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
            holder[key] = settle(holder[key])
    return settle(value)


def _place(tensor: _Pending, path: Path, places: dict[str, _Place], swapped: bool) -> Stored:
    place = places.get(tensor.storage.key)
    if place is None:
        raise Malformed(f"the bytes of storage {tensor.storage.key} are missing")
    width, own = raw_dtype(tensor.dtype).itemsize, raw_dtype(tensor.storage.dtype).itemsize
    if swapped and width > 1:
        raise Refusal(f"{path} was written on a big-endian machine; load it there and save it as safetensors")
    begin = tensor.storage.first * own + tensor.offset * width
    empty = prod(tensor.shape) == 0
    reach = 0 if empty else 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
    if tensor.storage.count * own > place.nbytes or begin + reach * width > place.nbytes:
        raise Malformed("a tensor reaches beyond its bytes")
    if prod(tensor.shape) > reach:
        raise Malformed("a tensor repeats its elements")  # as one made by expand(); else a small file could fill memory
    whole = begin == 0 and reach * width == place.nbytes
    return Stored(
        file=path, dtype=tensor.dtype, shape=tensor.shape, strides=tensor.strides, start=place.start + begin,
        crc=place.crc if whole else None,
    )  # fmt: skip


# The three formats ------------------------------------------------------------------------------------------------


def _open_zip(path: Path, file: IO[bytes]) -> Opened:
    try:
        with zipfile.ZipFile(file) as archive:
            members = {info.filename: info for info in archive.infolist()}
            pickled = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
            if any(name.endswith("/constants.pkl") or "/code/" in name for name in members):
                raise Refusal(f"{path} is a TorchScript archive, which holds a program; use the state dict instead")
            if len(pickled) != 1:
                raise Refusal(f"{path} is a zip file, but not one of torch.save; name the file inside it")
            folder = pickled[0].removesuffix("data.pkl")
            if (order := members.get(f"{folder}byteorder")) and order.file_size > 16:
                raise Malformed("a byte order of more than a word")
            swapped = order is not None and archive.read(order) != b"little"
            if members[pickled[0]].file_size > LONGEST_PICKLE:
                raise Malformed("its pickle is larger than that of any weight file")
            reading = pickles.read(io.BytesIO(archive.read(pickled[0])), _CONSTRUCTORS, _storage)
    except (Refusal, Malformed):
        raise
    except (
        zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, KeyError, IndexError, NotImplementedError,
        RuntimeError, OverflowError, MemoryError,
    ) as error:  # fmt: skip
        raise Refusal(f"{path} is damaged or cut short ({printable(str(error))}); fetch it again") from error
    size = path.stat().st_size
    places = {}
    for name, info in members.items():
        if not name.startswith(f"{folder}data/"):
            continue
        if info.compress_type != zipfile.ZIP_STORED:
            raise Refusal(f"{path} was compressed after it was saved; unpack it and save it with torch.save again")
        file.seek(info.header_offset)
        header = file.read(30)
        if header[:4] != b"PK\x03\x04" or len(header) < 30:
            raise Malformed(f"member {name} is not where the directory says")
        start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        if start + info.file_size > size:
            raise Malformed(f"member {name} reaches beyond the file")
        places[name.removeprefix(f"{folder}data/")] = _Place(start, info.file_size, info.CRC)
    value = _settled(reading.value, path, places, swapped)
    return Opened(path=path, container="torch zip", value=value, symbols=_foreign(reading.symbols))


def _open_legacy(path: Path, file: IO[bytes]) -> Opened:
    try:
        magic = pickles.read(file, {}).value
    except Malformed:
        magic = None
    if magic != MAGIC_NUMBER or isinstance(magic, bool):
        raise Refusal(f"{path} is a pickle, but not one of torch.save; such files hold programs and are not read")
    if pickles.read(file, {}).value != PROTOCOL_VERSION:
        raise Malformed("an unknown version of torch's older format")
    system = pickles.read(file, {}).value
    swapped = isinstance(system, dict) and system.get("little_endian") is False
    storages: dict[str, _Storage] = {}

    def persistent(identifier: Any) -> Any:
        if isinstance(identifier, tuple) and identifier and identifier[0] == "module":
            return identifier[1] if len(identifier) > 1 else None  # a class with its source beside it: the name alone
        storage = _storage(identifier)
        storages.setdefault(storage.key, storage)
        return storage

    reading = pickles.read(file, _CONSTRUCTORS, persistent)
    keys = pickles.read(file, {}).value
    if not isinstance(keys, list) or not all(isinstance(key, str) and key in storages for key in keys):
        raise Malformed("its list of storages names one that no tensor has")
    size = path.stat().st_size
    places = {}
    for key in keys:  # each: the number of elements, then the elements
        count = file.read(8)
        nbytes = storages[key].count * raw_dtype(storages[key].dtype).itemsize
        if len(count) < 8 or file.tell() + nbytes > size:
            raise Refusal(f"{path} is cut short: it ends within its tensors; fetch it again")
        if struct.unpack("<q", count)[0] != storages[key].count:
            raise Malformed(f"storage {key} is not of the size that its tensors have")
        places[key] = _Place(file.tell(), nbytes)
        file.seek(nbytes, 1)
    value = _settled(reading.value, path, places, swapped)
    return Opened(path=path, container="torch legacy", value=value, symbols=_foreign(reading.symbols))


def _open_safetensors(path: Path, file: IO[bytes]) -> Opened:
    size = path.stat().st_size
    (length,) = struct.unpack("<Q", file.read(8))
    if length > LONGEST_HEADER or 8 + length > size:
        raise Refusal(f"{path} is damaged or cut short: its header is longer than the file; fetch it again")
    try:
        header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        tensors, end = {}, 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, stop = entry["data_offsets"]
            shape = tuple(entry["shape"])
            if entry["dtype"] not in DTYPES:
                raise Malformed(f"{name} is of the dtype {entry['dtype']}, which is not supported")
            if not all(type(n) is int and 0 <= n < 2**48 for n in (begin, stop, *shape)) or begin != end:
                raise Malformed(f"{name} has an impossible place or shape")
            tensor = Stored(file=path, dtype=entry["dtype"], shape=shape, start=8 + length + begin)
            if stop - begin != tensor.nbytes:
                raise Malformed(f"{name} is not of the size of its shape")
            tensors[name], end = tensor, stop
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Refusal(f"{path} is a damaged safetensors file: {printable(str(error))}") from error
    if 8 + length + end != size:
        what = "cut short" if 8 + length + end > size else "longer than its header says"
        raise Refusal(f"{path} is damaged: it is {what}; fetch it again")
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise Refusal(f"{path} is a damaged safetensors file: its metadata is not text")
    ordered = {name: tensors[name] for name in header}
    return Opened(path=path, container="safetensors", value=ordered, metadata=metadata)
