"""Images that can be gone through again and again, whatever they come from, without holding them in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from harness.images.source import ImageSource
from harness.io import files

IN_MEMORY_BYTES = 1 << 29  # more than this goes to disk


@contextmanager
def spooled(source: ImageSource, folder: Path | None = None) -> Iterator[ImageSource]:
    """The same images as a source whose `array` need not read them again.

    A source that is mapped from a file is handed back as it is. Others are read once, to their end, into memory or,
    above 512 MiB, into a file in `folder` (None: the system's temporary one) that has no name, so that not even a killed
    process leaves it behind.
    """
    if source.mapped:
        yield source
        return
    with _Store(folder) as store:
        for batch in source.batches():
            store.add(batch)
        images = store.images(source.shape)
        yield source.over(images)
        del images


class _Store:
    """Batches in memory until they are too many, then in a nameless file."""

    def __init__(self, folder: Path | None):
        self._folder, self._parts, self._bytes, self._file = folder, [], 0, None

    def __enter__(self) -> _Store:
        return self

    def add(self, batch: np.ndarray) -> None:
        self._parts.append(batch)
        self._bytes += batch.nbytes
        if self._file is not None or self._bytes > IN_MEMORY_BYTES:
            place = self._folder or Path(tempfile.gettempdir())
            with files.explained(place):
                if self._file is None:
                    place.mkdir(parents=True, exist_ok=True)
                    self._file = tempfile.TemporaryFile(dir=place)  # noqa: SIM115 (closed in __exit__)
                for part in self._parts:
                    self._file.write(np.ascontiguousarray(part).data)
            self._parts = []

    def images(self, shape: tuple[int, int, int]) -> np.ndarray:
        """uint8 (N, H, W, C)."""
        if self._file is None:
            return self._parts[0] if len(self._parts) == 1 else np.concatenate(self._parts)
        with files.explained(self._folder or Path(tempfile.gettempdir())):
            self._file.flush()
        return np.memmap(self._file, np.uint8, "r", shape=(self._bytes // int(np.prod(shape)), *shape))

    def __exit__(self, *_) -> None:
        if self._file is not None:
            self._file.close()
