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
    """Collects float32 rows (N, D) that arrive in order: `add` all of them, then get the array from `finish`.

    Above IN_MEMORY_BYTES the rows go to a temporary file (in TMPDIR) that disappears with the array. If that folder has
    no room, they stay in memory.
    """

    def __init__(self, count: int, width: int) -> None:
        self._shape, self._added = (count, width), 0
        self._file: IO[bytes] | None = None  # None: the rows are in memory, in `_rows`
        size = 4 * count * width  # bytes of float32
        if size > IN_MEMORY_BYTES and hasattr(os, "posix_fallocate"):
            with contextlib.suppress(OSError), contextlib.ExitStack() as close_on_error:
                file = close_on_error.enter_context(tempfile.TemporaryFile(prefix="harness-rows-"))
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk is found here, not halfway
                close_on_error.pop_all()  # no error: the file stays open
                self._file = file
        self._rows = np.empty(self._shape if self._file is None else (0, width), np.float32)

    def add(self, rows: np.ndarray) -> None:
        """Append the next rows (n, D)."""
        assert rows.shape[1:] == self._shape[1:] and self._added + len(rows) <= self._shape[0], rows.shape
        if self._file is None:
            self._rows[self._added : self._added + len(rows)] = rows
        else:
            self._file.write(np.ascontiguousarray(rows, np.float32).data)  # not through a map: no pages to release
        self._added += len(rows)

    def finish(self) -> np.ndarray:
        """All rows, float32 (N, D), after the last `add`; a read-only memory map if they are in a file."""
        assert self._added == self._shape[0], (self._added, self._shape)
        if self._file is None:
            return self._rows
        with self._file as file:  # the map stays valid when the file is closed
            file.flush()
            return np.memmap(file, np.float32, "r", shape=self._shape)


def release_pages(array: np.ndarray) -> None:
    """Release the memory of a read-only memory map; its pages are read from the file again when they are used.

    Does nothing for other arrays, nor for a map that may have been written to, so no data can be lost.
    """
    pages = getattr(array, "_mmap", None)  # of np.memmap, and of its slices, which share the map
    if isinstance(pages, mmap.mmap) and getattr(array, "mode", None) == "r" and hasattr(mmap, "MADV_DONTNEED"):
        pages.madvise(mmap.MADV_DONTNEED)


def prefetch(array: np.ndarray, starts: np.ndarray, size: int) -> None:
    """Ask the system to read several parts of a memory map now, instead of one by one when they are used.

    starts: int64 (n,), the first byte of each part, counted from the array's first byte. size: bytes of each part. Does
    nothing for other arrays.
    """
    pages = getattr(array, "_mmap", None)
    if isinstance(pages, mmap.mmap) and hasattr(mmap, "MADV_WILLNEED"):
        # Byte of the map where the array begins: a map can begin only at a multiple of the granularity of the file.
        first = getattr(array, "offset", 0) % mmap.ALLOCATIONGRANULARITY
        for start in (starts + first).tolist():
            begin = start - start % mmap.PAGESIZE  # madvise takes whole pages
            pages.madvise(mmap.MADV_WILLNEED, begin, start - begin + size)


def chosen_rows(array: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """A copy (n, ...) of the rows of `array` (N, ...) where `chosen`, bool (N,), is True.

    Rows spread over a memory map touch most of its pages: `array[chosen]` would hold all of them at once, this function
    READ_BYTES at a time.
    """
    out = np.empty((int(np.count_nonzero(chosen)), *array.shape[1:]), array.dtype)
    row_bytes = array.nbytes // max(len(array), 1)
    rows_per_read = max(READ_BYTES // max(row_bytes, 1), 1)
    done = 0  # rows of `out` that are filled
    for start in range(0, len(array), rows_per_read):
        part = array[start : start + rows_per_read][chosen[start : start + rows_per_read]]
        release_pages(array)
        out[done : done + len(part)] = part
        done += len(part)
    return out


def release_freed_memory() -> None:
    """Give the system back what the C library keeps of freed arrays for new ones. Does nothing without glibc.

    A network that was loaded and run leaves much of such memory, in pieces too small for later arrays.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library; Windows
        ctypes.CDLL(None).malloc_trim(0)
