"""A picture of samples beside their nearest training images, to see whether training images were memorised."""

import io
import os
from pathlib import Path

import numpy as np

from harness.errors import UserError
from harness.io import files

_BACKGROUND = 255
_INK = 60
_SMALLEST_TILE = 64  # side in pixels below which a caption does not fit and an image is hard to see
_MARK = ("Software", "backbone-harness: nearest training images")  # of a PNG, by which it is known again
_HEAD_BYTES = 512
_CAPTION = 14  # height in pixels, below each tile


def write_neighbours(
    samples: np.ndarray,  # (R, H, W, C) uint8, the samples from top to bottom, C 1 or 3
    neighbours: np.ndarray,  # (R, k, H, W, C) uint8, the training images nearest to each sample, nearest first
    path: str | os.PathLike,
    *,
    sample_captions: list[str],  # below each sample, such as its number
    neighbour_captions: list[list[str]],  # below each neighbour, such as its number and distance
    scale: int | None = None,  # integer enlargement; None: the least that makes the shorter side _SMALLEST_TILE pixels
    gap: int = 4,  # pixels between tiles; four times as much after the sample
) -> Path:
    """Write a PNG with a row for each sample: the sample, then its neighbours, enlarged by repeating pixels; returns its path.

    Raises UserError for arrays of a wrong dtype or shape, and RunError if the file cannot be written.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    _check(samples, neighbours, sample_captions, neighbour_captions)
    rows, k = neighbours.shape[:2]
    height, width, channels = samples.shape[1:]
    scale = scale or max(1, -(-_SMALLEST_TILE // min(height, width)))
    tile_height, tile_width = height * scale, width * scale
    row_height = tile_height + _CAPTION + gap
    # First pixel column of the sample and of each neighbour, the same in every row.
    starts = [gap, *(gap + tile_width + 4 * gap + i * (tile_width + gap) for i in range(k))]
    canvas = np.full((rows * row_height + gap, starts[-1] + tile_width + gap, channels), _BACKGROUND, np.uint8)
    for row in range(rows):
        top = gap + row * row_height
        tiles = [samples[row], *neighbours[row]]
        captions = [sample_captions[row], *neighbour_captions[row]]
        for image, text, start in zip(tiles, captions, starts, strict=True):
            tile = image.repeat(scale, axis=0).repeat(scale, axis=1)  # (H * scale, W * scale, C)
            canvas[top : top + tile_height, start : start + tile_width] = tile
            below = slice(top + tile_height, top + tile_height + _CAPTION)
            canvas[below, start : start + tile_width] = _caption(text, tile_width)[..., None]
    picture = Image.fromarray(canvas[..., 0] if channels == 1 else canvas)
    encoded, about = io.BytesIO(), PngInfo()
    about.add_text(*_MARK)
    picture.save(encoded, format="PNG", pnginfo=about)
    files.write_bytes(Path(path), encoded.getvalue(), shared=True)  # shared: other processes may write it, too
    return Path(path)


def is_neighbours_picture(path: Path) -> bool:
    """Whether the file at `path` is a picture that `write_neighbours` wrote, which another one may replace."""
    try:
        with path.open("rb") as file:
            return b"tEXt" + b"\0".join(part.encode() for part in _MARK) in file.read(_HEAD_BYTES)
    except OSError:
        return False


def _check(
    samples: np.ndarray, neighbours: np.ndarray, sample_captions: list[str], neighbour_captions: list[list[str]]
) -> None:
    """Raises UserError for arguments of `write_neighbours` that do not fit."""
    is_valid = samples.dtype == neighbours.dtype == np.uint8 and samples.ndim == 4 and samples.shape[3] in (1, 3)
    if not is_valid or 0 in (*samples.shape, *neighbours.shape):
        raise UserError(
            f"a picture of neighbours needs uint8 images (N, H, W, 1 or 3), not {samples.dtype} {samples.shape}"
        )
    if neighbours.ndim != 5 or neighbours.shape[:1] + neighbours.shape[2:] != samples.shape:
        raise UserError(
            f"samples {samples.shape} and their neighbours {neighbours.shape} do not fit: need (R, k, H, W, C)"
        )
    if len(sample_captions) != len(samples) or [len(row) for row in neighbour_captions] != [neighbours.shape[1]] * len(
        samples
    ):
        raise UserError(
            f"a picture of {neighbours.shape[:2]} neighbours needs a caption for each of them and each sample"
        )


def _caption(text: str, width: int) -> np.ndarray:
    """Dark text on white, cut off after `width` pixels: uint8 (_CAPTION, width)."""
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.new("L", (width, _CAPTION), _BACKGROUND)
    ImageDraw.Draw(picture).text((0, 1), text, font=ImageFont.load_default(size=_CAPTION - 4), fill=_INK)
    return np.asarray(picture)
