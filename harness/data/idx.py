"""Reader of IDX files, the format of MNIST: one array of bytes behind a header of big-endian sizes; gzipped or plain.

Format: http://yann.lecun.com/exdb/mnist/, "The IDX file format".
"""

from __future__ import annotations

import gzip
import math
import struct
from pathlib import Path
from typing import IO

import numpy as np

from harness.errors import UserError
from harness.images.source import Damaged, readable
from harness.io.text import check_plain

UNSIGNED_BYTES = 0x08  # the type of images and labels
MAX_BYTES = 1 << 30  # a header that states more is taken for damage
GZIP = b"\x1f\x8b"


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array in `path`, which must have `dimensions` dimensions.

    UserError where the file is cut off, is longer than its header says, has another type or rank, or (gzipped) differs
    from its checksum. Only as many bytes are unpacked as the header states, and one more to see that the file ends.
    """
    check_plain(path, "data file")
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    with file, readable(path):
        packed = file.read(2) == GZIP
        file.seek(0)
        with gzip.open(file) if packed else file as stream:
            shape = _shape(path, stream.read(4), stream, dimensions)
            size = math.prod(shape)
            data = stream.read(size)
            if len(data) < size:
                raise Damaged(f"it says {shape} and holds {len(data):,} of {size:,} bytes")
            if stream.read(1):  # the end: here gzip compares its checksum
                raise Damaged(f"there are more bytes than the {size:,} of {shape}")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _shape(path: Path, magic: bytes, stream: IO[bytes] | gzip.GzipFile, dimensions: int) -> tuple[int, ...]:
    """The array's shape, read from the rest of the header. magic: the first four bytes, which `stream` has passed."""
    if len(magic) < 4 or magic[:2] != b"\0\0":
        raise UserError(f"{path} is no IDX file: it begins with {magic.hex(' ') or 'nothing'}")
    if magic[2] != UNSIGNED_BYTES:
        raise UserError(f"{path} holds values of IDX type 0x{magic[2]:02x}; wanted unsigned bytes, 0x08")
    if magic[3] != dimensions:
        raise UserError(f"{path} has {magic[3]} dimensions where {dimensions} are wanted: images and labels swapped?")
    sizes = stream.read(4 * dimensions)
    if len(sizes) < 4 * dimensions:
        raise Damaged("its header is cut off")
    shape = struct.unpack(f">{dimensions}I", sizes)
    if 0 in shape or math.prod(shape) > MAX_BYTES:
        raise Damaged(f"its header says {shape}")
    return shape
