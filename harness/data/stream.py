"""The endless stream of training images: epoch after epoch, each in an order of its own."""

from __future__ import annotations

import numpy as np

from harness.randomness import Purpose, permutation


class Stream:
    """Rows of a data set of `count` images by their position in the stream; a function of seed and position alone."""

    def __init__(self, seed: int, count: int):
        self._seed, self._count = seed, count
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))  # epoch, and its order

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """int64 (N,) -> int64 (N,)."""
        rows = np.empty(len(positions), np.int64)
        for epoch in np.unique(positions // self._count):
            if self._order[0] != epoch:
                order = permutation(self._seed, Purpose.DATA_ORDER, int(epoch), self._count)
                self._order = (int(epoch), order)
            here = positions // self._count == epoch
            rows[here] = self._order[1][positions[here] % self._count]
        return rows
