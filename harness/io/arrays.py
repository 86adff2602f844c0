"""Arrays that need not fit into memory: rows in an unnamed mapped file, and memory maps whose pages are released.

Inception's activations of 50,000 images are 1 GB, their pixels 10 GB at 256x256. A mapped page counts as this process's
memory from the moment it is read until it is released; then the system may keep it as cache.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import tempfile
from typing import IO

import numpy as np

IN_MEMORY_BYTES = 1 << 26  # largest array that is held in memory
READ_BYTES = 1 << 24  # bytes of a map that are read before its pages are released


class RowsInOrder:
    """Collects float32 rows (N, D) that arrive in order: `add` them, then take the array from `done`.

    Above IN_MEMORY_BYTES the rows go to a temporary file (in TMPDIR) that disappears with the array. If that folder has
    no room, they stay in memory.
    """

    def __init__(self, count: int, width: int) -> None:
        self._shape, self._at = (count, width), 0
        self._file: IO[bytes] | None = None
        size = 4 * count * width
        if size > IN_MEMORY_BYTES and hasattr(os, "posix_fallocate"):
            with contextlib.suppress(OSError), contextlib.ExitStack() as on_error:
                file = on_error.enter_context(tempfile.TemporaryFile(prefix="harness-rows-"))
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk is found here, not halfway
                on_error.pop_all()
                self._file = file
        self._rows = np.empty(self._shape if self._file is None else (0, width), np.float32)

    def add(self, rows: np.ndarray) -> None:
        """Append the next rows (n, D)."""
        assert rows.shape[1:] == self._shape[1:] and self._at + len(rows) <= self._shape[0], rows.shape
        if self._file is None:
            self._rows[self._at : self._at + len(rows)] = rows
        else:
            self._file.write(np.ascontiguousarray(rows, np.float32).data)  # not through a map: no pages to release
        self._at += len(rows)

    def done(self) -> np.ndarray:
        """All rows, float32 (N, D); a read-only memory map if they are in a file."""
        assert self._at == self._shape[0], (self._at, self._shape)
        if self._file is None:
            return self._rows
        with self._file as file:
            file.flush()
            return np.memmap(file, np.float32, "r", shape=self._shape)


def release_pages(array: np.ndarray) -> None:
    """Release the pages of a read-only memory map; they are read from the file again when they are used.

    Does nothing with other arrays. A map that may have been written to is left alone, so nothing can be lost.
    """
    pages = getattr(array, "_mmap", None)
    if isinstance(pages, mmap.mmap) and getattr(array, "mode", None) == "r" and hasattr(mmap, "MADV_DONTNEED"):
        pages.madvise(mmap.MADV_DONTNEED)


def prefetch(array: np.ndarray, starts: np.ndarray, size: int) -> None:
    """Ask the system to read several parts of a memory map at once instead of one by one as they are touched.

    starts: int64 (n,), the first byte of each part, counted from the array's first byte. size: bytes of a part. Does
    nothing with other arrays.
    """
    pages = getattr(array, "_mmap", None)
    if isinstance(pages, mmap.mmap) and hasattr(mmap, "MADV_WILLNEED"):
        first = getattr(array, "offset", 0) % mmap.ALLOCATIONGRANULARITY  # byte of the map where the array begins
        for start in (starts + first).tolist():
            begin = start - start % mmap.PAGESIZE
            pages.madvise(mmap.MADV_WILLNEED, begin, start - begin + size)


def chosen_rows(array: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """A copy (n, ...) of the rows of `array` (N, ...) where `chosen`, bool (N,), is True.

    Rows spread over a memory map touch most of its pages: `array[chosen]` would hold all of them at once, this function
    READ_BYTES at a time.
    """
    out = np.empty((int(np.count_nonzero(chosen)), *array.shape[1:]), array.dtype)
    step, done = max(READ_BYTES * len(array) // max(array.nbytes, 1), 1), 0
    for start in range(0, len(array), step):
        part = array[start : start + step][chosen[start : start + step]]
        release_pages(array)
        out[done : done + len(part)] = part
        done += len(part)
    return out


def release_freed_memory() -> None:
    """Return freed memory that the C library keeps for new arrays to the system, where it can (glibc).

    Loading a network and its activations leave much of it, in pieces too small for later arrays.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library; Windows
        ctypes.CDLL(None).malloc_trim(0)
