"""Tensors as they lie in a file: dtype, shape and place; their bytes are read when they are asked for.

No framework: values are numpy arrays. bfloat16 and the 8-bit floats, which numpy lacks, are unsigned integers of the
same width, which joining, cutting and copying do not mind; the dtype's name goes along.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from harness.errors import Refusal

# fmt: off
DTYPES = {  # safetensors' name: (numpy's dtype for the bytes, torch's name)
    "F64":     ("<f8", "float64"),
    "F32":     ("<f4", "float32"),
    "F16":     ("<f2", "float16"),
    "BF16":    ("<u2", "bfloat16"),
    "F8_E4M3": ("|u1", "float8_e4m3fn"),
    "F8_E5M2": ("|u1", "float8_e5m2"),
    "I64":     ("<i8", "int64"),
    "I32":     ("<i4", "int32"),
    "I16":     ("<i2", "int16"),
    "I8":      ("|i1", "int8"),
    "U64":     ("<u8", "uint64"),
    "U32":     ("<u4", "uint32"),
    "U16":     ("<u2", "uint16"),
    "U8":      ("|u1", "uint8"),
    "BOOL":    ("|u1", "bool"),
}
# fmt: on
BY_TORCH_NAME = {torch: name for name, (_, torch) in DTYPES.items()}


def raw_dtype(dtype: str) -> np.dtype:
    """numpy's dtype for the bytes of safetensors' `dtype`."""
    return np.dtype(DTYPES[dtype][0])


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor in a file. `strides` are in elements; `start` is the byte of its first element in the file."""

    file: Path
    dtype: str  # a name of DTYPES
    shape: tuple[int, ...]
    start: int
    strides: tuple[int, ...] | None = None  # None: row by row
    crc: int | None = None  # CRC-32 of its bytes, where the file has one for them alone

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * raw_dtype(self.dtype).itemsize

    @property
    def plain(self) -> bool:
        """Laid out row by row."""
        return self.strides is None or self.strides == row_major(self.shape) or prod(self.shape) <= 1

    def read(self) -> np.ndarray:
        """The values in a fresh array of `shape`, row by row, of the dtype `raw_dtype(self.dtype)`."""
        out = np.empty(self.shape, raw_dtype(self.dtype))
        self.read_into(out)
        return out

    def read_into(self, out: np.ndarray) -> None:
        """Read the values into `out`: of `shape`, row by row, elements of the stored width. Damage is refused."""
        assert out.shape == self.shape and out.flags.c_contiguous and out.itemsize == raw_dtype(self.dtype).itemsize
        if out.size == 0:
            return
        if self.plain:
            self._fill(out)
            if self.crc is not None and zlib.crc32(out.reshape(-1).view(np.uint8)) != self.crc:
                raise Refusal(
                    f"{self.file} is damaged: the bytes of one of its tensors (at {self.start}) do not match their"
                    " checksum; fetch the file again"
                )
            return
        reach = 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        span = np.empty(reach, out.dtype)
        self._fill(span)
        strides = [stride * out.itemsize for stride in self.strides]
        np.copyto(out, np.lib.stride_tricks.as_strided(span, self.shape, strides, writeable=False))

    def _fill(self, out: np.ndarray) -> None:
        view = memoryview(out.reshape(-1).view(np.uint8))
        try:
            with self.file.open("rb") as file:
                file.seek(self.start)
                done = 0
                while done < len(view):
                    count = file.readinto(view[done:])
                    if not count:
                        raise Refusal(f"{self.file} is cut short: it ends within its tensors; fetch it again")
                    done += count
        except OSError as error:
            raise Refusal(f"{self.file}: {error.strerror or error}") from error


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of an array that is laid out row by row."""
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
