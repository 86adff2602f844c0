"""Makes a prepared data set (`harness.data.prepared`): decodes on all cores; if it is killed, the same command continues.

    DIR.partial/images.npy      has its final size from the start; each row is written to its position
    DIR.partial/journal.jsonl   first what is being made, then a line for each unit of the source that is on the disk

A line is written after its images are synced, so what the journal says is on the disk. DIR appears by a rename when it is
complete. In a source that is read in order a unit is a chunk, which is hashed while it is written; chunks that are filled
from several units are read again for their hashes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from harness.data import prepared
from harness.data.listing import ImageIndex, IndexEntry
from harness.data.photographs import CROP, Broken, Photograph, decode
from harness.data.prepared import CHUNK_IMAGES, Meta, chunk_count, chunk_sizes
from harness.data.sources import open_index
from harness.errors import UserError
from harness.images.source import printable
from harness.io import files
from harness.io.processors import processors
from harness.io.progress import Bar
from harness.io.text import parse_json
from harness.protocols import check_name

logger = logging.getLogger(__name__)

JOURNAL = "journal.jsonl"
CHANNELS = 3
MAX_BROKEN = 100  # after so many images that cannot be used, the source is given up
MAX_NAMED = 5  # files that a message names
SPARE_BYTES = 1 << 20  # space on the disk for meta.json and the journal
DECODED_AHEAD = 4  # images per thread that are decoded before the writer needs them


class Prepared(NamedTuple):
    """A prepared data set. new: whether it was made by this call."""

    folder: Path
    meta: Meta
    new: bool


def prepare(dataset: str, source: Path, out: Path, *, resolution: int, threads: int | None = None) -> Prepared:
    """Make the prepared data set `out` of the images at `source`, each cropped to `resolution` pixels per side.

    dataset: its name; for "imagenet" the classes are checked. threads: number of threads that decode; None: one per
    core. UserError for a source that cannot be used (damaged images are named), for a folder `out` that holds something
    else, and for a disk that is too small. If this is killed, the same call continues. A complete data set is not made
    again.
    """
    check_name("data set", dataset)
    if out.is_symlink():  # the folder is made under another name and renamed, which a link does not allow
        out = out.resolve()
    if out.resolve() == Path.cwd():
        raise UserError(f"--out {out} is the working folder, which the data set would replace; name a new folder")
    index = open_index(source, dataset)
    threads = threads or processors()
    job = _Job(dataset=dataset, index=index, resolution=resolution, out=out)
    if job.out_exists():
        return _existing(job)
    need = job.needed_bytes()
    free = shutil.disk_usage(next(each for each in out.absolute().parents if each.is_dir())).free
    size = f"{need / 1e9:,.1f} GB" if need >= 1e8 else f"{need / 1e6:,.1f} MB"
    count = f"{len(index.labels):,} images in {len(index.classes):,} classes"
    logger.info(
        f"{dataset}: {count} from {index.kind}, to {resolution}x{resolution}; {size} more, {free / 1e9:,.1f} GB are free"
    )
    if need > free:
        raise UserError(
            f"{out} needs {size} more, and {free / 1e9:,.1f} GB are free there; free some, or name another --out"
        )
    with files.claimed_folder(job.partial), files.explained(job.partial):
        if job.out_exists():  # another process has made it since
            job.partial.rmdir()  # empty: that process has renamed its own, and `claimed_folder` made this one
            return _existing(job)
        job.resume()
        if job.done:
            logger.info(f"continues after {job.done:,} of {len(index.labels):,} images")
        for note in index.notes:
            logger.info(f"note: {note}")
        try:
            job.decode_missing(threads)
            job.hash_chunks(threads)
        except KeyboardInterrupt:
            logger.info(f"stopped after {job.done:,} of {len(index.labels):,} images; the same command continues")
            raise
        meta = job.finish()
    for note in meta.notes[len(index.notes) :]:  # on single images; the others are logged above
        logger.info(f"note: {note}")
    return Prepared(out, meta, new=True)


def _existing(job: _Job) -> Prepared:
    """The complete data set that is there already; its notes are logged."""
    meta = job.existing_meta()
    for note in meta.notes:
        logger.info(f"note: {note}")
    return Prepared(job.out, meta, new=False)


@dataclass(kw_only=True)
class _Job:
    """A data set that is being made, and its progress."""

    dataset: str
    index: ImageIndex
    resolution: int
    out: Path
    units: set[int] = field(default_factory=set)  # units of the source that are on the disk
    chunks: dict[int, str] = field(default_factory=dict)  # hash of each hashed chunk, by its number
    image_notes: dict[int, str] = field(default_factory=dict)  # `Photograph.note` by row, of images that have one

    @property
    def partial(self) -> Path:
        """The folder in which the data set is made."""
        return self.out.with_name(self.out.name + files.PARTIAL)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of images.npy, (N, H, W, C)."""
        return (len(self.index.labels), self.resolution, self.resolution, CHANNELS)

    @property
    def done(self) -> int:
        """Number of images on the disk."""
        return sum(self.index.sizes[unit] for unit in self.units)

    def out_exists(self) -> bool:
        """Whether `out` is a file or a folder that is not empty."""
        return self.out.exists() and not (self.out.is_dir() and not any(self.out.iterdir()))

    def existing_meta(self) -> Meta:
        """The meta.json of the data set in `out`; UserError where it is not this data set."""
        if not self.out.is_dir() or not prepared.is_prepared(self.out):
            raise UserError(f"--out {self.out} holds something else; name a new or empty folder")
        meta = prepared.read_meta(self.out)
        wanted = (self.dataset, self.shape, CROP, self.index.sha256)
        if (meta.name, meta.shape, meta.crop, meta.source.get("listing_sha256")) != wanted:
            raise UserError(
                f"--out {self.out} holds another data set ({meta.name}, {meta.images:,} images, {meta.resolution} pixels); "
                "name another folder"
            )
        (self.out / JOURNAL).unlink(missing_ok=True)  # left by a process that was killed after the renaming
        return meta

    def resume(self) -> None:
        """Take over the progress in the journal of a process that was killed, or begin a journal."""
        journal = self.partial / JOURNAL
        first_line = {
            "data set": self.dataset, "resolution": self.resolution, "list of images": self.index.sha256,
            "kind of source": self.index.kind, "crop": CROP, "software": _software(),
        }  # fmt: skip
        # what follows the last line end is an incomplete line
        lines = journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []
        if not lines:
            self._begin(journal, first_line)
            return
        valid_bytes = 0  # of the lines up to the first that is damaged
        for i, line in enumerate(lines):
            try:
                entry = parse_json(line)
                if i == 0:
                    self._check_first_line(entry, first_line)
                else:
                    self.apply_line(entry)
            except UserError:  # a ValueError, too
                raise
            except (ValueError, TypeError, KeyError, IndexError):
                break  # damaged by a power cut: this line and the rest are dropped
            valid_bytes += len(line) + 1
        if not valid_bytes:  # without the first line nothing says what the images are
            logger.info(f"note: {journal} is damaged; begins again")
            self._begin(journal, first_line)
            return
        os.truncate(journal, valid_bytes)

    def _check_first_line(self, found: object, wanted: dict[str, object]) -> None:
        """UserError where the journal was begun for another data set; TypeError where the line is no JSON object."""
        if not isinstance(found, dict):
            raise TypeError
        for name, value in wanted.items():
            if found.get(name) != value:
                raise UserError(
                    f"{self.partial} was begun with another {name}; finish it as it was begun, or remove it, or name another --out"
                )

    def _begin(self, journal: Path, first_line: dict[str, object]) -> None:
        """Write an images.npy of its final size, and the first line of the journal."""
        header = self.npy_header()
        with (self.partial / prepared.IMAGES).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + int(np.prod(self.shape, dtype=np.int64)))
            os.fsync(file.fileno())
        files.write_bytes(journal, json.dumps(first_line).encode() + b"\n")

    def npy_header(self) -> bytes:
        """The npy header of images.npy: its bytes before the pixels."""
        out = io.BytesIO()
        np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": self.shape})
        return out.getvalue()

    def apply_line(self, entry: dict[str, Any]) -> None:
        """Record in this job what a line of the journal says: a unit that is on the disk, or the hash of a chunk.

        A line cannot be used if this raises ValueError, TypeError, KeyError or IndexError; the job is then unchanged.
        """
        if "chunk" in entry:
            self.chunks[int(entry["chunk"])] = str(entry["sha256"])
            return
        unit, image_notes = int(entry["unit"]), {int(row): str(text) for row, text in entry["remarks"]}
        self.index.sizes[unit]  # the value is not used: IndexError for a unit that does not exist
        if self.index.in_order:
            self.chunks[unit] = str(entry["sha256"])
        self.units.add(unit)
        self.image_notes |= image_notes

    def needed_bytes(self) -> int:
        """Bytes of the disk that are still needed: for pixels, labels and SPARE_BYTES."""
        images = self.partial / prepared.IMAGES
        allocated = images.stat().st_blocks * 512 if images.exists() else 0  # a block of stat is 512 bytes
        label_bytes = 8 * self.shape[0]  # int64
        return max(0, int(np.prod(self.shape, dtype=np.int64)) - allocated) + label_bytes + SPARE_BYTES

    def decode_missing(self, threads: int) -> None:
        """Decode and write the units that are not on the disk yet.

        UserError names the images that cannot be used. It is raised after all other images are written, or after
        MAX_BROKEN images that cannot be used.
        """
        with _Writer(self) as writer, ThreadPoolExecutor(threads) as pool:
            # first in, first out, because `store` needs the units one after the other
            waiting: deque[tuple[int, IndexEntry, Future[Photograph]]] = deque()
            for unit in range(len(self.index.sizes)):
                if unit in self.units:
                    continue
                for each in self.index.read(unit):
                    waiting.append((unit, each, pool.submit(_read_and_decode, each, self.resolution)))
                    if len(waiting) > DECODED_AHEAD * threads:
                        writer.store(*waiting.popleft())
            while waiting:
                writer.store(*waiting.popleft())
            writer.raise_for_broken()

    def hash_chunks(self, threads: int) -> None:
        """Hash the chunks that were not hashed while they were written."""
        sizes = chunk_sizes(self.shape[0])
        missing = [chunk for chunk in range(len(sizes)) if chunk not in self.chunks]
        if not missing:
            return
        images, data_start = self.partial / prepared.IMAGES, len(self.npy_header())
        with (
            (self.partial / JOURNAL).open("ab") as journal,
            ThreadPoolExecutor(threads) as pool,
            Bar("hash", self.shape[0], "images", done=self.shape[0] - sum(sizes[chunk] for chunk in missing)) as bar,
        ):
            hashes = pool.map(
                lambda chunk: prepared.stored_chunk_sha256(images, data_start, self.shape, chunk, self.index.labels),
                missing,
            )
            for chunk, sha256 in zip(missing, hashes, strict=True):
                self.chunks[chunk] = sha256
                journal.write(json.dumps({"chunk": chunk, "sha256": sha256}).encode() + b"\n")
                journal.flush()
                bar.advance(sizes[chunk])

    def finish(self) -> Meta:
        """Write labels.npy and meta.json, and give the folder its final name."""
        meta = Meta(
            name=self.dataset,
            shape=self.shape,
            crop=CROP,
            classes=self.index.classes,
            chunks=tuple(self.chunks[chunk] for chunk in range(chunk_count(self.shape[0]))),
            source={"kind": self.index.kind, "listing_sha256": self.index.sha256},
            notes=(*self.index.notes, *self._notes_on_images()),
            software=_software(),
        )
        labels = io.BytesIO()
        np.save(labels, self.index.labels)
        files.write_bytes(self.partial / prepared.LABELS, labels.getvalue())
        meta.write(self.partial)
        self.partial.replace(self.out)
        files.sync_folder(self.out.parent)
        (self.out / JOURNAL).unlink()  # only now: a process that is killed before the renaming is continued from it
        return meta

    def _notes_on_images(self) -> list[str]:
        """The notes on single images, one line for each text: the number of its images, and the names of the first."""
        rows_by_text: dict[str, list[int]] = {}
        for row in sorted(self.image_notes):
            rows_by_text.setdefault(self.image_notes[row], []).append(row)
        return [
            f"{text}: {len(rows):,} ({_first_names([printable(self.index.names[row]) for row in rows])})"
            for text, rows in rows_by_text.items()
        ]


