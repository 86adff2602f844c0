"""Making a cache of latents (`harness.data.latents`): chunk by chunk, so that a killed process repeats no whole one.

While it is made, DIR/chunks.partial is its journal and its lock: a first line that says what is made of what, then the
number and hash of every chunk that is on the disk. A chunk counts when its line is there and its bytes have that hash.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np

from harness import registry
from harness.autoencoders.files import read_identity
from harness.autoencoders.load import Decoder
from harness.data import latents, npz, prepared
from harness.data.images import ImageSet
from harness.data.latents import DTYPE, LABELS, LATENTS, META, Meta
from harness.data.prepared import CHUNK_IMAGES, chunk_count, chunk_sha256
from harness.errors import RunError, UserError
from harness.io import files
from harness.io.progress import Bar
from harness.runs.run import identity_difference

JOURNAL = "chunks.partial"
OWN = {JOURNAL, LATENTS, f"{LATENTS}{files.PARTIAL}", LABELS, f"{LABELS}{files.PARTIAL}", f"{META}{files.PARTIAL}"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Source:
    """Images to encode. place: what `open_images` finds them by from anywhere: an absolute path, or a name."""

    data: ImageSet
    crop: str | None
    place: str


def open_images(source: str) -> Source:
    """A prepared folder, an .npz of ADM's layout with labels, or a name of `harness list datasets`."""
    path = Path(source)
    if path.is_dir() and prepared.is_prepared(path):
        return Source(data=prepared.load(path), crop=prepared.read_meta(path).crop, place=str(path.resolve()))
    if path.suffix == ".npz" and path.is_file():
        return Source(data=npz.load(path), crop=None, place=str(path.resolve()))
    if not path.exists() and source in registry.datasets and not registry.datasets.get(source).needs_folder:
        return Source(data=registry.datasets.get(source).load(None), crop=None, place=source)
    what = (
        "is neither a prepared data set nor an .npz" if path.exists() else "is no folder, and no data set without one"
    )
    name = source if source in registry.datasets else "NAME"
    raise UserError(f"{source} {what}; give the folder that `harness data prepare {name} --from PATH --out DIR` makes")


def _images(source: Source) -> dict[str, Any]:
    """What meta.json says of them."""
    data = source.data
    return {"name": data.name, "sha256": data.sha256, "resolution": data.images.shape[1], "crop": source.crop}


def made_before(source: Source, vae: str, out: Path) -> Meta | None:
    """What is in the folder `out`, where it is the whole cache of `source` by the auto-encoder of that name; None: it is to
    be made, or to be refused by `make_cache`. Imports no framework."""
    if not (out / META).exists() or (out / JOURNAL).exists():
        return None
    meta = latents.read_meta(out)
    if (meta.images, meta.vae) != (_images(source), read_identity(vae, "--vae DIR")):
        return None
    try:
        latents.load(out)
    except UserError as error:
        raise UserError(
            f"{out} was whole once and is damaged ({error}); delete it and give the command again"
        ) from error
    return meta


