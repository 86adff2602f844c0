"""`ImageSource`: uint8 images in batches, whatever they are stored in, and what its readers share.

A source yields uint8 (n, H, W, C) batches in a fixed order and holds one batch at a time. The readers (`npz`, `files`,
`tars`; `harness.images.open` chooses one) read untrusted files: nothing is executed, nothing is written, no link in
an archive is followed, and a damaged file ends in one UserError. The checksums of zip and PNG are always compared; npy,
tar and JPEG have none for their pixels, so there only contradictions (sizes, structure) are found.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from harness.errors import RunError, UserError, shown

if TYPE_CHECKING:
    from hashlib import _Hash

T = TypeVar("T")

WANTED = "wanted uint8 (N, H, W, C) in [0, 255] with C 1 or 3"
LAYOUTS = "an .npz, an .npy, a folder of PNG files, shards (*.npz or *.tar, a folder or a pattern of them)"
# limit of `ImageSource.array` and of arrays in Fortran order, which are held in memory as a whole
WHOLE_BYTES = 2 << 30
CHUNK_BYTES = 1 << 26  # of pixels that a reader decodes at once; more only if one image is larger


class Damaged(Exception):
    """Bytes of a file that contradict each other; `readable` turns it into a UserError that names the file."""


# what zipfile, zlib, numpy and the readers raise on damaged bytes
BROKEN = (
    zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError, RuntimeError, OverflowError,
    struct.error, LookupError, TypeError, MemoryError, Damaged,
)  # fmt: skip


class ImageSource:
    """Images in a fixed order, read in batches.

    name: used in messages. shape: (H, W, C). chunks: chunks(size) yields uint8 (n, H, W, C) arrays; n may differ from
    `size`. count: N; None for a generator that has not been read to its end. labels: int64 (N,), or None. lossy: whether
    any image was stored with loss (JPEG, lossy WebP). notes: lines to show with every number that is computed from the
    images; readers add to them. extra_arrays: names of the other arrays of an npz (mu, sigma, ...). mapped: the same
    images as one array uint8 (N, H, W, C), in memory or mapped; None: there is none (the property `mapped` is only
    whether there is one). once: whether `chunks` can be called only once.
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
        mapped: np.ndarray | None = None,
        once: bool = False,
    ):
        self.name, self.shape, self.count, self.labels, self.lossy = name, shape, count, labels, lossy
        self.extra_arrays = tuple(extra_arrays)
        self.classes: tuple[str, ...] = ()  # names of which the labels are positions; empty: labels are numbers
        self.chunks, self._mapped, self._once = chunks, mapped, once
        self._notes = dict.fromkeys(notes)
        self._logged: set[str] = set()
        self._started = False
        self._digest: str | None = None

    def __repr__(self) -> str:
        return f"ImageSource({self.name!r}, count={self.count}, shape={self.shape})"

    @property
    def notes(self) -> tuple[str, ...]:
        """The notes, one line each, in the order in which they were added."""
        return tuple(self._notes)

    @property
    def content_known(self) -> bool:
        """Whether `sha256` is known already, so that it needs no pass over the images."""
        return self._digest is not None

    def first_time(self, text: str) -> bool:
        """Whether this was not called with the note `text` before; used to log a note once."""
        new = text not in self._logged
        self._logged.add(text)
        return new

    def note(self, text: str) -> None:
        """Add a note, unless it is there already."""
        self._notes.setdefault(text)

    def batches(self, size: int = 256) -> Iterator[np.ndarray]:
        """Yields uint8 (n, H, W, C), n = `size` in all but the last batch; read-only where possible.

        Damage raises UserError, at the latest after the last batch, so results are valid only if a pass ends without it.
        A complete pass also sets `count`, and the hash if `count` was known before.
        """
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        if self._once and self._started:
            raise UserError(f"{self.name}: its images can be read only once; write them to an npz, or give a list")
        self._started = True
        digest = None if self._digest or self.count is None else pixel_hash((self.count, *self.shape))
        seen = 0
        for batch in _rebatched(self.chunks(size), size):
            seen += len(batch)
            if digest is not None:
                digest.update(np.ascontiguousarray(batch).data)
            yield batch
        if self.count is not None and seen != self.count:
            raise UserError(f"{self.name}: {seen} images came, {self.count} were expected; correct the count")
        if seen == 0:
            raise UserError(f"{self.name}: there are no images")
        self.count = seen
        if digest is not None:
            self._digest = digest.hexdigest()

    def sha256(self) -> str:
        """`evaluators.reference.images_sha256` of the images: it depends on pixels and order, not on the storage.

        It is known after a complete pass over `batches` with a known count; otherwise this makes up to two passes. UserError
        for images that can be read only once and have no count, because N is hashed before the pixels.
        """
        if self._digest is None and self.count is None and self._once:
            raise UserError(f"{self.name}: a hash needs the number of images beforehand; give count=N")
        while self._digest is None:  # two passes where the first one only finds N
            for _ in self.batches():
                pass
        return self._digest

    def array(self, limit: int = WHOLE_BYTES) -> np.ndarray:
        """All images as one array uint8 (N, H, W, C), read and checked to the end.

        A memory map where the storage allows it. Otherwise it is in memory, and UserError above `limit` bytes.
        """
        if self._mapped is not None:
            self.sha256()  # unless its result is known, this is a pass over all images, which finds damage
            return self._mapped
        if self.count is not None and self.count * int(np.prod(self.shape)) > limit:
            size = self.count * int(np.prod(self.shape)) / 2**30
            raise UserError(
                f"{self.name}: {size:.1f} GiB would have to be held at once; store it as an uncompressed npz"
            )
        parts, nbytes = [], 0
        for batch in self.batches():
            nbytes += batch.nbytes
            if nbytes > limit:
                raise UserError(f"{self.name}: more than {limit / 2**30:.1f} GiB came; write it to an uncompressed npz")
            parts.append(batch)
        return np.concatenate(parts)

    @property
    def mapped(self) -> bool:
        """Whether the images are one array already, mapped or in memory, so that `array` copies nothing."""
        return self._mapped is not None

    def backed_by(self, images: np.ndarray) -> ImageSource:
        """A copy of this source that reads its images from `images`, uint8 (N, H, W, C), which hold all of them."""
        copy = ImageSource(
            self.name,
            self.shape,
            slices(images),
            count=len(images),
            labels=self.labels,
            lossy=self.lossy,
            notes=self.notes,
            extra_arrays=self.extra_arrays,
            mapped=images,
        )
        copy._digest = self._digest
        return copy


