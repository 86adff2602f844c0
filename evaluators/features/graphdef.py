"""A reader of frozen TensorFlow graphs that needs no TensorFlow: the protocol buffer messages of a GraphDef.

Wire format: protobuf.dev/programming-guides/encoding. Field numbers: tensorflow/core/framework graph.proto,
node_def.proto, attr_value.proto, tensor.proto, tensor_shape.proto, types.proto. The file is memory-mapped, and the
values of constants are views of the map, so the 95 MB of weights are not copied. Nothing in a graph is run. An
inconsistent message raises `Malformed`.
"""

import mmap
import struct
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from harness.io.text import check_plain

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types; _BYTES is also that of texts and messages

# Element types of an image network's constants: number in types.proto -> (numpy's dtype, the field of TensorProto that
# holds typed values, such as float_val).
_DTYPES: dict[int, tuple[np.dtype[Any], int]] = {
    1: (np.dtype("<f4"), 5),
    2: (np.dtype("<f8"), 6),
    3: (np.dtype("<i4"), 7),
    9: (np.dtype("<i8"), 10),
}
_FLOATS = (5, 6)  # float_val and double_val, the fields above whose values are not varints


class Malformed(ValueError):
    """The bytes are not a complete GraphDef."""


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """The unsigned varint that begins at index `position`, and the index after it."""
    value = 0
    for shift in range(0, 70, 7):  # at most 10 bytes
        if position >= len(data):
            break
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:  # the last byte
            return value, position
    raise Malformed("a number runs off the end")


def fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yields (field number, value) of a message in file order; value is an int for varints, else the field's bytes."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == _VARINT:
            value, position = _varint(data, position)
            yield number, value
            continue
        if wire_type == _BYTES:
            length, position = _varint(data, position)
        elif wire_type in (_FIXED32, _FIXED64):
            length = 4 if wire_type == _FIXED32 else 8
        else:
            raise Malformed(f"a field of kind {wire_type}")
        if length > len(data) - position:
            raise Malformed("a field is longer than its message; the file is cut short")
        yield number, data[position : position + length]
        position += length


def _text(value: int | memoryview) -> str:
    """The value of a string field."""
    if isinstance(value, int):
        raise Malformed("a number instead of a name")
    try:
        return bytes(value).decode("utf-8")
    except UnicodeDecodeError:
        raise Malformed("a name is not text") from None


def _message(value: int | memoryview) -> memoryview:
    """The bytes of a field that is a message or bytes."""
    if isinstance(value, int):
        raise Malformed("a number instead of a message")
    return value


