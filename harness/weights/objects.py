"""Tensors in torch's pickles: the few calls that such files are made of, carried out on plain data.

A tensor is a call of a function of torch._utils with a storage (a persistent identifier), an offset, a shape and strides.
`harness.weights.containers` knows where the bytes of a storage are, and passes that to `resolve_tensors`.
Format: torch 2.13 torch/_utils.py, torch/serialization.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.weights import pickles
from harness.weights.pickles import Call, Malformed, Symbol, Unsuitable
from harness.weights.tensors import BY_TORCH_NAME, MAX_AXES, Storage, Stored, raw_dtype

_STORAGE_TYPES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "UntypedStorage": "U8",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StorageKey:
    """A storage, or a view of one, that a pickle refers to.

    dtype: of its elements, safetensors' name. key: of the storage in the file. count: elements of the whole storage.
    first: first element of the view.
    """

    dtype: str
    key: str
    count: int
    first: int = 0


class _PendingTensor:
    """A tensor whose storage is known only by its key; `resolve_tensors` replaces it by a `Stored`.

    dtype: safetensors' name. offset, strides: in elements.
    """

    __slots__ = ("dtype", "offset", "shape", "storage", "strides")

    def __init__(self, storage: StorageKey, dtype: str, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]):
        self.storage, self.dtype, self.offset, self.shape, self.strides = storage, dtype, offset, shape, strides


def escaped(text: str) -> str:
    """Text from a file, for a message: characters that could control a terminal are escaped."""
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def _ordered_dict(*arguments: Any) -> dict[Any, Any]:
    """collections.OrderedDict(pairs) as a plain dictionary."""
    if not arguments:
        return {}
    items: list[Any] = []
    for pair in arguments[0].items() if isinstance(arguments[0], dict) else arguments[0]:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise Malformed("an ordered dictionary of something other than pairs")
        items += pair
    return pickles.to_dict(items)


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, *more: Any, dtype: str | None = None, metadata: Any = None
) -> _PendingTensor:
    """torch._utils._rebuild_tensor and _rebuild_tensor_v2, whose seventh argument, more[2], is the metadata.

    dtype, metadata: passed by `_rebuild_tensor_v3`; dtype None: that of the storage.
    """
    if not isinstance(storage, StorageKey):
        raise Malformed("a tensor without a storage")
    if not all(isinstance(each, (tuple, list)) and len(each) <= MAX_AXES for each in (shape, strides)):
        raise Malformed(f"a tensor of more than {MAX_AXES} axes")
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or not all(type(n) is int and 0 <= n < 2**48 for n in numbers):
        raise Malformed("a tensor of an impossible shape")
    if metadata is None and len(more) > 2:
        metadata = more[2]
    if metadata:  # torch's bits "neg" and "conj": values that differ from the bytes
        named = [name for name in metadata if isinstance(name, str)] if isinstance(metadata, dict) else []
        raise Unsuitable(
            f"holds a tensor whose values are not its bytes (marked {', '.join(named)[:40] or 'oddly'}); save it with"
            " .resolve_neg() or .resolve_conj()"
        )
    return _PendingTensor(storage, dtype or storage.dtype, offset, tuple(shape), tuple(strides))


def _rebuild_tensor_v3(
    storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, dtype: Any, metadata: Any = None
) -> _PendingTensor:
    """torch._utils._rebuild_tensor_v3, which states the dtype."""
    name = BY_TORCH_NAME.get(dtype.name) if isinstance(dtype, Symbol) and dtype.module == "torch" else None
    if name is None:
        raise Malformed("a tensor of an unknown dtype")
    return _rebuild_tensor(storage, offset, shape, strides, dtype=name, metadata=metadata)


def _torch_size(*shape: Any) -> tuple[Any, ...]:
    """torch.Size(shape) as a plain tuple; () without arguments."""
    if shape and not (isinstance(shape[0], (tuple, list)) and len(shape[0]) <= MAX_AXES):
        raise Malformed(f"a shape of more than {MAX_AXES} axes")
    return tuple(shape[0]) if shape else ()


def _rebuild_from_type(function: Any, kind: Any, arguments: Any, *_: Any) -> Any:
    """torch._tensor._rebuild_from_type_v2, for a tensor of a subclass or with attributes: the plain tensor.

    For any other function the result is a placeholder.
    """
    if isinstance(function, Symbol) and function.full in _REBUILT:
        return CONSTRUCTORS[function.full](*arguments)
    return Call(function, (kind, arguments))


def _codecs_encode(text: Any, *_: Any) -> Any:
    """_codecs.encode, by which pickle protocol 2 writes bytes."""
    return text.encode("latin-1") if isinstance(text, str) else text


CONSTRUCTORS: dict[str, Any] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch.Size": _torch_size,
    "_codecs.encode": _codecs_encode,
}
# functions that `_rebuild_from_type` may call
_REBUILT = frozenset(name for name in CONSTRUCTORS if name.startswith("torch._utils."))
# names that the files of plain tensors have, and that are not reported; see also `foreign_symbols`
_NEEDED = {
    *CONSTRUCTORS,
    "torch.Tensor",
    "torch.nn.parameter.Parameter",
    "torch.device",
    "torch.storage.UntypedStorage",
}


def foreign_symbols(symbols: Mapping[str, Symbol]) -> tuple[str, ...]:
    """Names of the classes and functions in a file that tensors do not need, `escaped`."""
    dtypes = {f"torch.{name}" for name in BY_TORCH_NAME}
    return tuple(
        escaped(full)
        for full, symbol in symbols.items()
        if full not in _NEEDED
        and full not in dtypes
        and symbol.module != "torch.jit._pickle"  # lists of one type, in TorchScript archives
        and not (symbol.module in ("torch", "torch.cuda", "torch.storage") and symbol.name in _STORAGE_TYPES)
    )


def storage_of(identifier: Any) -> StorageKey:
    """The storage of a persistent identifier, ("storage", type, key, device, number of elements[, view]).

    view: (its key, first element, number of elements), or None.
    """
    if not isinstance(identifier, tuple) or not 5 <= len(identifier) <= 6 or identifier[0] != "storage":
        raise Malformed("it refers to something other than tensors")
    _, kind, key, _, count, *view = identifier
    dtype = _STORAGE_TYPES.get(kind.name) if isinstance(kind, Symbol) else None
    if dtype is None:
        raise Malformed(
            f"a tensor of the type {kind.name if isinstance(kind, Symbol) else type(kind).__name__}, which is not supported"
        )
    if type(count) is not int or not 0 <= count < 2**48:
        raise Malformed("a storage of an impossible size")
    if not isinstance(key, str) or len(key) > pickles.LONGEST_NAME:
        raise Malformed("a storage without a key")
    if view and view[0] is not None:
        _, first, view_count = view[0]
        if not (type(first) is type(view_count) is int and first >= 0 and 0 <= view_count <= count - first):
            raise Malformed("a view beyond its storage")
        return StorageKey(dtype, key, count, first)
    return StorageKey(dtype, key, count)


def module_tensors(module: Any) -> dict[str, Any]:
    """The tensors of a TorchScript module, which a pickle holds as nested objects, by their names in its state dict.

    Nothing of the module is run. A module that is in two places is read once. `Malformed` for anything else.
    """
    if not (isinstance(module, Call) and isinstance(module.state, dict)):
        raise Malformed("a TorchScript archive without a module")
    found: dict[str, Any] = {}
    waiting: list[tuple[str, Call]] = [("", module)]
    visited = {id(module)}
    while waiting:
        prefix, each = waiting.pop()
        for name, item in each.state.items():
            full = f"{prefix}{name}"
            if not isinstance(name, str) or len(full) > pickles.LONGEST_NAME:
                raise Malformed("an attribute without a name")
            if isinstance(item, _PendingTensor):
                found[full] = item
            elif isinstance(item, Call) and isinstance(item.state, dict) and id(item) not in visited:
                visited.add(id(item))
                waiting.append((f"{full}.", item))
    return found


def resolve_tensors(value: Any, path: Path, storages: Mapping[str, Storage], big_endian: bool) -> Any:
    """Replace every pending tensor by a `Stored`, in place in `value` and its nested dictionaries and lists; returns `value`.

    If `value` is a pending tensor itself, its `Stored` is returned. storages: bytes of each storage, by key. big_endian:
    whether the file was written on a big-endian machine.
    """
    visited: dict[int, Any] = {}  # by id: a file may hold one object twice, or within itself
    # by id of the pending tensor, which is stored as well so that its id is not reused
    resolved: dict[int, tuple[_PendingTensor, Stored]] = {}
    # dictionaries and lists whose items are not resolved yet; a list, because they may be nested too deep for recursion
    waiting = [value] if isinstance(value, (dict, list)) else []

    def resolve(item: Any) -> Any:
        if isinstance(item, _PendingTensor):
            if id(item) not in resolved:
                resolved[id(item)] = item, _stored(item, path, storages, big_endian)
            return resolved[id(item)][1]
        if isinstance(item, tuple) and any(map(_is_pending, item)):
            return [resolve(each) for each in item]  # such as the averages of all parameters, in their order
        if isinstance(item, (dict, list)) and id(item) not in visited:
            visited[id(item)] = item
            waiting.append(item)
        return item

    while waiting:
        holder = waiting.pop()
        for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
            holder[key] = resolve(holder[key])
    return resolve(value)


def _is_pending(item: Any) -> bool:
    """Whether an item of a tuple is a pending tensor, or a pair with one, such as (name, tensor)."""
    pair = item if isinstance(item, tuple) else (item,)
    return any(isinstance(each, _PendingTensor) for each in pair)


def _stored(tensor: _PendingTensor, path: Path, storages: Mapping[str, Storage], big_endian: bool) -> Stored:
    """The place of a pending tensor in the file; `Malformed` where it reaches beyond its storage.

    `Malformed` also where it has more elements than the part of the storage from its first to its last element.
    """
    storage = storages.get(tensor.storage.key)
    if storage is None:
        raise Malformed(f"the bytes of storage {tensor.storage.key} are missing")
    # bytes of an element, of the tensor and of its storage
    width, storage_width = raw_dtype(tensor.dtype).itemsize, raw_dtype(tensor.storage.dtype).itemsize
    if big_endian and width > 1:
        raise UserError(f"{path} was written on a big-endian machine; load it there and save it as safetensors")
    begin = tensor.storage.first * storage_width + tensor.offset * width  # in bytes, from the storage's first
    count = prod(tensor.shape)
    # elements of the storage from the tensor's first to its last
    reach = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True)) if count else 0
    if tensor.storage.count * storage_width > storage.nbytes or begin + reach * width > storage.nbytes:
        raise Malformed("a tensor reaches beyond its bytes")
    if count > reach:
        raise Malformed("a tensor repeats its elements")  # as expand() makes them; a small file could fill the memory
    return Stored(
        file=path, dtype=tensor.dtype, shape=tensor.shape, strides=tensor.strides, start=storage.start + begin,
        storage=storage,
    )  # fmt: skip
