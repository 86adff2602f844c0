"""One door to images, however they are kept: npz, npy, shards, folders of image files, tar files, a live generator.

`open_images` looks at what a path is and answers with an `ImageSource`, which hands out uint8 (n, H, W, C) batches in a
fixed order and holds one batch at a time; a deflated npz is read through, never unpacked whole. Everything here reads
strangers' bytes: nothing is executed, nothing is written, no link in an archive is followed, and what is broken ends in
one UserError. Zip and PNG carry checksums, which are always compared; npy, tar and JPEG have none for their pixels, so
there only what contradicts itself (sizes, structure) can be found.
"""

from __future__ import annotations

import hashlib
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from harness.errors import RunError, UserError

WANTED = "wanted uint8 (N, H, W, C) in [0, 255] with C 1 or 3"


LAYOUTS = "an .npz, an .npy, a folder of PNG files, shards (*.npz or *.tar, a folder or a pattern of them)"


WHOLE_BYTES = 2 << 30  # most that is ever held at once: Fortran-ordered arrays, `ImageSource.array`


# what zipfile, zlib and numpy raise on broken bytes; UserError and RunError are let through before it
BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError, RuntimeError)


BROKEN += (OverflowError, struct.error, LookupError, TypeError, MemoryError)


class ImageSource:
    """Images in a fixed order, read in batches.

    name: what messages call it. count: N; None for a generator that has not been read to its end. shape: (H, W, C).
    labels: int64 (N,) or None. extra_arrays: names of an npz's other arrays (mu, sigma, ...). lossy: an image was
    stored with loss (JPEG, lossy WebP). notes: what a reader of the numbers should know; conversions are added while
    images are read. `chunks(size)` yields uint8 (n, H, W, C) arrays of any n; once: it works a single time.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, int, int],
        chunks: Callable[[int], Iterable[np.ndarray]],
        *,
        count: int | None,
        labels: np.ndarray | None = None,
        lossy: bool = False,
        notes: Iterable[str] = (),
        extra_arrays: Iterable[str] = (),
        mapped: np.ndarray | None = None,  # the same images as a read-only memory map
        once: bool = False,
    ):
        self.name, self.shape, self.count, self.labels, self.lossy = name, shape, count, labels, lossy
        self.extra_arrays = tuple(extra_arrays)
        self.chunks, self._mapped, self._once = chunks, mapped, once
        self._notes = dict.fromkeys(notes)
        self._started, self._digest = False, None

    def __repr__(self) -> str:
        return f"ImageSource({self.name!r}, count={self.count}, shape={self.shape})"

    @property
    def notes(self) -> tuple[str, ...]:
        """One line each, in the order in which they were found."""
        return tuple(self._notes)

    @property
    def content_known(self) -> bool:
        """Whether `sha256` is to be had without another pass."""
        return self._digest is not None

    def note(self, text: str) -> None:
        """Add a note; one that is there already is not repeated."""
        self._notes.setdefault(text)

    def batches(self, size: int = 256) -> Iterator[np.ndarray]:
        """uint8 (n, H, W, C) with n = `size` but for the last; read-only where it can be. UserError, at the latest after
        the last batch, when anything is broken: a number may be formed only from a pass that came to its end."""
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        if self._once and self._started:
            raise UserError(f"{self.name}: its images can be read only once; write them to an npz, or give a list")
        self._started = True
        digest = None if self._digest or self.count is None else self._hasher(self.count)
        seen = 0
        for batch in _rebatched(self.chunks(size), size):
            seen += len(batch)
            if digest is not None:
                digest.update(np.ascontiguousarray(batch))
            yield batch
        if self.count is not None and seen != self.count:
            raise UserError(f"{self.name}: {seen} images came where {self.count} were promised; correct the count")
        if seen == 0:
            raise UserError(f"{self.name}: there are no images")
        self.count = seen
        if digest is not None:
            self._digest = digest.hexdigest()

    def sha256(self) -> str:
        """`evaluators.reference.images_sha256` of the images, whatever they are kept in. Free after a whole pass over
        `batches`, else it makes one; of one-time images without a count it cannot be had (N is hashed first)."""
        if self._digest is None and self.count is None and self._once:
            raise UserError(f"{self.name}: a hash needs the number of images beforehand; give count=N")
        while self._digest is None:  # twice where the first pass only finds N
            for _ in self.batches():
                pass
        return self._digest

    def array(self, limit: int = WHOLE_BYTES) -> np.ndarray:
        """All images as uint8 (N, H, W, C), checked to the end: a memory map where there is one, else in memory;
        UserError above `limit` bytes."""
        if self._mapped is not None:
            self.sha256()
            return self._mapped
        if self.count is not None and self.count * int(np.prod(self.shape)) > limit:
            size = self.count * int(np.prod(self.shape)) / 2**30
            raise UserError(
                f"{self.name}: {size:.1f} GiB would have to be held at once; store it as an uncompressed npz"
            )
        parts, held = [], 0
        for batch in self.batches():
            held += batch.nbytes
            if held > limit:
                raise UserError(f"{self.name}: more than {limit / 2**30:.1f} GiB came; write it to an uncompressed npz")
            parts.append(batch)
        return np.concatenate(parts)

    @property
    def mapped(self) -> bool:
        """Whether `array` is had without reading: a memory map, or an array that was there before."""
        return self._mapped is not None

    def over(self, images: np.ndarray) -> ImageSource:
        """The same images, held in `images` uint8 (N, H, W, C) after a whole pass; what is known of them goes along."""
        copy = ImageSource(
            self.name,
            self.shape,
            lambda size: (images[i : i + size] for i in range(0, len(images), size)),
            count=len(images),
            labels=self.labels,
            lossy=self.lossy,
            notes=self.notes,
            extra_arrays=self.extra_arrays,
            mapped=images,
        )
        copy._digest = self._digest
        return copy

    def _hasher(self, count: int):
        return hashlib.sha256(f"uint8 {(count, *self.shape)}\n".encode())


def from_batches(
    batches: Iterable[np.ndarray],
    count: int | None = None,
    *,
    labels: np.ndarray | None = None,
    name: str = "the generator",
) -> ImageSource:
    """Images that a program makes: uint8 (n, H, W, C) arrays from a list (read again at will) or an iterator (once).

    count: how many are taken, so an endless generator is fine; fewer are refused. None: all that come.
    """
    if count is not None and count < 1:
        raise UserError(f"{name}: {count} images are none; give a count of 1 or more")
    iterator = iter(batches)
    once = iterator is batches
    first = next(iterator, None)
    if first is None:
        raise UserError(f"{name}: there are no images")
    shape = _checked(name, first).shape[1:]

    def chunks(_size: int) -> Iterator[np.ndarray]:
        left = count
        for batch in _chain(first, iterator) if once else batches:
            batch = _checked(name, batch, shape)
            if left is not None:
                batch = batch[:left]
                left -= len(batch)
            yield np.array(batch) if once else batch  # a program may use its buffer again
            if left == 0:
                return

    if labels is not None:
        labels = np.asarray(labels)
        if labels.dtype.kind not in "iu" or labels.ndim != 1 or count not in (None, len(labels)):
            raise UserError(f"{name}: labels are {labels.dtype} {labels.shape}; wanted one integer an image")
        labels, count = labels.astype(np.int64), len(labels)
    return ImageSource(name, shape, chunks, count=count, labels=labels, once=once)


def _chain(first: np.ndarray, rest: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    yield first
    yield from rest


def _checked(name: str, batch: np.ndarray, shape: tuple[int, ...] | None = None) -> np.ndarray:
    batch = np.asarray(batch)
    if batch.dtype != np.uint8 or batch.ndim != 4 or 0 in batch.shape[1:] or batch.shape[3] not in (1, 3):
        raise UserError(f"{name}: a batch is {batch.dtype} {batch.shape}{hint(batch.shape, batch)}; {WANTED}")
    if shape is not None and batch.shape[1:] != shape:
        raise UserError(f"{name}: images of {shape} are followed by {batch.shape[1:]} (H, W, C); make them one size")
    return batch


def _rebatched(chunks: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The same images in batches of `size`, copied only where a batch spans two chunks."""
    held: list[np.ndarray] = []
    missing = size
    for chunk in chunks:
        while len(chunk):
            part, chunk = chunk[:missing], chunk[missing:]
            held.append(part)
            missing -= len(part)
            if not missing:
                yield held[0] if len(held) == 1 else np.concatenate(held)
                held, missing = [], size
    if held:
        yield held[0] if len(held) == 1 else np.concatenate(held)