def make_cache(
    source: Source, vae: Decoder, out: Path, *, environment: dict[str, Any], say: Callable[[str], None]
) -> bool:
    """Make the cache of `source` in the folder `out`; False: it was there already.

    Refused: images that the auto-encoder does not take, too little room on the disk, another cache in `out`.
    """
    data = source.data
    count, height, width, channels = data.images.shape
    images = _images(source)
    if vae.kind != "kl":
        raise UserError(
            f"{vae.name} has a code book and no posterior; latents are made by an AutoencoderKL, such as ft-ema"
        )
    if channels != vae.image_channels or height % vae.factor or width % vae.factor or height != width:
        raise UserError(
            f"{data.name} has images {height}x{width}x{channels}; auto-encoder {vae.name} takes squares of "
            f"{vae.image_channels} channels whose side is a multiple of {vae.factor}"
        )
    shape = (count, 2, 2, vae.channels, height // vae.factor, width // vae.factor)
    what = json.loads(json.dumps({"images": images, "vae": vae.identity, "shape": shape}))
    found = Path(vae.source)
    places = {"images": source.place, "vae": str(found.resolve()) if found.exists() else vae.source.partition("@")[0]}
    if out.is_file():
        raise UserError(f"--out {out} is a file; name a folder")
    if out.is_dir() and not (out / META).exists() and (strange := {each.name for each in out.iterdir()} - OWN):
        raise UserError(
            f"--out {out} holds other files ({sorted(strange)[0]}) and no latents; name a new or empty folder"
        )
    with files.claimed(out / "chunks") as journal:
        if (out / META).exists():
            meta = latents.read_meta(out)
            _same(out, {"images": meta.images, "vae": meta.vae, "shape": list(meta.shape)}, what)
            journal.unlink(missing_ok=True)  # of a process that was killed after its last write, or this one's
            return False
        with files.explained(out):
            chunks = _encode(data, vae, out, journal, what, shape, say)
            stored = BytesIO()
            np.save(stored, data.labels.astype("<i8"), allow_pickle=False)
            files.write_bytes(out / LABELS, stored.getvalue())
            _file(out).rename(out / LATENTS)
            files.sync_folder(out)
            Meta(
                images=images, vae=vae.identity, shape=shape, chunks=chunks, places=places, environment=environment
            ).write(out)
            journal.unlink(missing_ok=True)
    return True


def _same(out: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    if (there["images"], there["vae"], there["shape"]) != (here["images"], here["vae"], here["shape"]):
        raise UserError(
            f"{out} holds latents of something else ({identity_difference(there, here)}); name another --out"
        )


def _file(out: Path) -> Path:
    """The latents, under their name or the one before it."""
    return out / LATENTS if (out / LATENTS).exists() else out / f"{LATENTS}{files.PARTIAL}"


def _encode(
    data: ImageSet,
    vae: Decoder,
    out: Path,
    journal: Path,
    what: dict[str, Any],
    shape: tuple[int, ...],
    say: Callable[[str], None],
) -> tuple[str, ...]:
    """Write the chunks that are not there yet; the hashes of all."""
    begun, kept = _read(journal)
    if begun is not None:
        _same(out, begun, what)
    header = BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": DTYPE.str, "fortran_order": False, "shape": shape})
    begin, row = header.tell(), DTYPE.itemsize * int(np.prod(shape[1:]))
    path, total = _file(out), begin + row * len(data)
    _make_room(path, total, say)
    hashes: dict[int, str] = {}
    with path.open("r+b") as file, journal.open("r+b") as lines, Bar("latents", len(data), "images") as bar:
        file.write(header.getvalue())
        lines.truncate(_whole_lines(lines) if begun is not None else 0)
        if begun is None:
            _append(lines, what)
        for number in range(chunk_count(len(data))):
            start = number * CHUNK_IMAGES
            part = slice(start, min(start + CHUNK_IMAGES, len(data)))
            file.seek(begin + row * start)
            if number in kept and _hash(file, (part.stop - start, *shape[1:]), data.labels[part]) == kept[number]:
                hashes[number] = kept[number]
            else:
                both = encode(vae, data.images[part])  # (n, 2, 2, C, h, w)
                file.seek(begin + row * start)
                file.write(both)
                file.flush()
                os.fsync(file.fileno())  # before the line that vouches for it
                hashes[number] = chunk_sha256(both, data.labels[part])
                _append(lines, [number, hashes[number]])
            bar.advance(part.stop - start)
    return tuple(hashes[number] for number in sorted(hashes))


def encode(vae: Decoder, images: np.ndarray) -> np.ndarray:
    """Images uint8 (n, H, W, C) to the posteriors of each and of its mirror image, float32 (n, 2, 2, C, h, w)."""
    import torch

    views = np.stack([images, images[:, :, ::-1]], axis=1)  # (n, 2, H, W, C)
    x = torch.from_numpy(views.reshape(-1, *images.shape[1:])).permute(0, 3, 1, 2) / 127.5 - 1  # (2n, C, H, W)
    moments = vae.posterior(x.contiguous()).cpu().numpy()  # (2n, 2, C, h, w)
    return np.ascontiguousarray(moments.reshape(len(images), 2, *moments.shape[1:]), DTYPE)


def _make_room(path: Path, total: int, say: Callable[[str], None]) -> None:
    """The file at its full size, so that a full disk is met before the work; refused where there is no room."""
    there = path.stat().st_blocks * 512 if path.exists() else 0
    free = shutil.disk_usage(path.parent).free
    say(f"latents: {total / 1e9:.2f} GB on the disk, {free / 1e9:.2f} GB free" + (", begun already" if there else ""))
    if total - there > free:
        raise RunError(f"{path.parent}: latents take {total / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; make room")
    with path.open("r+b" if path.exists() else "w+b") as file:
        file.truncate(total)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, total)


def _read(journal: Path) -> tuple[dict[str, Any] | None, dict[int, str]]:
    """What the journal says: what is made, and the hash of each chunk; a last line that was cut off says nothing."""
    lines = journal.read_bytes().split(b"\n")[:-1]
    try:
        entries = [json.loads(line) for line in lines]
        return (entries[0], dict(entries[1:])) if entries and isinstance(entries[0], dict) else (None, {})
    except (ValueError, TypeError):
        return None, {}


def _whole_lines(lines: IO[bytes]) -> int:
    """Bytes up to the end of the last whole line."""
    return lines.read().rfind(b"\n") + 1


def _append(lines: IO[bytes], entry: Any) -> None:
    lines.seek(0, os.SEEK_END)
    lines.write(json.dumps(entry).encode() + b"\n")
    lines.flush()
    os.fsync(lines.fileno())


def _hash(file: IO[bytes], shape: tuple[int, ...], labels: np.ndarray) -> str:
    values = np.fromfile(file, DTYPE, int(np.prod(shape)))
    return chunk_sha256(values, labels)
