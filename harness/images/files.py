"""Image files (PNG, JPEG, WebP, BMP, GIF, TIFF), decoded strictly.

8-bit grey and RGB are read as stored; palettes and bilevel images are expanded without loss and an opaque alpha channel
is dropped, each with a note; 16 bits, transparency, CMYK and animations are refused by name. EXIF orientation and
colour profiles are not applied (evaluators do not apply them either).
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from harness.errors import UserError
from harness.images.source import Damaged, ImageSource, images_per_chunk, printable
from harness.io.processors import processors

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# endings of images that are not read, so that a note can name them
UNREAD_SUFFIXES = (
    ".avif", ".dng", ".exr", ".hdr", ".heic", ".heif", ".jp2", ".jxl", ".pbm", ".pgm", ".pnm", ".ppm", ".svg", ".tga"
)  # fmt: skip
# made by operating systems and file servers; some hold thumbnails, so their names decide and not their content
SYSTEM_FOLDERS = frozenset(
    {"__MACOSX", "__pycache__", "lost+found", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information"}
)
OWN_FILES = ("records.jsonl",)  # which the harness itself may have written beside images
MAX_FILE_BYTES = 1 << 28  # of an image file
MAX_NAMED = 5  # folders that a note names
MAX_PIXELS = 1 << 26  # of an image (8192 x 8192); a larger one is refused before it is decoded
# format, first bytes of a file, endings
OTHER_FORMATS = (
    ("BMP", (b"BM",), (".bmp",)),
    ("GIF", (b"GIF87a", b"GIF89a"), (".gif",)),
    ("TIFF", (b"II*\0", b"MM\0*"), (".tif", ".tiff")),
)
HEAD_BYTES = 32  # enough of a file to know its format


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """The bytes of an image file: a whole file, or `size` bytes of a tar from `offset`. name: used in messages."""

    name: str
    path: Path
    offset: int = 0
    size: int | None = None  # None: up to the end of the file

    def read(self, limit: int = MAX_FILE_BYTES) -> bytes:
        """All its bytes, or the first `limit` + 1 if it has more than `limit`, so that the caller sees that it has more."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(limit + 1 if self.size is None else min(self.size, limit + 1))


def check_image_file(file: Path | os.DirEntry[str]) -> None:
    """UserError for what has the name of an image and is no file to read: opening a pipe would wait for ever."""
    if not file.is_file():
        raise UserError(
            f"{printable(os.fspath(file))}: a broken link or no plain file; remove it, or put the image there"
        )


def is_system_member(name: str) -> bool:
    """Whether the member `name` of an archive is hidden or lies in a folder of `SYSTEM_FOLDERS`, as __MACOSX/._a.png."""
    *folders, base = name.split("/")
    return base.startswith(".") or not SYSTEM_FOLDERS.isdisjoint(folders)


def notes_on_left_out(files: Sequence[str], folders: Sequence[str]) -> list[str]:
    """Notes on what was left out: files whose names are those of no image, and folders that are no classes."""
    notes = []
    if folders:
        named = ", ".join(printable(each) for each in sorted(folders)[:MAX_NAMED])
        more = ", ..." if len(folders) > MAX_NAMED else ""
        notes.append(f"{len(folders)} folders that are no classes, without images, were left out: {named}{more}")
    others = [each for each in files if each not in OWN_FILES]
    if others:
        notes.append(f"{len(others)} files that are no images were left out")
    if unread := sorted(each for each in others if each.lower().endswith(UNREAD_SUFFIXES)):
        notes.append(f"{len(unread)} of them are images of a format that is not read (first: {printable(unread[0])})")
    return notes


def _sniff(head: bytes, name: str) -> tuple[str, bool, tuple[int, int] | None]:
    """(format, whether its compression is lossy, (H, W) or None) by the first HEAD_BYTES of a file.

    The size is known for PNG alone. UserError for other formats. name: used in messages.
    """
    if head[:8] == b"\x89PNG\r\n\x1a\n" and head[12:16] == b"IHDR":
        width, height = struct.unpack(">II", head[16:24])
        return "PNG", False, (height, width)
    if head[:3] == b"\xff\xd8\xff":
        return "JPEG", True, None
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP", head[12:16] != b"VP8L", None  # VP8L is lossless; VP8X, which may be either, counts as lossy
    # the ending must say it, for a GIF has 256 colours and a TIFF may have more than 8 bits a channel
    for kind, starts, suffixes in OTHER_FORMATS:
        if head.startswith(starts) and name.lower().endswith(suffixes):
            return kind, False, None
    raise UserError(f"{name}: neither PNG, JPEG nor WebP inside, nor what its ending says; remove it, or make it again")


def _check_png(data: bytes) -> None:
    """Compare every chunk with its checksum, up to IEND; Pillow does not check the chunks of the pixels.

    `Damaged` for a broken file, UserError for 16 bits per channel and for an animation. data: the whole file.
    """
    position, kind, first = 8, b"", True
    while kind != b"IEND":
        if position + 12 > len(data):
            raise Damaged("it is cut off")
        length, kind = struct.unpack(">I4s", data[position : position + 8])
        body = position + 8 + length
        if body + 4 > len(data):
            raise Damaged("it is cut off")
        if zlib.crc32(memoryview(data)[position + 4 : body]) != int.from_bytes(data[body : body + 4], "big"):
            raise Damaged("a checksum differs")
        if first and (kind != b"IHDR" or length != 13):
            raise Damaged("it does not start with its header")
        if kind == b"IHDR" and data[position + 16] == 16:  # the bit depth
            raise UserError("16 bits a channel; convert it to 8 bits")
        if kind == b"acTL":
            raise UserError("an animation; keep one picture a file")
        position, first = body + 4, False