def slices(images: np.ndarray) -> Callable[[int], Iterator[np.ndarray]]:
    """The function `chunks` of a source whose images are the array `images`, (N, H, W, C); it yields views."""
    return lambda size: (images[i : i + size] for i in range(0, len(images), size))


def pixel_hash(shape: tuple[int, ...]) -> _Hash:
    """A SHA-256 object, fed with a header for uint8 images of `shape` (N, H, W, C); feed it all pixels in order next."""
    return hashlib.sha256(f"uint8 {shape}\n".encode())


def from_batches(
    batches: Iterable[np.ndarray],
    count: int | None = None,
    *,
    labels: np.ndarray | None = None,
    name: str = "the generator",
) -> ImageSource:
    """The source of images that a program makes: uint8 (n, H, W, C) arrays.

    batches: a list can be read again, an iterator once. count: number of images to take, also from an endless
    generator; UserError if there are fewer; None: all. labels: integers (N,), one for each image, or None. UserError if
    there are more images than labels and no count.
    """
    if count is not None and (not isinstance(count, int | np.integer) or count < 1):
        raise UserError(f"{name}: count is {shown(count)}; give 1 or more")
    if not isinstance(batches, Iterable):
        raise UserError(f"{name}: {shown(batches)} gives no images; give a list or a generator of arrays")
    iterator = iter(batches)
    once = iterator is batches  # iter() of an iterator is the iterator itself, of a list a new one
    first = next(iterator, None)
    if first is None:
        raise UserError(f"{name}: there are no images")
    shape = _as_batch(name, first).shape[1:]
    count_given = count is not None
    if labels is not None:
        labels = np.asarray(labels)
        if labels.dtype.kind not in "iu" or labels.ndim != 1 or count not in (None, len(labels)):
            raise UserError(f"{name}: labels are {labels.dtype} {labels.shape}; wanted one integer per image")
        labels, count = labels.astype(np.int64), len(labels)

    def chunks(_size: int) -> Iterator[np.ndarray]:
        left = count  # images still to take; None: no limit
        for batch in itertools.chain([first], iterator) if once else batches:
            batch = _as_batch(name, batch, shape)
            if not count_given and left is not None and len(batch) > left:
                raise UserError(
                    f"{name}: more images came than there are labels ({count}); give one label per image, or count={count}"
                )
            if left is not None:
                batch = batch[:left]
                left -= len(batch)
            yield np.array(batch) if once else batch  # copied: a generator may reuse its buffer
            if left == 0 and count_given:
                return

    return ImageSource(name, shape, chunks, count=count, labels=labels, once=once)


