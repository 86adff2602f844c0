"""Extraction divided among processes that share a file system: each computes calls of the extractor, the first collects.

The calls are those of one process, so their features are the same bits.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluators.features import Features
from harness.io import files

POLL_SECONDS = 0.02


@dataclass(frozen=True, kw_only=True)
class Division:
    """Process `index` of `size`; 0 collects what the others leave in `folder`.

    Who starts the processes ends them all when one dies: nobody here waits for it with a limit.
    """

    index: int
    size: int
    folder: Path

    def mine(self, call: int) -> bool:
        """Whether this process computes call number `call` (from 0)."""
        return call % self.size == self.index

    def put(self, key: str, call: int, features: Features) -> None:
        """Leave the features of a call for the first process. key: of images and extractor."""
        arrays = {name: getattr(features, name) for name in ("pooled", "logits", "spatial")}
        with files.replacing(self._path(key, call)) as file:
            np.savez(file, **{name: rows for name, rows in arrays.items() if rows is not None})

    def has(self, key: str, call: int) -> bool:
        """Whether they have been left: a killed evaluation computes nothing twice."""
        return self._path(key, call).exists()

    def take(self, key: str, call: int) -> Features:
        """What another process has left, or will."""
        path = self._path(key, call)
        while not path.exists():
            time.sleep(POLL_SECONDS)
        with path.open("rb") as file, np.load(file, allow_pickle=False) as data:
            features = Features(**{name: data[name] for name in data.files})
        path.unlink()
        return features

    def _path(self, key: str, call: int) -> Path:
        return self.folder / f"{key[:32]}-{call:06d}.npz"
