"""Feature extraction divided among processes that share a file system.

Of the calls of the extractor, process i computes numbers i, i + size, i + 2 size, ...; process 0 collects all features.
The calls are the same as those of a single process, so the features have the same bits.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluators.features.spec import KINDS, Features
from harness.io import files

POLL_SECONDS = 0.02


@dataclass(frozen=True, kw_only=True)
class ShardedExtraction:
    """The share of process `index` of `size`; process 0 collects the features that the others save in `folder`.

    Waiting has no timeout: the launcher ends all processes when one dies.
    """

    index: int
    size: int
    folder: Path

    def is_local(self, call: int) -> bool:
        """Whether this process computes call number `call` (from 0)."""
        return call % self.size == self.index

    def save(self, key: str, call: int, features: Features) -> None:
        """Save the features of call number `call` for process 0. key: hash of images and extractor."""
        arrays = {name: getattr(features, name) for name in KINDS}
        with files.replacing(self._path(key, call)) as file:
            np.savez(file, **{name: rows for name, rows in arrays.items() if rows is not None})

    def is_saved(self, key: str, call: int) -> bool:
        """Whether the features of a call are saved, so that a restarted evaluation does not compute them again."""
        return self._path(key, call).exists()

    def wait_for(self, key: str, call: int) -> Features:
        """Wait until another process has saved the features of a call; returns them and removes their file."""
        path = self._path(key, call)
        while not path.exists():
            time.sleep(POLL_SECONDS)
        with path.open("rb") as file, np.load(file, allow_pickle=False) as data:
            features = Features(**{name: data[name] for name in data.files})
        path.unlink()
        return features

    def _path(self, key: str, call: int) -> Path:
        return self.folder / f"{key[:32]}-{call:06d}.npz"
