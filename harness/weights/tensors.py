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
GLANCE = 1 << 16  # elements looked at together for what is no number
BLOCK = 1 << 22  # bytes read at a time to check what is not used whole
# Bits that are all set in infinities and NaN, of the floats that numpy lacks; float8_e4m3fn has no infinity.
_EXPONENTS = {"BF16": 0x7F80, "F8_E4M3": 0x7F, "F8_E5M2": 0x7C}
BY_TORCH_NAME = {torch: name for name, (_, torch) in DTYPES.items()}


def raw_dtype(dtype: str) -> np.dtype:
    """numpy's dtype for the bytes of safetensors' `dtype`."""
    return np.dtype(DTYPES[dtype][0])


@dataclass(eq=False, slots=True)
class Storage:
    """A run of bytes in a file, which several tensors may share, with its CRC-32 where the file has one."""

    start: int
    nbytes: int
    crc: int | None = None
    checked: bool = False  # its bytes were read once and had that checksum


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor in a file. `strides` are in elements; `start` is the byte of its first element in the file."""

    file: Path
    dtype: str  # a name of DTYPES
    shape: tuple[int, ...]
    start: int
    strides: tuple[int, ...] | None = None  # None: row by row
    storage: Storage | None = None  # that it is a part of, where it has a checksum

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
            self._verify(out)
            return
        reach = 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        span = np.empty(reach, out.dtype)
        self._fill(span)
        self._verify(span)
        strides = [stride * out.itemsize for stride in self.strides]
        np.copyto(out, np.lib.stride_tricks.as_strided(span, self.shape, strides, writeable=False))

    def _verify(self, read: np.ndarray) -> None:
        """Refuse damage: the checksum is that of the whole storage, which is read through once for all its tensors."""
        storage = self.storage
        if storage is None or storage.crc is None:
            return
        if (self.start, read.nbytes) == (storage.start, storage.nbytes):
            found = zlib.crc32(read.reshape(-1).view(np.uint8))
        elif not storage.checked:
            found, block = 0, np.empty(min(BLOCK, storage.nbytes), np.uint8)
            for done in range(0, storage.nbytes, BLOCK):
                part = block[: storage.nbytes - done]
                self._fill(part, storage.start + done)
                found = zlib.crc32(part, found)
        else:
            return
        if found != storage.crc:
            raise UserError(
                f"{self.file} is damaged: the bytes of one of its tensors (at {self.start}) do not match their"
                " checksum; fetch the file again"
            )
        storage.checked = True

    def _fill(self, out: np.ndarray, start: int | None = None) -> None:
        view = memoryview(out.reshape(-1).view(np.uint8))
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


def finite(array: np.ndarray, dtype: str) -> bool:
    """Whether no value of `array`, in the form of `Stored.read`, is infinite or NaN."""
    flat = array.reshape(-1)
    # A little at a time: temporaries of a tensor's size would leave holes between the tensors that are being made.
    for begin in range(0, flat.size, GLANCE):
        part = flat[begin : begin + GLANCE]
        if dtype in _EXPONENTS:
            bits = part.view(f"u{part.itemsize}") & _EXPONENTS[dtype]
            if (bits == _EXPONENTS[dtype]).any():
                return False
        elif part.dtype.kind == "f" and not np.isfinite(part).all():
            return False
    return True


def refuse_not_finite(path: Path, name: str) -> None:
    """Refuse weights with an infinity or NaN among them: what they would make is noise or nothing."""
    raise UserError(
        f"{path}: {name} has values that are infinite or not a number; the file is of a training that went wrong, or"
        " damaged: use another"
    )


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of an array that is laid out row by row."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))
