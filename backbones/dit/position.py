"""The fixed position table of a DiT, in numpy, so that every framework casts the same float64 numbers."""

from __future__ import annotations

import numpy as np


def sincos_table(width: int, grid: int) -> np.ndarray:
    """2-D sine-cosine positions of a `grid` by `grid` square of tokens, row by row.

    Returns (grid * grid, width) float64 in [-1, 1]. The first half of the features encodes the column and the second
    half the row; each half is [sin, cos] of position * 10000 ** (-i / (width / 4)).
    Source: facebookresearch/DiT ed81ce2, models.py get_2d_sincos_pos_embed (whose variable emb_h encodes the column).
    """
    assert width % 4 == 0
    frequencies = 10000.0 ** (-np.arange(width // 4, dtype=np.float64) / (width / 4))
    angles = np.arange(grid, dtype=np.float64)[:, None] * frequencies  # (grid, width / 4)
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # (grid, width / 2)
    columns = np.tile(axis, (grid, 1))  # token r * grid + c -> axis[c]
    rows = np.repeat(axis, grid, axis=0)  # token r * grid + c -> axis[r]
    return np.concatenate([columns, rows], axis=1)