def _signed(value: int) -> int:
    """The int64 that a varint stores as an unsigned 64-bit number."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _integers(values: list[int | memoryview]) -> list[int]:
    """The int64 values of a repeated integer field, whose occurrences in the file are `values`.

    An occurrence is one number or, if the field is packed, the varints of many numbers.
    """
    out = []
    for value in values:
        if isinstance(value, int):
            out.append(_signed(value))
            continue
        position = 0
        while position < len(value):
            number, position = _varint(value, position)
            out.append(_signed(number))
    return out


class Node:
    """An operation of a graph.

    inputs: as in the file, "name", "name:1" (output number 1 of that node) or "^name" (a control input, which only orders
    the operations). Attributes are parsed when they are asked for.
    """

    def __init__(self, data: memoryview):
        self.name, self.op = "", ""
        self.inputs: list[str] = []
        self._attributes: dict[str, memoryview] = {}
        for number, value in fields(data):
            if number == 1:
                self.name = _text(value)
            elif number == 2:
                self.op = _text(value)
            elif number == 3:
                self.inputs.append(_text(value))
            elif number == 5:
                entry = dict(fields(_message(value)))  # of the map of attributes: 1 is the key, 2 the AttrValue
                self._attributes[_text(entry.get(1, memoryview(b"")))] = _message(entry.get(2, memoryview(b"")))

    def _attribute(self, key: str) -> dict[int, int | memoryview]:
        """The fields of the AttrValue of the attribute `key`, by number; empty if there is no such attribute."""
        return dict(fields(self._attributes.get(key, memoryview(b""))))

    def integers(self, key: str) -> list[int]:
        """An attribute that is a list of integers; empty if it is missing."""
        items = self._attribute(key).get(1, memoryview(b""))
        return _integers([value for number, value in fields(_message(items)) if number == 3])  # 3: ListValue's integers

    def text(self, key: str) -> str:
        """An attribute that is a string; empty if it is missing."""
        return _text(self._attribute(key).get(2, memoryview(b"")))

    def real(self, key: str) -> float | None:
        """An attribute that is a float32; None if it is missing."""
        value = self._attribute(key).get(4)
        if value is None:
            return None
        if isinstance(value, int) or len(value) != 4:
            raise Malformed(f"{key} of {self.name} is not a number")
        return struct.unpack("<f", value)[0]

    def flag(self, key: str) -> bool | None:
        """An attribute that is true or false; None if it is missing: the operation's default applies."""
        value = self._attribute(key).get(5)
        return None if value is None else bool(value)

    def array(self) -> np.ndarray:
        """The value of a Const; a read-only view of the file if its elements are contiguous there."""
        tensor = self._attribute("value").get(8)
        if self.op != "Const" or tensor is None:
            raise Malformed(f"{self.name} is not a constant")
        type_number: int | memoryview | None = None
        shape: tuple[int, ...] = ()
        content: memoryview | None = None
        typed: dict[int, list[int | memoryview]] = {}  # field number, such as that of float_val -> its values
        for number, value in fields(_message(tensor)):
            if number == 1:  # dtype
                type_number = value
            elif number == 2:  # tensor_shape: its field 2 is a dimension, whose field 1 is the size
                dimensions = [part for key, part in fields(_message(value)) if key == 2]
                sizes = [dict(fields(_message(dimension))).get(1, 0) for dimension in dimensions]
                shape = tuple(_integers(sizes))
            elif number == 4:  # tensor_content
                content = _message(value)
            else:
                typed.setdefault(number, []).append(value)
        if not isinstance(type_number, int) or type_number not in _DTYPES:
            raise Malformed(f"{self.name} has elements of the unknown type {type_number}")
        dtype, field = _DTYPES[type_number]
        if any(not 0 <= size < 1 << 40 for size in shape):
            raise Malformed(f"{self.name} has an impossible shape")
        if content is not None and len(content):
            if len(content) != prod(shape) * dtype.itemsize:
                raise Malformed(f"{self.name} holds {len(content)} bytes for the shape {shape}")
            return np.frombuffer(content, dtype).reshape(shape)
        values = typed.get(field, [])
        if field in _FLOATS:
            # a run is the bytes of one element or, if the field is packed, of all
            runs = [value for value in values if not isinstance(value, int) and len(value) % dtype.itemsize == 0]
            if len(runs) < len(values):
                raise Malformed(f"the values of {self.name} are not floats")
            # a view of one run; several runs have to be joined, which copies them
            flat = np.frombuffer(runs[0] if len(runs) == 1 else b"".join(runs), dtype)
        else:
            flat = np.array(_integers(values), np.int64).astype(dtype)
        if flat.size == prod(shape):
            return flat.reshape(shape)
        if flat.size == 1:  # one value for all elements
            return np.broadcast_to(flat.reshape((1,) * len(shape)), shape)
        raise Malformed(f"{self.name} holds {flat.size} values for the shape {shape}")


def read_graph(data: memoryview) -> dict[str, Node]:
    """The nodes of a GraphDef by name. Raises Malformed."""
    nodes: dict[str, Node] = {}
    for number, value in fields(data):
        if number == 1:
            node = Node(_message(value))
            if not node.name or not node.op or node.name in nodes:
                raise Malformed(f"a node has no name or operation, or its name occurs twice: {node.name!r}")
            nodes[node.name] = node
    if not nodes:
        raise Malformed("the graph has no nodes")
    return nodes


def map_file(path: Path) -> memoryview:
    """The memory-mapped bytes of a file; valid as long as a view of them exists. Raises OSError as `open` does."""
    check_plain(path, "graph")
    with path.open("rb") as file:
        if not file.seek(0, 2):  # an empty file cannot be mapped
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