def _decode(entry: Entry) -> tuple[np.ndarray, str | None]:
    """(the image, uint8 (H, W, C); a note on how it was converted, or None).

    UserError, which begins with the entry's name, where the file cannot be read or the image cannot be used.
    """
    from PIL import (
        BmpImagePlugin,
        GifImagePlugin,
        JpegImagePlugin,
        PngImagePlugin,
        TiffImagePlugin,
        WebPImagePlugin,
    )

    plugins: dict[str, Callable[[io.BytesIO], Image]] = {
        "BMP": BmpImagePlugin.BmpImageFile,
        "GIF": GifImagePlugin.GifImageFile,
        "TIFF": TiffImagePlugin.TiffImageFile,
        "PNG": PngImagePlugin.PngImageFile,
        "JPEG": JpegImagePlugin.JpegImageFile,
        "WEBP": WebPImagePlugin.WebPImageFile,
    }
    try:
        data = entry.read()
    except OSError as error:
        raise UserError(
            f"{entry.name} cannot be read: {error.strerror or error}; check that it is still there"
        ) from error
    kind, _, _ = _sniff(data[:HEAD_BYTES], entry.name)
    try:
        if len(data) > MAX_FILE_BYTES:
            raise UserError(f"more than {MAX_FILE_BYTES >> 20} MiB; no image of this harness is that large")
        if kind == "PNG":
            _check_png(data)
        with plugins[kind](io.BytesIO(data)) as image:  # the format is known; Image.open would try all of them
            if image.width * image.height > MAX_PIXELS:
                raise UserError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}; resize it first")
            if getattr(image, "n_frames", 1) > 1:
                raise UserError("an animation; keep one picture a file")
            if kind == "TIFF" and image.info.get("compression") in ("jpeg", "tiff_jpeg", "webp"):
                raise UserError("a TIFF that was stored with loss; save it as PNG")
            image.load()
            array, note = _as_grey_or_rgb(image)
    except UserError as error:
        raise UserError(f"{entry.name}: {error}") from None
    except Exception as error:  # Pillow's plug-ins raise anything on broken bytes
        reason = printable(str(error) or type(error).__name__)
        raise UserError(f"{entry.name} cannot be read ({reason}): damaged; make it again") from error
    return array, note


def _as_grey_or_rgb(image: Image) -> tuple[np.ndarray, str | None]:
    """(a Pillow image as grey or RGB, uint8 (H, W, C); a note on the conversion, or None).

    UserError for a mode whose conversion would lose something.
    """
    mode, note = image.mode, None
    if "transparency" in image.info and mode != "P":
        raise UserError("has a transparent colour; save it as plain RGB or grey")
    if mode == "P":
        if "transparency" in image.info:
            raise UserError("a palette with transparency; save it as plain RGB")
        image, note = image.convert("RGB"), "palette images were expanded to RGB"
    elif mode == "1":
        image, note = image.convert("L"), "bilevel images were expanded to grey, 0 and 255"
    elif mode in ("RGBA", "LA"):
        if image.getchannel("A").getextrema() != (255, 255):
            raise UserError("is partly transparent; put it on a background and save it as plain RGB")
        image, note = image.convert(mode[:-1]), "an opaque alpha channel was dropped"
    elif mode not in ("L", "RGB"):
        raise UserError(f"colour mode {mode}; save it as 8-bit RGB or grey")
    array = np.asarray(image, np.uint8)
    return (array[..., np.newaxis] if array.ndim == 2 else array), note


def source_of_files(name: str, entries: list[Entry], labels: list[int] | None, notes: list[str]) -> ImageSource:
    """The source of image files, in the order of `entries`. Sizes are compared as early as the formats allow.

    labels: one per entry, or None.
    """
    # `read` returns one byte more than its limit
    sniffed = [_sniff(entry.read(HEAD_BYTES - 1), entry.name) for entry in entries]
    first, _ = _decode(entries[0])
    height, width, channels = first.shape
    for entry, (_, _, size) in zip(entries, sniffed, strict=True):
        if size is not None and size != (height, width):
            raise _mixed_sizes(entries[0], first.shape, entry, (*size, channels))
    lossy = [entry for entry, (_, loss, _) in zip(entries, sniffed, strict=True) if loss]
    if lossy:
        notes = [*notes, f"{len(lossy)} of {len(entries)} images were stored with loss (first: {lossy[0].name})"]

    def chunks(size: int) -> Iterator[np.ndarray]:
        with ThreadPoolExecutor(min(8, processors())) as pool:  # Pillow decodes without the interpreter's lock
            step = images_per_chunk(first.shape, size)
            for start in range(0, len(entries), step):
                part = entries[start : start + step]
                images = []
                for entry, (image, note) in zip(part, pool.map(_decode, part), strict=True):
                    if image.shape != first.shape:
                        raise _mixed_sizes(entries[0], first.shape, entry, image.shape)
                    if note is not None:
                        source.note(note)  # `source` is the one returned below
                    images.append(image)
                yield np.stack(images)

    labels_array = None if labels is None else np.array(labels, np.int64)
    source = ImageSource(
        name,
        (height, width, channels),
        chunks,
        count=len(entries),
        labels=labels_array,
        lossy=bool(lossy),
        notes=notes,
    )
    return source


def _mixed_sizes(one: Entry, shape: tuple[int, ...], other: Entry, other_shape: tuple[int, ...]) -> UserError:
    """The error for two images of different shapes."""
    return UserError(
        f"{one.name} is {shape} and {other.name} {other_shape} (H, W, C): bring all images to one size first"
    )
