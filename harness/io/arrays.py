"""Arrays that need not fit into memory: rows in a file without a name, mapped, and maps whose pages are given back.

50,000 images' activations of Inception are 1 GB, and their pixels 10 GB at 256x256. A mapped page counts as this
process's memory from the moment it is read until it is given back; after that it is the system's, which may keep it as
cache or not.
"""

import contextlib
import ctypes
import mmap
import os
import tempfile

import numpy as np

IN_MEMORY_BYTES = 1 << 26  # arrays up to this size are held in memory
READ_BYTES = 1 << 24  # of a map, read before its pages are given back


class RowsInOrder:
    """float32 rows (N, D) that arrive in order: `add` them, then take `done`.

    Above HELD_BYTES they go to a temporary file (TMPDIR), which is gone when the array is; where that has no room, to
    memory after all.
    """

    def __init__(self, count: int, width: int) -> None:
        self._shape, self._at, self._file = (count, width), 0, None
        size = 4 * count * width
        if size > IN_MEMORY_BYTES and hasattr(os, "posix_fallocate"):
            with contextlib.suppress(OSError), contextlib.ExitStack() as on_error:
                file = on_error.enter_context(tempfile.TemporaryFile(prefix="harness-rows-"))
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error here, and none later
                on_error.pop_all()
                self._file = file
        self._held = np.empty(self._shape, np.float32) if self._file is None else None

    def add(self, rows: np.ndarray) -> None:
        """The next rows (n, D)."""
        assert rows.shape[1:] == self._shape[1:] and self._at + len(rows) <= self._shape[0], rows.shape
        if self._file is None:
            self._held[self._at : self._at + len(rows)] = rows
        else:
            self._file.write(np.ascontiguousarray(rows, np.float32))  # not through the map: nothing to give back
        self._at += len(rows)

    def done(self) -> np.ndarray:
        """All rows float32 (N, D); a read-only map if they are in a file."""
        assert self._at == self._shape[0], (self._at, self._shape)
        if self._file is None:
            return self._held
        with self._file as file:
            file.flush()
            return np.memmap(file, np.float32, "r", shape=self._shape)


def release_pages(array: np.ndarray) -> None:
    """Let the system have the pages of a read-only map; reading it again is all it takes. Of other arrays: nothing.

    Nothing can be lost: a map that may have been written to is left alone.
    """
    pages = getattr(array, "_mmap", None)
    if isinstance(pages, mmap.mmap) and getattr(array, "mode", None) == "r" and hasattr(mmap, "MADV_DONTNEED"):
        pages.madvise(mmap.MADV_DONTNEED)


def prefetch(array: np.ndarray, starts: np.ndarray, size: int) -> None:
    """Let the system read parts of a map at once, `size` bytes from each of `starts` (bytes from the array's first); they
    are read one after the other else, as they are touched. Of other arrays: nothing."""
    pages = getattr(array, "_mmap", None)
    if isinstance(pages, mmap.mmap) and hasattr(mmap, "MADV_WILLNEED"):
        first = array.offset % mmap.ALLOCATIONGRANULARITY  # of the array in its map
        for start in (starts + first).tolist():
            begin = start - start % mmap.PAGESIZE
            pages.madvise(mmap.MADV_WILLNEED, begin, start - begin + size)


def chosen_rows(array: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """A copy of the rows (n, ...) of array (N, ...) that are marked in chosen, bool (N,).

    Rows all over a map touch most of its pages: `array[chosen]` would hold them all at once, this a part at a time.
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
    """Let the system have what was freed and is still kept for new arrays, where the C library can do so (glibc).

    A network's loading and activations leave much of it, in pieces that later arrays do not fit.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library; Windows
        ctypes.CDLL(None).malloc_trim(0)
