"""The endless stream of training examples: epoch after epoch, each in a new order."""

from __future__ import annotations

import numpy as np

from harness.data.examples import Examples
from harness.randomness import Purpose, permutation, uniform


class EpochSampler:
    """Training examples by position in the stream.

    The seed and the position alone decide which example comes there and whether it is mirrored.

    flip: mirror each example left to right with probability 1/2.
    """

    def __init__(self, seed: int, data: Examples, flip: bool):
        self._seed, self._data, self._flip, self._count = seed, data, flip, len(data.labels)
        # (the epoch that `rows` used last, its permutation), because consecutive calls need the same one; -1: none yet
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def take(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(what `Examples.gather` returns for the examples at `positions`, int64 (n,); their labels, int64 (n,))."""
        rows = self.rows(positions)
        mirrored = np.zeros(len(rows), bool)
        if self._flip:
            mirrored = uniform(self._seed, Purpose.FLIP, positions, step=0) < 0.5
        return self._data.gather(rows, mirrored), self._data.labels[rows]

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """Positions int64 (n,) to rows of the data set, int64 (n,)."""
        rows = np.empty(len(positions), np.int64)
        for epoch in np.unique(positions // self._count):
            if self._order[0] != epoch:
                order = permutation(self._seed, Purpose.DATA_ORDER, int(epoch), self._count)
                self._order = (int(epoch), order)
            in_epoch = positions // self._count == epoch  # bool (n,)
            rows[in_epoch] = self._order[1][positions[in_epoch] % self._count]
        return rows