def _as_batch(name: str, batch: np.ndarray, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """The batch as an array; UserError unless it is uint8 (n, H, W, C), with (H, W, C) equal to `shape` if that is given."""
    batch = np.asarray(batch)
    if batch.dtype != np.uint8 or batch.ndim != 4 or 0 in batch.shape[1:] or batch.shape[3] not in (1, 3):
        raise UserError(f"{name}: a batch is {batch.dtype} {batch.shape}{mistake_hint(batch.shape, batch)}; {WANTED}")
    if shape is not None and batch.shape[1:] != shape:
        raise UserError(f"{name}: images of {shape} are followed by {batch.shape[1:]} (H, W, C); make them one size")
    return batch


def _rebatched(chunks: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The images of `chunks` in batches of `size`; copied only where a batch spans two chunks."""
    parts: list[np.ndarray] = []
    missing = size
    for chunk in chunks:
        while len(chunk):
            part, chunk = chunk[:missing], chunk[missing:]
            parts.append(part)
            missing -= len(part)
            if not missing:
                yield parts[0] if len(parts) == 1 else np.concatenate(parts)
                parts, missing = [], size
    if parts:
        yield parts[0] if len(parts) == 1 else np.concatenate(parts)


@contextmanager
def readable(name: str | Path) -> Iterator[None]:
    """Turn the exceptions of readers on damaged bytes (`BROKEN`) into a UserError of one line that begins with `name`."""
    try:
        yield
    except (UserError, RunError):  # a ValueError and a RuntimeError, which BROKEN contains
        raise
    except BROKEN as error:
        reason = printable(str(error) or type(error).__name__)
        raise UserError(
            f"{name} cannot be read ({reason}): damaged, or cut off while it was written; make it again"
        ) from error


def printable(text: str) -> str:
    """Text from a file, for a message: on one line, without control characters, at most 200 characters."""
    text = "".join(each if each.isprintable() else "?" for each in text)
    return text if len(text) <= 200 else text[:197] + "..."


def natural_sorted(items: Iterable[T], name: Callable[[T], str] = str) -> list[T]:
    """The items sorted by name, with runs of digits compared as numbers: 2 before 10."""

    def key(item: T) -> tuple[list[str | tuple[int, str]], str]:
        parts = re.split(r"([0-9]+)", name(item))  # text and digits alternate
        # a number is compared by its number of digits, then by its digits
        return [(len(p.lstrip("0")), p.lstrip("0")) if i % 2 else p for i, p in enumerate(parts)], name(item)

    return sorted(items, key=key)


def class_labels(names: Iterable[str]) -> tuple[dict[str, int], bool]:
    """(label of each class by its name, in the order of labels; whether the names are the labels).

    If all names are whole numbers, they are the labels. Otherwise a label is the position of the name in sorted order, as
    in torchvision.
    """
    names = sorted(names)
    if all(re.fullmatch(r"[0-9]{1,9}", name) for name in names):
        return {name: int(name) for name in sorted(names, key=int)}, True
    return {name: position for position, name in enumerate(names)}, False


def label_outside(labels: np.ndarray, classes: int) -> str | None:
    """The first label outside 0 .. classes - 1, in words; None where there is none. labels: int64 (N,)."""
    outside = (labels < 0) | (labels >= classes)
    if not outside.any():
        return None
    i = int(np.argmax(outside))
    return f"label {labels[i]} of image {i} is outside the {classes} classes (0 to {classes - 1})"


def concatenated(name: str, parts: list[ImageSource]) -> ImageSource:
    """One source of the images of `parts` (shards), in their order; they must agree in shape and in having labels."""
    if not parts:
        raise UserError(f"{name}: nothing matches; images are read from {LAYOUTS}")
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    for part in parts[1:]:
        if part.shape != first.shape:
            raise UserError(f"{first.name} has images {first.shape}, {part.name} {part.shape} (H, W, C); keep one size")
        if (part.labels is None) != (first.labels is None):
            unlabelled = part if part.labels is None else first
            raise UserError(
                f"{unlabelled.name} has no labels, other shards have; add them or leave them out everywhere"
            )
    if any(part.classes for part in parts):
        _number_classes(parts)
    counts = [part.count for part in parts if part.count is not None]
    labels = [part.labels for part in parts if part.labels is not None]
    whole = ImageSource(
        name,
        first.shape,
        lambda size: (chunk for part in parts for chunk in part.chunks(size)),
        count=sum(counts) if len(counts) == len(parts) else None,
        labels=np.concatenate(labels) if labels else None,
        lossy=any(part.lossy for part in parts),
        notes=(
            f"{len(parts)} shards were joined: {_first_names(parts)}",
            *(note for part in parts for note in part.notes),
        ),
        extra_arrays=dict.fromkeys(each for part in parts for each in part.extra_arrays),
    )
    for part in parts:
        part._notes = whole._notes  # one dictionary: a note that a shard adds while it is read is a note of the whole
    return whole


def _number_classes(parts: list[ImageSource]) -> None:
    """Give the shards the labels of the classes of all of them: each has numbered those that it holds."""
    for part in parts:
        if not part.classes:
            raise UserError(f"{part.name} has no class folders, other shards have; prepare one kind of them")
    names, _ = class_labels({each for part in parts for each in part.classes})
    for part in parts:
        assert part.labels is not None
        part.labels = np.array([names[each] for each in part.classes], np.int64)[part.labels]
        part.classes = tuple(names)


def _first_names(parts: list[ImageSource]) -> str:
    """The names of the first files of `parts`, without their folders."""
    names = [printable(Path(part.name).name) for part in parts[:3]]
    return ", ".join(names) + (", ..." if len(parts) > len(names) else "")


def mistake_hint(shape: tuple[int, ...], head: np.ndarray | None) -> str:
    """A hint for a message about an array that is not uint8 (N, H, W, C): its range of values, or "channels first".

    head: some of its values, or None. The text is empty where nothing can be said.
    """
    text = ""
    if head is not None and head.dtype.kind in "iuf" and head.dtype != np.uint8 and head.size:
        text = f" with values in [{head.min():.4g}, {head.max():.4g}]"
    if len(shape) == 4 and shape[1] in (1, 3) and shape[3] not in (1, 3):
        text += ", channels first"
    return text


def images_per_chunk(shape: tuple[int, ...], size: int) -> int:
    """Number of images of `shape` (H, W, C) to decode at once: `size`, or fewer if they exceed CHUNK_BYTES; at least 1."""
    return max(1, min(size, CHUNK_BYTES // (shape[0] * shape[1] * shape[2])))