class _Writer:
    """Writes decoded images to their rows of images.npy, and complete units into the journal and the job."""

    def __init__(self, job: _Job):
        self._job = job
        self._data_start, self._image_bytes = len(job.npy_header()), int(np.prod(job.shape[1:]))
        self._images_left: dict[int, int] = {}  # by unit: number of its images that are still to come
        self._digest = hashlib.sha256()  # of the images of the current unit; used if units are chunks (`in_order`)
        self._notes: list[tuple[int, str]] = []  # (row, note) of the current unit
        self._broken: list[str] = []  # "name: reason" of images that cannot be used
        self._incomplete: set[int] = set()  # units with such images

    def __enter__(self) -> _Writer:
        self._stack = contextlib.ExitStack()
        self._images = self._stack.enter_context((self._job.partial / prepared.IMAGES).open("r+b"))
        self._journal = self._stack.enter_context((self._job.partial / JOURNAL).open("ab"))
        self._bar = self._stack.enter_context(Bar("prepare", self._job.shape[0], "images", done=self._job.done))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def store(self, unit: int, image: IndexEntry, photograph: Future[Photograph]) -> None:
        """Write an image to its row, and the unit into the journal after its last image.

        All images of a unit must be stored before those of the next. photograph: the result of decoding; an image that
        cannot be used is recorded, and UserError is raised after MAX_BROKEN of them.
        """
        left = self._images_left.setdefault(unit, self._job.index.sizes[unit]) - 1  # images to come after this one
        self._images_left[unit] = left
        try:
            pixels, note = photograph.result()
        except Broken as error:
            self._incomplete.add(unit)
            self._broken.append(f"{image.name}: {error}")
            logger.warning(f"cannot be used: {self._broken[-1]}")
            if len(self._broken) == MAX_BROKEN:
                self.raise_for_broken()
        else:
            offset = self._data_start + image.row * self._image_bytes
            data = np.ascontiguousarray(pixels).data
            _write_at(self._images.fileno(), data, offset)
            self._digest.update(data)
            if note is not None:
                self._notes.append((image.row, note))
        self._bar.advance()
        if not left:
            self._finish_unit(unit)

    def _finish_unit(self, unit: int) -> None:
        """Write the unit's line into the journal, unless one of its images cannot be used; begin the next unit."""
        job = self._job
        entry: dict[str, Any] = {"unit": unit, "remarks": self._notes}
        if job.index.in_order:  # the unit is a chunk: with its labels the digest is `chunk_sha256`
            first = unit * CHUNK_IMAGES
            self._digest.update(np.ascontiguousarray(job.index.labels[first : first + CHUNK_IMAGES], "<i8").data)
            entry["sha256"] = self._digest.hexdigest()
        self._digest, self._notes = hashlib.sha256(), []
        if unit in self._incomplete:
            return
        _sync(self._images.fileno())
        self._journal.write(json.dumps(entry).encode() + b"\n")
        self._journal.flush()
        _sync(self._journal.fileno())
        job.apply_line(entry)

    def raise_for_broken(self) -> None:
        """UserError that names the images that cannot be used, if there are any."""
        if not self._broken:
            return
        more = f" (given up after {MAX_BROKEN})" if len(self._broken) >= MAX_BROKEN else ""
        raise UserError(
            f"{len(self._broken)} images cannot be used{more}: {_first_names(self._broken, '; ')}. Replace them by sound "
            "files and repeat the command, which makes only what is missing; or take them out of the source, remove "
            f"{self._job.partial} and begin again"
        )


def _read_and_decode(image: IndexEntry, size: int) -> Photograph:
    """The image cropped to `size` pixels per side; Broken where it cannot be used."""
    try:
        data = image.read()
    except OSError as error:
        raise Broken(f"cannot be read: {error.strerror or error}") from error
    return decode(data, size, image.name)


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at byte `offset`; a single call of pwrite may write less."""
    data = data.cast("B")
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def _sync(descriptor: int) -> None:
    """Flush an open file to the disk."""
    getattr(os, "fdatasync", os.fsync)(descriptor)  # macOS has only the latter


def _software() -> dict[str, str]:
    """Versions of the libraries that decide pixels."""
    from PIL import __version__, features

    turbo = features.version_feature("libjpeg_turbo")
    return {"pillow": __version__, "jpeg": f"libjpeg-turbo {turbo}" if turbo else str(features.version_codec("jpg"))}


def _first_names(items: Sequence[str], separator: str = ", ") -> str:
    """The first MAX_NAMED items, and how many more there are."""
    more = f"{separator}and {len(items) - MAX_NAMED:,} more" if len(items) > MAX_NAMED else ""
    return separator.join(items[:MAX_NAMED]) + more
