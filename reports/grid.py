"""Sample grids: a row for each class with its label at the left, and pictures of one class with text around them."""

import io
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from harness.errors import UserError
from harness.io import files

MAX_ROWS = 20  # rows of a grid whose classes are not given
_BACKGROUND = 255
_SMALLEST_TILE = 48  # pixels; an image whose shorter side is smaller is hard to see on a screen
PICTURE_GAP = 2  # pixels between the images of `write_picture`, and around them
_SMALLEST_PICTURE = 240  # pixels: width that the text of a picture has at least
_HEADING_SIZE = 12  # pixels, of the text above columns
_CAPTION_SIZES = (16, 12)  # of the first line below the images, and of the others


def write_grid(
    images: np.ndarray,  # (N, H, W, C) uint8 in [0, 255], C 1 or 3
    labels: np.ndarray,  # (N,) integer class of each image
    path: str | os.PathLike,
    *,
    columns: int = 10,  # images of each class; the row of a class with fewer is shorter
    scale: int | None = None,  # integer enlargement; None: the least that makes the shorter side _SMALLEST_TILE pixels
    classes: Sequence[int] | None = None,  # rows from top to bottom; None: the MAX_ROWS smallest labels, ascending
    gap: int = 2,  # pixels between tiles
) -> Path:
    """Write a PNG with the first `columns` images of each class, enlarged by repeating pixels; returns its path.

    Raises UserError for arrays of a wrong dtype, shape or length, and RunError if the file cannot be written.
    """
    from PIL import Image

    _check(images, labels, columns, scale)
    if classes is not None and not len(classes):
        raise UserError("a sample grid needs at least one class")
    height, width = images.shape[1:3]
    scale = scale or max(1, -(-_SMALLEST_TILE // min(height, width)))
    rows = sorted({int(label) for label in labels})[:MAX_ROWS] if classes is None else [int(label) for label in classes]
    tile_height, tile_width = height * scale, width * scale
    captions = [_caption(str(label), min(tile_height, 24)) for label in rows]
    margin = max(caption.shape[1] for caption in captions) + 12
    total_height = len(rows) * (tile_height + gap) + gap
    total_width = margin + columns * (tile_width + gap) + gap
    canvas = np.full((total_height, total_width, images.shape[3]), _BACKGROUND, np.uint8)
    for row, (label, caption) in enumerate(zip(rows, captions, strict=True)):
        top = gap + row * (tile_height + gap)
        caption_top = top + max((tile_height - caption.shape[0]) // 2, 0)  # in the middle of the row
        right = margin - 6
        canvas[caption_top : caption_top + caption.shape[0], right - caption.shape[1] : right] = caption[..., None]
        for column, index in enumerate(np.flatnonzero(labels == label)[:columns]):
            left = margin + gap + column * (tile_width + gap)
            tile = images[index].repeat(scale, axis=0).repeat(scale, axis=1)  # (H * scale, W * scale, C)
            canvas[top : top + tile_height, left : left + tile_width] = tile
    picture = Image.fromarray(canvas[..., 0] if canvas.shape[2] == 1 else canvas)
    return _save(picture, path)


def write_picture(
    tiles: np.ndarray,  # (R, K, H, W, C) uint8 in [0, 255], C 1 or 3: R rows of K images
    path: str | os.PathLike,
    *,
    headings: Sequence[str] = (),  # above the columns; empty, or one for each
    caption: Sequence[str] = (),  # lines below, the first one larger; a line that is too long is wrapped
) -> Path:
    """Write a PNG of images in rows, with text above and below, and none between them; returns its path.

    The first image begins PICTURE_GAP pixels from the left edge, and at `headings_height(headings)` from the top. All are
    enlarged by repeating pixels, as in `write_grid`, and further until the headings fit above their columns. Raises
    RunError if the file cannot be written.
    """
    from PIL import Image, ImageDraw, ImageFont

    rows, columns, height, width, channels = tiles.shape
    scale = picture_scale(height, width, headings)
    cell_height, cell_width = height * scale + PICTURE_GAP, width * scale + PICTURE_GAP
    top = headings_height(headings)
    total_width = max(columns * cell_width + PICTURE_GAP, _SMALLEST_PICTURE)
    lines = [
        (part, font)
        for number, line in enumerate(caption)
        for font in [ImageFont.load_default(size=_CAPTION_SIZES[min(number, 1)])]
        for part in _wrapped(line, font.getlength, total_width - 2 * PICTURE_GAP)
    ]
    text_height = sum(_line_height(font) for _, font in lines) + (2 * PICTURE_GAP if lines else 0)
    picture = Image.new("RGB" if channels == 3 else "L", (total_width, top + rows * cell_height + text_height), "white")
    draw = ImageDraw.Draw(picture)
    heading_font = ImageFont.load_default(size=_HEADING_SIZE)
    for column, heading in enumerate(headings):
        middle = PICTURE_GAP + column * cell_width + width * scale / 2
        draw.text((middle, top / 2), heading, font=heading_font, fill="black", anchor="mm")
    for row in range(rows):
        for column in range(columns):
            tile = tiles[row, column].repeat(scale, axis=0).repeat(scale, axis=1)  # (H * scale, W * scale, C)
            image = Image.fromarray(tile[..., 0] if channels == 1 else tile)
            picture.paste(image, (PICTURE_GAP + column * cell_width, top + row * cell_height))
    y = top + rows * cell_height + PICTURE_GAP
    for line, font in lines:
        draw.text((PICTURE_GAP, y), line, font=font, fill="black")
        y += _line_height(font)
    return _save(picture, path)


def picture_scale(height: int, width: int, headings: Sequence[str] = ()) -> int:
    """The integer by which `write_picture` enlarges images of this size."""
    from PIL import ImageFont

    font = ImageFont.load_default(size=_HEADING_SIZE)
    widest = max((font.getlength(heading) + 4 for heading in headings), default=0)
    return max(1, -(-_SMALLEST_TILE // min(height, width)), math.ceil(widest / width))


def headings_height(headings: Sequence[str]) -> int:
    """Pixels above the first row of `write_picture`."""
    return 2 * _HEADING_SIZE if headings else PICTURE_GAP


def _line_height(font: Any) -> int:
    return int(font.size * 1.4)


def _wrapped(text: str, length: Callable[[str], float], width: float) -> list[str]:
    """The words of `text` as lines of at most `width` pixels where its words allow it. length: of a text, in pixels."""
    lines: list[str] = []
    for word in text.split():
        if lines and length(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _save(picture: Any, path: str | os.PathLike) -> Path:
    """Write a PIL image as PNG, atomically."""
    encoded = io.BytesIO()
    picture.save(encoded, format="PNG")
    files.write_bytes(Path(path), encoded.getvalue(), shared=True)  # shared: other processes may write it, too
    return Path(path)


def _check(images: np.ndarray, labels: np.ndarray, columns: int, scale: int | None) -> None:
    """Raises UserError for arguments of `write_grid` that do not fit."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
        raise UserError(
            f"a sample grid needs uint8 images of shape (N, H, W, 1 or 3), not {images.dtype} {images.shape}"
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise UserError(f"a sample grid needs {len(images)} integer labels, not {labels.dtype} {labels.shape}")
    if columns < 1 or (scale is not None and scale < 1):
        raise UserError(f"a sample grid needs at least 1 column and scale 1, not {columns} and {scale}")


def _caption(text: str, size: int) -> np.ndarray:
    """Dark text on white, uint8 (height, width), cropped to the text. size: height of a line in pixels, about."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=max(size * 3 // 4, 8))
    left, top, right, bottom = (int(edge) for edge in font.getbbox(text))
    picture = Image.new("L", (right - left, bottom - top), _BACKGROUND)
    ImageDraw.Draw(picture).text((-left, -top), text, font=font, fill=60)
    return np.asarray(picture)
