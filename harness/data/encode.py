"""Makes a cache of latents (`harness.data.latents`) chunk by chunk; a killed process loses less than two chunks.

While the device encodes a chunk, one thread reads the next, and another writes the one before.

While the cache is made, DIR/chunks.partial is its journal and its lock. The first line is a JSON object with the keys
"images", "vae" and "shape"; each other line is [number, hash] of a chunk. A chunk is complete when its line exists and
its bytes have that hash.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any

import numpy as np

from harness.autoencoders.decoder import Decoder
from harness.autoencoders.load import read_identity
from harness.autoencoders.package import PackageDecoder
from harness.data import latents
from harness.data.images import ImageSet
from harness.data.latents import DTYPE, LABELS, LATENTS, META, Meta
from harness.data.load import NamedImages
from harness.data.prepared import CHUNK_IMAGES, chunk_count, chunk_sha256
from harness.data.read_ahead import ReadAhead
from harness.errors import RunError, UserError
from harness.io import files
from harness.io.progress import Bar
from harness.io.text import parse_json
from harness.runs.run import identity_difference

logger = logging.getLogger(__name__)

ROUND_TRIP = 16  # images that a package's autoencoder encodes and decodes before it is used
JOURNAL = f"chunks{files.PARTIAL}"
# what a folder may hold before it has its meta.json
OWN_FILES = {JOURNAL, LATENTS, f"{LATENTS}{files.PARTIAL}", LABELS, f"{LABELS}{files.PARTIAL}", f"{META}{files.PARTIAL}"}  # fmt: skip


def existing_cache(source: NamedImages, vae: str, out: Path, entry: str | None = None) -> Meta | None:
    """The meta.json of `out`, if that folder is the complete cache of `source` by the autoencoder `vae`.

    entry: of the autoencoder's weight file, where it has several. None: left to `make_cache`, which makes, continues or
    refuses it. Imports no framework.
    """
    if not (out / META).exists() or (out / JOURNAL).exists():
        return None
    meta = latents.read_meta(out)
    if (meta.images, meta.vae) != (_image_facts(source), read_identity(vae, "--vae DIR", entry)):
        return None
    try:
        latents.load(out)  # for its errors only: arrays that do not fit meta.json
    except UserError as error:
        raise UserError(
            f"{out} was complete once and is damaged ({error}); delete it and repeat the command"
        ) from error
    return meta


def make_cache(source: NamedImages, vae: Decoder, out: Path, *, environment: Mapping[str, object]) -> bool:
    """Make the cache of `source` in the folder `out`. Returns False if it existed already.

    environment: written to meta.json. UserError for images that the autoencoder does not take and for another cache in
    `out`; RunError where the disk has too little space.
    """
    data = source.images
    count, height, width, channels = data.images.shape
    images = _image_facts(source)
    if vae.kind == "vq":
        raise UserError(
            f"{vae.name} has a codebook and no posterior; latents are made by an AutoencoderKL, such as ft-ema"
        )
    if channels != vae.image_channels or height % vae.factor or width % vae.factor or height != width:
        raise UserError(
            f"{data.name} has images {height}x{width}x{channels}; autoencoder {vae.name} takes squares of "
            f"{vae.image_channels} channels whose side is a multiple of {vae.factor}"
        )
    if isinstance(vae, PackageDecoder):
        vae.check_round_trip(data.images[:ROUND_TRIP])
    shape = (count, 2, 2, vae.channels, height // vae.factor, width // vae.factor)
    # as it is read back from the journal, where tuples have become lists
    contents = json.loads(json.dumps({"images": images, "vae": vae.identity, "shape": shape}))
    vae_path = Path(vae.source)  # does not exist if the source is "repository@revision"
    is_path = vae.kind != "tokenizer" and vae_path.exists()
    source_paths = {
        "images": source.name,
        "vae": str(vae_path.resolve()) if is_path else vae.source.partition("@")[0],
    }
    if out.is_file():
        raise UserError(f"--out {out} is a file; name a folder")
    if out.is_dir() and not (out / META).exists() and (strange := {each.name for each in out.iterdir()} - OWN_FILES):
        raise UserError(
            f"--out {out} holds other files ({sorted(strange)[0]}) and no latents; name a new or empty folder"
        )
    with files.claimed(out / JOURNAL.removesuffix(files.PARTIAL)) as journal:  # yields out / JOURNAL
        if (out / META).exists():
            meta = latents.read_meta(out)
            _check_same(out, {"images": meta.images, "vae": meta.vae, "shape": list(meta.shape)}, contents)
            # just made by `claimed`, or left by a process that was killed after it wrote meta.json
            journal.unlink(missing_ok=True)
            return False
        with files.explained(out):
            chunks = _encode_chunks(data, vae, out, journal, contents, shape)
            labels = BytesIO()
            np.save(labels, data.labels.astype("<i8"), allow_pickle=False)
            files.write_bytes(out / LABELS, labels.getvalue())
            _latents_path(out).rename(out / LATENTS)  # no effect where a killed process has done it
            files.sync_folder(out)
            Meta(
                images=images,
                vae=vae.identity,
                shape=shape,
                chunks=chunks,
                source_paths=source_paths,
                environment=environment,
            ).write(out)
            journal.unlink(missing_ok=True)
    return True


def _image_facts(source: NamedImages) -> dict[str, object]:
    """The images as meta.json describes them: name, sha256, resolution and crop."""
    data = source.images
    return {"name": data.name, "sha256": data.sha256, "resolution": data.images.shape[1], "crop": source.crop}


def _check_same(out: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """UserError where `out` holds, or was begun with, other latents than those to be made.

    there: "images", "vae" and "shape" of the latents in `out`. here: of those to be made.
    """
    if (there["images"], there["vae"], there["shape"]) != (here["images"], here["vae"], here["shape"]):
        raise UserError(
            f"{out} holds latents of something else ({identity_difference(there, here)}); name another --out"
        )


def _latents_path(out: Path) -> Path:
    """The file of latents: its final path if a process was killed after the renaming, else its partial path."""
    return out / LATENTS if (out / LATENTS).exists() else out / f"{LATENTS}{files.PARTIAL}"


def _encode_chunks(
    data: ImageSet,
    vae: Decoder,
    out: Path,
    journal: Path,
    contents: dict[str, Any],
    shape: tuple[int, ...],
) -> tuple[str, ...]:
    """Write the chunks that are missing or damaged, and their lines in the journal; returns the hashes of all chunks.

    contents: first line of the journal. shape: of all latents, (N, 2, 2, C, h, w).
    """
    first_line, known_hashes = _read_journal(journal)
    if first_line is not None:
        _check_same(out, first_line, contents)
    header = BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": DTYPE.str, "fortran_order": False, "shape": shape})
    data_start, row_bytes = header.tell(), DTYPE.itemsize * int(np.prod(shape[1:]))  # row: all latents of an image
    path, total = _latents_path(out), data_start + row_bytes * len(data)
    _allocate(path, total)
    hashes: dict[int, str] = {}
    with path.open("r+b") as file, journal.open("r+b") as lines, Bar("latents", len(data), "images") as bar:
        file.write(header.getvalue())
        lines.truncate(_complete_lines_bytes(lines) if first_line is not None else 0)
        if first_line is None:
            _append_line(lines, contents)
        parts = [
            range(start, min(start + CHUNK_IMAGES, len(data)))
            for start in range(0, chunk_count(len(data)) * CHUNK_IMAGES, CHUNK_IMAGES)
        ]
        missing: list[range] = []
        for number, part in enumerate(parts):
            file.seek(data_start + row_bytes * part.start)
            labels = data.labels[part.start : part.stop]
            known = known_hashes.get(number)
            if known is not None and _stored_hash(file, (len(part), *shape[1:]), labels) == known:
                hashes[number] = known
                bar.advance(len(part))
            else:
                missing.append(part)

        def store(part: range, moments: np.ndarray) -> None:
            file.seek(data_start + row_bytes * part.start)
            file.write(moments.data)
            file.flush()
            os.fsync(file.fileno())  # a line of the journal may only name what is on the disk
            number = part.start // CHUNK_IMAGES
            hashes[number] = chunk_sha256(moments, data.labels[part.start : part.stop])
            _append_line(lines, [number, hashes[number]])

        ahead = ReadAhead(lambda part: np.array(data.images[part.start : part.stop]))
        writing: Future[None] | None = None
        with ThreadPoolExecutor(1, thread_name_prefix="latents") as writer:  # its end waits for the last chunk
            for part, following in zip_longest(missing, missing[1:]):
                moments = encode(vae, ahead.take(part, following))  # (n, 2, 2, C, h, w)
                if writing is not None:
                    writing.result()
                writing = writer.submit(store, part, moments)
                bar.advance(len(part))
            if writing is not None:
                writing.result()
    return tuple(hashes[number] for number in sorted(hashes))


def encode(vae: Decoder, images: np.ndarray) -> np.ndarray:
    """Images uint8 (n, H, W, C) to the posteriors of each image and of its mirror image, float32 (n, 2, 2, C, h, w).

    Axis 1: the image, its mirror image. Axis 2: mean, standard deviation.
    """
    import torch

    views = np.stack([images, images[:, :, ::-1]], axis=1)  # (n, 2, H, W, C)
    pixels = torch.from_numpy(views.reshape(-1, *images.shape[1:])).permute(0, 3, 1, 2)  # uint8 (2n, C, H, W)
    moments = vae.posterior(pixels).cpu().numpy()  # (2n, 2, C, h, w)
    return np.ascontiguousarray(moments.reshape(len(images), 2, *moments.shape[1:]), DTYPE)


def _allocate(path: Path, total: int) -> None:
    """Make the file `total` bytes large; RunError where the disk has too little space, before anything is encoded."""
    allocated = path.stat().st_blocks * 512 if path.exists() else 0  # bytes on the disk; a block of stat is 512 bytes
    free = shutil.disk_usage(path.parent).free
    begun = ", begun already" if allocated else ""
    logger.info(f"latents: {total / 1e9:.2f} GB on the disk, {free / 1e9:.2f} GB free{begun}")
    if total - allocated > free:
        raise RunError(
            f"{path.parent}: latents take {total / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; free some space"
        )
    with path.open("r+b" if path.exists() else "w+b") as file:
        file.truncate(total)  # sets the size only; posix_fallocate reserves the space, where the system has it
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, total)


def _read_journal(journal: Path) -> tuple[dict[str, Any] | None, dict[int, str]]:
    """(first line of the journal, hash of each chunk by its number); (None, {}) if there is no line or one is damaged.

    A last line that was cut off is ignored.
    """
    lines = journal.read_bytes().split(b"\n")[:-1]
    try:
        entries = [parse_json(line) for line in lines]
        if entries and isinstance(entries[0], dict):
            return entries[0], dict(entries[1:])
    except (ValueError, TypeError):
        pass
    return None, {}


def _complete_lines_bytes(lines: IO[bytes]) -> int:
    """Bytes of a file, open at its start, up to the end of the last complete line."""
    return lines.read().rfind(b"\n") + 1


def _append_line(lines: IO[bytes], entry: object) -> None:
    """Append `entry` as a line of JSON and sync the file."""
    lines.seek(0, os.SEEK_END)
    lines.write(json.dumps(entry).encode() + b"\n")
    lines.flush()
    os.fsync(lines.fileno())


def _stored_hash(file: IO[bytes], shape: tuple[int, ...], labels: np.ndarray) -> str:
    """`chunk_sha256` of the latents of `shape`, read from the position of `file`, and of `labels`."""
    values = np.fromfile(file, DTYPE, int(np.prod(shape)))
    return chunk_sha256(values, labels)
