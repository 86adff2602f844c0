"""Decoding and cropping of photographs as in ADM and DiT: decoded by Pillow, converted to RGB, center-cropped.

The crop decides the pixels, so it has a name, CROP, which prepared data sets record.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from harness.errors import UserError
from harness.images.files import MAX_FILE_BYTES, MAX_PIXELS
from harness.images.source import printable

if TYPE_CHECKING:
    from PIL.Image import Image

CROP = "adm-center"
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
PLAIN_MODES = ("RGB", "L")  # in others the conversion to RGB loses something or differs between tools


class Photograph(NamedTuple):
    """A decoded image. pixels: uint8 (size, size, 3). note: see `_note`; None: there is none."""

    pixels: np.ndarray
    note: str | None


class Broken(UserError):
    """An image cannot be used. The message says why, the caller adds which image."""


def decode(data: bytes, size: int, name: str) -> Photograph:
    """Decode an image file and crop it to a square of `size` pixels per side.

    data: content of the file. name: of the file; a suffix that contradicts the content gives a note. Broken where it is
    no image, is cut off, has too many pixels (before or after resizing) or more than 8 bits per channel. The orientation
    in EXIF is not applied, as in ADM's and DiT's preparation of ImageNet.
    """
    from PIL import Image

    if len(data) > MAX_FILE_BYTES:
        raise Broken(f"more than {MAX_FILE_BYTES >> 20} MiB: no image of a data set is that large")
    if not data:
        raise Broken("an empty file")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Broken(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
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
            raise Broken("no image that Pillow can read (JPEG, PNG, WebP, GIF, BMP, TIFF)") from error
        raise Broken(f"damaged or cut off ({printable(text)})") from error


def center_crop(image: Image, size: int) -> Image:
    """ADM's center crop (openai/guided-diffusion, image_datasets.py, center_crop_arr; the same in DiT's train.py).

    While the shorter side is at least twice `size`, the image is halved by box averages. Then it is resized bicubically so
    that this side is `size`, and cut to its middle. Broken where it would have more than MAX_PIXELS pixels before the cut.
    """
    from PIL.Image import Resampling

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > MAX_PIXELS:
        raise Broken(
            f"so narrow that {image.width} x {image.height} pixels would be resized to {width} x {height}, which is more "
            f"than {MAX_PIXELS} pixels"
        )
    image = image.resize((width, height), Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _note(image: Image, name: str) -> str | None:
    """A note on a conversion to RGB, or on a suffix .jpg of a file that is no JPEG; None: neither."""
    if image.format in ("GIF", "TIFF", "WEBP", "PNG") and getattr(image, "n_frames", 1) > 1:
        return f"only the first image of several in a {image.format}"
    if image.mode not in PLAIN_MODES:
        return f"{image.mode} {image.format} converted to RGB"
    # Pillow calls a JPEG that holds further pictures MPO
    if image.format not in ("JPEG", "MPO") and name.lower().endswith((".jpg", ".jpeg", ".jfif")):
        return f"{image.format} under the name of a JPEG"
    return None
