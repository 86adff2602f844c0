"""Photographs as the field prepares them: decoded by Pillow, made RGB, and cropped as ADM crops.

The crop decides pixels and so has a name, which the prepared data set and everything trained on it carries: CROP.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from harness.errors import UserError
from harness.images.files import FILE_BYTES, PIXELS
from harness.images.source import printable

if TYPE_CHECKING:
    from PIL.Image import Image

CROP = "adm-center"
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
PLAIN_MODES = ("RGB", "L")  # others lose something, or are read differently by other tools, when they become RGB


class Photograph(NamedTuple):
    """pixels: uint8 (size, size, 3). note: what was done to it that is worth telling; None: nothing."""

    pixels: np.ndarray
    note: str | None


class Broken(UserError):
    """An image that cannot be used; the message says why, and not which."""


def decode(data: bytes, size: int, name: str) -> Photograph:
    """An image file as a square of `size` pixels. `name` is the file's, to be compared with its content. Broken where it
    is no image, is cut off, has too many pixels (as it is or resized), or more than 8 bits a channel in grey. The orientation in EXIF is not applied: nobody's ImageNet does."""
    from PIL import Image

    if len(data) > FILE_BYTES:
        raise Broken(f"more than {FILE_BYTES >> 20} MiB: no image of a data set is that large")
    if not data:
        raise Broken("an empty file")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > PIXELS:
                raise Broken(f"{image.width} x {image.height} pixels are more than {PIXELS}")
            if image.mode[0] in "IF":  # I;16, I, F: Pillow would clip all above 255 to white
                raise Broken(f"more than 8 bits a channel (colour mode {image.mode}); convert it to 8 bits")
            image.load()
            note = _note(image, name)
            return Photograph(np.asarray(center_crop(image.convert("RGB"), size)), note)
    except Broken:
        raise
    except Exception as error:  # Pillow's plug-ins raise anything on broken bytes
        text = str(error) or type(error).__name__
        if "cannot identify" in text:
            raise Broken("no image that Pillow can read (JPEG, PNG, WebP, GIF, BMP)") from error
        raise Broken(f"damaged or cut off ({printable(text)})") from error


def center_crop(image: Image, size: int) -> Image:
    """ADM's centre crop (openai/guided-diffusion, image_datasets.py, center_crop_arr; DiT's train.py has the same): halve
    by averages while the shorter side is at least twice `size`, then bicubic until it is `size`, then cut the middle. Broken where
    the resized image, before the cut, would have more than PIXELS pixels."""
    from PIL.Image import Resampling

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > PIXELS:
        raise Broken(
            f"so narrow that {image.width} x {image.height} pixels would be resized to {width} x {height}, which is more "
            f"than {PIXELS} pixels"
        )
    image = image.resize((width, height), Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _note(image: Image, name: str) -> str | None:
    if image.mode not in PLAIN_MODES:
        return f"{image.mode} {image.format} converted to RGB"
    if image.format not in ("JPEG", "MPO") and name.lower().endswith((".jpg", ".jpeg")):
        return f"{image.format} under the name of a JPEG"
    return None
