"""Tensors in a file: dtype, shape and position; their bytes are read on demand.

No framework: values are numpy arrays. bfloat16 and the 8-bit floats, which numpy does not have, are unsigned integers of
the same width, which is enough for joining, cutting and copying; the name of the dtype is stored beside them.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NoReturn

import numpy as np

from harness.errors import UserError

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
MAX_AXES = 64  # of a tensor, in torch as in numpy
FINITE_BLOCK = 1 << 16  # elements that `all_finite` checks at a time
BLOCK = 1 << 22  # bytes that are read at a time to check a storage of which only a part is used
# Bits that are all set in infinities and NaN, for the floats that numpy does not have; float8_e4m3fn has no infinity.
_EXPONENTS = {"BF16": 0x7F80, "F8_E4M3": 0x7F, "F8_E5M2": 0x7C}
BY_TORCH_NAME = {torch: name for name, (_, torch) in DTYPES.items()}


def raw_dtype(dtype: str) -> np.dtype:
    """numpy's dtype for the bytes of safetensors' `dtype`."""
    return np.dtype(DTYPES[dtype][0])


@dataclass(eq=False, slots=True)
class Storage:
    """Consecutive bytes of a file, which several tensors may share."""

    start: int
    nbytes: int
    crc: int | None = None  # CRC-32; None: the file has none
    checked: bool = False  # whether the bytes were read once and had that checksum


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor in a file."""

    file: Path
    dtype: str  # a name of DTYPES
    shape: tuple[int, ...]
    start: int  # byte of its first element in the file
    strides: tuple[int, ...] | None = None  # in elements; None: row-major
    storage: Storage | None = None  # which holds the bytes; None: of safetensors, which has no storages or checksums

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * raw_dtype(self.dtype).itemsize

    @property
    def is_row_major(self) -> bool:
        """Whether it is stored in row-major order."""
        return self.strides is None or self.strides == row_major_strides(self.shape) or prod(self.shape) <= 1

    def read(self) -> np.ndarray:
        """The values in a new row-major array of `shape` and dtype `raw_dtype(self.dtype)`; UserError for damage."""
        out = np.empty(self.shape, raw_dtype(self.dtype))
        self.read_into(out)
        return out

    def read_into(self, out: np.ndarray) -> None:
        """Read the values into `out`, a row-major array of `shape` with elements of the stored width; UserError for damage."""
        assert out.shape == self.shape and out.flags.c_contiguous and out.itemsize == raw_dtype(self.dtype).itemsize
        if out.size == 0:
            return
        if self.is_row_major or self.strides is None:  # None is row-major, too; the second test is for mypy
            self._fill(out)
            self._verify(out)
            return
        # read the elements from the first to the last, then pick those of the tensor
        reach = 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        span = np.empty(reach, out.dtype)
        self._fill(span)
        self._verify(span)
        strides = [stride * out.itemsize for stride in self.strides]
        np.copyto(out, np.lib.stride_tricks.as_strided(span, self.shape, strides, writeable=False))

    def _verify(self, just_read: np.ndarray) -> None:
        """UserError where the storage differs from its checksum. just_read: the bytes from `start` on.

        If they are only a part of the storage, the whole storage is read for its checksum, once for all its tensors.
        """
        storage = self.storage
        if storage is None or storage.crc is None:
            return
        if (self.start, just_read.nbytes) == (storage.start, storage.nbytes):
            crc = zlib.crc32(just_read.reshape(-1).view(np.uint8).data)
        elif not storage.checked:
            crc, block = 0, np.empty(min(BLOCK, storage.nbytes), np.uint8)
            for done in range(0, storage.nbytes, BLOCK):
                part = block[: storage.nbytes - done]
                self._fill(part, storage.start + done)
                crc = zlib.crc32(part.data, crc)
        else:  # checked for another tensor, or an earlier read
            return
        if crc != storage.crc:
            raise UserError(
                f"{self.file} is damaged: the bytes of one of its tensors (at {self.start}) do not match their"
                " checksum; fetch the file again"
            )
        storage.checked = True

    def _fill(self, out: np.ndarray, start: int | None = None) -> None:
        """Fill `out` with the bytes of the file from byte `start` (None: the tensor's first)."""
        view = out.reshape(-1).view(np.uint8).data
        try:
            with self.file.open("rb") as file:
                file.seek(self.start if start is None else start)
                done = 0
                while done < len(view):
                    count = file.readinto(view[done:])
                    if not count:
                        raise UserError(f"{self.file} is cut short: it ends within its tensors; fetch it again")
                    done += count
        except OSError as error:
            raise UserError(f"{self.file}: {error.strerror or error}") from error


def all_finite(array: np.ndarray, dtype: str) -> bool:
    """Whether `array` has no infinity and no NaN; True for integers. array: as `Stored.read` returns a tensor of `dtype`."""
    flat = array.reshape(-1)
    # in small parts: temporary arrays as large as a tensor would fragment the memory
    for begin in range(0, flat.size, FINITE_BLOCK):
        part = flat[begin : begin + FINITE_BLOCK]
        if dtype in _EXPONENTS:
            bits = part.view(f"u{part.itemsize}") & _EXPONENTS[dtype]
            if (bits == _EXPONENTS[dtype]).any():
                return False
        elif part.dtype.kind == "f" and not np.isfinite(part).all():
            return False
    return True


def refuse_not_finite(path: Path, name: str) -> NoReturn:
    """Raises the UserError for a tensor `name` with an infinity or NaN: the network's output would be noise or NaN."""
    raise UserError(
        f"{path}: {name} has values that are infinite or not a number; the file is damaged, or of a training that"
        " diverged: use another"
    )


def row_major_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of an array in row-major order."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))
