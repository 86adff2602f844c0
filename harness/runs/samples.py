"""Sample sets on disk: samples.npz in the layout of ADM's evaluator, and a JSON sidecar that states how it was made.

Layout (openai/guided-diffusion, evaluations/README.md): `arr_0` uint8 (N, H, W, C), RGB or grey, 0 to 255; `arr_1`
int64 (N,) labels. The file is an uncompressed zip, so it can be written and read one shard at a time: 50,000 images
at 256 pixels are 10 GB.
"""

from __future__ import annotations

import itertools
import json
import logging
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from harness.errors import UserError
from harness.images.npz import read_npz
from harness.images.source import label_outside
from harness.io.files import replacing, sha256_file
from harness.io.text import LONGEST_JSON, check_plain, parse_json

logger = logging.getLogger(__name__)
_not_ours: set[Path] = set()  # documents beside samples that a warning has named


@dataclass(frozen=True, kw_only=True)
class SampleSet:
    """A sample set that was read and checked.

    images: uint8 (N, H, W, C), read-only; memory-mapped if they are stored uncompressed. labels: int64 (N,); None if the
    file has no arr_1. sha256: of the whole file.
    """

    images: np.ndarray
    labels: np.ndarray | None
    sha256: str
    path: Path


def sidecar_path(path: Path) -> Path:
    """The path of the sidecar: samples.npz -> samples.json."""
    return Path(path).with_suffix(".json")


def write_samples(path: Path, shards: Iterable[np.ndarray], labels: np.ndarray, sidecar: dict[str, Any]) -> str:
    """Write a sample set and its sidecar; returns the sha256 of the npz. The same content gives the same bytes.

    shards: uint8 (n, H, W, C) arrays in the order of samples, N = len(labels) images in all; they are consumed one at a
    time. labels: integers (N,). sidecar: JSON data; `images`, `shape` and `sha256` are added to it. The sidecar is
    written last: a sample set is complete when its sidecar names the hash of its npz.
    """
    path = Path(path)
    labels = np.ascontiguousarray(labels, dtype="<i8")
    iterator = iter(shards)
    first = next(iterator, None)
    if labels.ndim != 1 or first is None:
        raise ValueError(f"labels must be (N,) with at least one image to write, got labels {labels.shape}")
    shape = (len(labels), *first.shape[1:])
    sidecar_path(path).unlink(missing_ok=True)  # it describes the file that is about to be replaced
    with replacing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with _member(archive, "arr_0.npy") as out:
            np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": shape})
            written = 0
            for shard in itertools.chain([first], iterator):
                if shard.dtype != np.uint8 or shard.ndim != 4 or shard.shape[1:] != shape[1:]:
                    raise ValueError(f"shard is {shard.dtype} {shard.shape}, expected uint8 (n, {shape[1:]})")
                out.write(np.ascontiguousarray(shard).data)
                written += len(shard)
            if written != len(labels):
                raise ValueError(f"{written} images came for {len(labels)} labels")
        with _member(archive, "arr_1.npy") as out:
            np.lib.format.write_array(out, labels, version=(1, 0), allow_pickle=False)
    digest = sha256_file(path)
    contents = {**sidecar, "images": shape[0], "shape": list(shape[1:]), "sha256": digest}
    with replacing(sidecar_path(path)) as file:
        file.write((json.dumps(contents, indent=2, sort_keys=True) + "\n").encode())
    return digest


def _member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    """A new file `name` in the archive, open for writing."""
    # A fixed date: with the current time, the same samples would have another hash each time.
    return archive.open(zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0)), "w", force_zip64=True)


def find_sidecar(path: Path) -> dict[str, Any] | None:
    """The sidecar of the samples at `path`; None: they have none.

    Only a sample set that is one .npz has a sidecar. A JSON document of the same stem that another program wrote is named
    in a warning and left alone. UserError for one that cannot be read, and for a sidecar that was cut.
    """
    side = sidecar_path(path) if path.suffix.lower() == ".npz" and path.is_file() else None
    if side is None or not side.is_file():
        return None
    if side.stat().st_size > LONGEST_JSON:  # whatever it is
        return None
    try:
        data = side.read_bytes()
    except OSError as error:
        raise UserError(f"{side} cannot be read as JSON: {error.strerror or error}") from error
    try:
        document = parse_json(data.decode("utf-8-sig"))
    except ValueError:
        document = None
        if b'"sha256": "' in data and b'"images": ' in data:
            return read_sidecar(path)  # which says what is wrong
    if isinstance(document, dict) and {"images", "sha256", "shape"} <= document.keys():
        return document
    if side not in _not_ours:
        _not_ours.add(side)
        logger.warning(f"{side} is not the sidecar of {path.name}, by its content; it was not read")
    return None


def read_sidecar(path: Path) -> dict[str, Any]:
    """The sidecar of the npz at `path`, as a dictionary. Raises UserError if it is missing or not a JSON object."""
    side = sidecar_path(path)
    check_plain(side, "sidecar", LONGEST_JSON)
    try:
        sidecar = parse_json(side.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{side} is missing: it says how {Path(path).name} was made") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{side} cannot be read as JSON: {error}") from error
    if not isinstance(sidecar, dict):
        raise UserError(f"{side} must hold one JSON object")
    return sidecar


def read_samples(path: Path, classes: int | None = None, minimum: int = 1) -> SampleSet:
    """Open a sample set and check all of it against the checksums of the zip; nothing in it is executed.

    classes: labels must lie in 0 ... classes - 1; None: not checked. minimum: fewest images that are accepted. Raises
    UserError if anything is wrong with the file.
    """
    path = Path(path)
    images, labels = read_npz(path)
    if len(images) < minimum:
        raise UserError(f"{path}: {len(images)} images are fewer than the {minimum} needed; draw more samples")
    if labels is not None and classes is not None and (text := label_outside(labels, classes)):
        raise UserError(f"{path}: {text}")
    return SampleSet(images=images, labels=labels, sha256=sha256_file(path), path=path)
