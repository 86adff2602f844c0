"""Safetensors files, written and hashed in one pass.

The bytes are those of `safetensors.numpy.save_file`, which holds Python's lock while it writes: a thread that calls it stops
the training. https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

# dtype -> name in the file, in the order of the tensors in the file
DTYPES = {
    "uint64": "U64", "int64": "I64", "float64": "F64", "complex64": "C64", "float32": "F32", "uint32": "U32",
    "int32": "I32", "float16": "F16", "uint16": "U16", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
PIECE_BYTES = 1 << 24  # written at once


def write(path: Path, tensors: Mapping[str, np.ndarray], before_piece: Callable[[], None]) -> dict[str, str | int]:
    """Write the tensors to `path`, synced to the disk. Returns the file's {"sha256", "bytes"}.

    before_piece: called before each PIECE_BYTES. KeyError for a dtype that the format does not have.
    """
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for piece in _pieces(tensors):
            before_piece()
            file.write(piece)
            digest.update(piece)
            size += len(piece)
        file.flush()
        os.fsync(file.fileno())
    return {"sha256": digest.hexdigest(), "bytes": size}


def _pieces(tensors: Mapping[str, np.ndarray]) -> Iterator[memoryview]:
    """Yields the content of the file: the header's length, the header, and the tensors by dtype and name."""
    order = list(DTYPES)
    names = sorted(tensors, key=lambda name: (order.index(tensors[name].dtype.name), name))
    header, offset = {}, 0
    for name in names:
        array = tensors[name]
        header[name] = {
            "dtype": DTYPES[array.dtype.name],
            "shape": array.shape,
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for name in names:
        array = tensors[name].astype(tensors[name].dtype.newbyteorder("<"), order="C", copy=False)
        content = array.reshape(-1).view(np.uint8).data
        for begin in range(0, len(content), PIECE_BYTES):
            yield content[begin : begin + PIECE_BYTES]
