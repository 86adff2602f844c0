"""Spooling: images of any source, made readable several times without holding them in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from harness.images.source import ImageSource
from harness.io import files

IN_MEMORY_BYTES = 1 << 29  # more than this goes to a temporary file


@contextmanager
def spooled(source: ImageSource, folder: Path | None = None) -> Iterator[ImageSource]:
    """A source of the same images as one array (`ImageSource.mapped`), so that the original is read only once.

    A source that is mapped already is returned unchanged. Others are read to their end into memory or, above
    IN_MEMORY_BYTES, into an unnamed file in `folder` (None, or not writable: the system's temporary folder). The file disappears at the
    end, even if the process is killed.
    """
    if source.mapped:
        yield source
        return
    with _Store(folder) as store:
        for batch in source.batches():
            store.add(batch)
        yield source.backed_by(store.images(source.shape))


class _Store:
    """Collects batches: in memory up to IN_MEMORY_BYTES, beyond that all of them in an unnamed file."""

    def __init__(self, folder: Path | None):
        self._folder = folder or Path(tempfile.gettempdir())
        self._parts: list[np.ndarray] = []  # batches that are not in the file
        self._bytes = 0  # of all images so far
        self._file: IO[bytes] | None = None

    def __enter__(self) -> _Store:
        return self

    def add(self, batch: np.ndarray) -> None:
        """Append the next images, uint8 (n, H, W, C); `batch` itself is kept, not a copy, while there is no file."""
        self._parts.append(batch)
        self._bytes += batch.nbytes
        if self._file is not None or self._bytes > IN_MEMORY_BYTES:
            with files.explained(self._folder):
                if self._file is None:
                    self._file = self._open()
                for part in self._parts:
                    self._file.write(np.ascontiguousarray(part).data)
            self._parts = []

    def _open(self) -> IO[bytes]:
        """An unnamed file in the folder, or in the system's temporary folder where that cannot be written."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            return tempfile.TemporaryFile(dir=self._folder)
        except OSError:
            self._folder = Path(tempfile.gettempdir())
            return tempfile.TemporaryFile(dir=self._folder)

    def images(self, shape: tuple[int, int, int]) -> np.ndarray:
        """All images, uint8 (N, H, W, C), in memory or mapped from the file. shape: (H, W, C)."""
        if self._file is None:
            return self._parts[0] if len(self._parts) == 1 else np.concatenate(self._parts)
        with files.explained(self._folder):
            self._file.flush()
        return np.memmap(self._file, np.uint8, "r", shape=(self._bytes // int(np.prod(shape)), *shape))

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