@contextmanager
def readable(where: str | Path) -> Iterator[None]:
    """Turn what readers raise on broken bytes into one line."""
    try:
        yield
    except (UserError, RunError):
        raise
    except BROKEN as error:
        reason = printable(str(error) or type(error).__name__)
        raise UserError(
            f"{where} cannot be read ({reason}): damaged, or cut off while it was written; make it again"
        ) from error


class Damaged(Exception):
    """An image whose bytes contradict each other."""


BROKEN += (Damaged,)


def printable(text: str) -> str:
    """A stranger's text on one line, of bearable length."""
    text = "".join(each if each.isprintable() else "?" for each in text)
    return text if len(text) <= 200 else text[:197] + "..."


def natural(items: Iterable, name: Callable = lambda each: str(each)) -> list:
    """Sorted by name, runs of digits as numbers: 2 before 10."""

    def key(item):
        parts = re.split(r"([0-9]+)", name(item))  # text and digits in turns
        return [(len(p.lstrip("0")), p.lstrip("0")) if i % 2 else p for i, p in enumerate(parts)], name(item)

    return sorted(items, key=key)


def joined(name: str, parts: list[ImageSource]) -> ImageSource:
    """Shards, one after the other."""
    if not parts:
        raise UserError(f"{name}: nothing matches; images are read from {LAYOUTS}")
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    for part in parts[1:]:
        if part.shape != first.shape:
            raise UserError(f"{first.name} has images {first.shape}, {part.name} {part.shape} (H, W, C); keep one size")
        if (part.labels is None) != (first.labels is None):
            bare = part if part.labels is None else first
            raise UserError(f"{bare.name} has no labels, other shards have; add them or leave them out everywhere")
    joined = ImageSource(
        name,
        first.shape,
        lambda size: (chunk for part in parts for chunk in part.chunks(size)),
        count=sum(part.count for part in parts),
        labels=None if first.labels is None else np.concatenate([part.labels for part in parts]),
        lossy=any(part.lossy for part in parts),
        notes=(f"{len(parts)} shards", *(note for part in parts for note in part.notes)),
        extra_arrays=dict.fromkeys(each for part in parts for each in part.extra_arrays),
    )
    for part in parts:
        part.note = joined.note
    return joined


def hint(shape: tuple[int, ...], head: np.ndarray | None) -> str:
    text = ""
    if head is not None and head.dtype.kind in "iuf" and head.dtype != np.uint8 and head.size:
        text = f" with values in [{head.min():.4g}, {head.max():.4g}]"
    if len(shape) == 4 and shape[1] in (1, 3) and shape[3] not in (1, 3):
        text += ", channels first"
    return text


def per_call(shape: tuple[int, ...], size: int) -> int:
    """Images a call: `size`, but no more than 64 MiB of them (and at least one)."""
    return max(1, min(size, (1 << 26) // (shape[1] * shape[2] * shape[3])))
