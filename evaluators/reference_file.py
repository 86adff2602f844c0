"""Reference files: real images, the statistics of their features, and metadata, in the layout of ADM's evaluator.

An uncompressed .npz without pickled objects: arr_0 uint8 (M, H, W, C), the images for precision and recall; arr_1 int64
(M,), their labels if known; mu, sigma and, if the network has spatial features, mu_s, sigma_s, float64, of all N >= M
images; label_values and label_counts int64 (K,), the labels of all N images; and `about`, a JSON text (see `About`).
"""

import dataclasses
import hashlib
import json
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from evaluators.features.spec import FeatureExtractor
from harness.errors import RunError, UserError
from harness.images.npz import open_npz_file
from harness.io import files
from harness.io.text import parse_json

FORMAT = 1
ABOUT_CHARACTERS = 1 << 16  # of the longest `about` that is read; numpy stores 4 bytes for each
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")
# What `read_about` may meet in a damaged file; `open_npz_file` turns other errors into UserError, a ValueError.
READ_ERRORS = (ValueError, KeyError, TypeError, RuntimeError)


@dataclass(frozen=True, kw_only=True)
class About:
    """Metadata of a reference file.

    source: name of the images. images, images_sha256: number of all N images and their hash, in their order
    (`evaluators.reference.images_sha256`). kept, kept_sha256: the same of arr_0. seed: of the random choice of arr_0;
    None: all images were kept. lossy: some images were stored with loss. suite, suite_version: what the file was made
    for; any suite on the same network may use it. features, features_sha256: that network. statistics_sha256: of mu,
    sigma, mu_s and sigma_s.
    """

    format: int = FORMAT
    source: str
    images: int
    images_sha256: str
    kept: int
    kept_sha256: str
    seed: int | None
    shape: tuple[int, int, int]  # H, W, C
    lossy: bool
    suite: str
    suite_version: str
    features: str
    features_sha256: str
    statistics_sha256: str
    harness_version: str

    @property
    def sha256(self) -> str:
        """The reference's hash in records. It depends on the images, not on the machine that computed the statistics.

        If all images were kept, it is their hash: the same as if they were used without a reference file.
        """
        if self.kept_sha256 == self.images_sha256:
            return self.images_sha256
        return hashlib.sha256(f"reference {self.images_sha256} {self.kept_sha256}\n".encode()).hexdigest()


def statistics_sha256(arrays: Mapping[str, np.ndarray]) -> str:
    """Hash of the arrays mu, sigma, mu_s and sigma_s, or those of them that are in `arrays`."""
    digest = hashlib.sha256()
    for name in STATISTICS:
        if name in arrays:
            digest.update(f"{name} {arrays[name].dtype.str} {arrays[name].shape}\n".encode())
            digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def write(
    path: Path,
    shape: tuple[int, ...],
    batches: Iterable[np.ndarray],
    finish: Callable[[], tuple[Mapping[str, np.ndarray], About]],
) -> About:
    """Write a reference file atomically and return its metadata; the same content gives the same bytes.

    shape: of arr_0, (M, H, W, C). batches: its images, uint8; one batch is in memory at a time. finish: called after the
    images are written; returns the other arrays and the metadata. Raises RunError if the batches do not have M images.
    """
    with (
        files.replacing(path) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
    ):
        with _member(archive, "arr_0") as out:
            np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": shape})
            written = 0
            for batch in batches:
                assert batch.dtype == np.uint8 and batch.shape[1:] == shape[1:], (batch.dtype, batch.shape)
                out.write(np.ascontiguousarray(batch).data)
                written += len(batch)
        if written != shape[0]:
            raise RunError(f"{path}: {written} images were read instead of {shape[0]}; did they change during the run?")
        arrays, about = finish()
        text = json.dumps({"reference": dataclasses.asdict(about)}, indent=1)
        for name, array in {**arrays, "about": np.array(text)}.items():
            with _member(archive, name) as out:
                np.lib.format.write_array(out, np.asarray(array), version=(1, 0), allow_pickle=False)
    return about


def _member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    """A new file NAME.npy in the archive, to write to."""
    # a fixed date, so that the file's hash does not depend on the time
    return archive.open(zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0)), "w", force_zip64=True)


def read_about(path: Path) -> About | None:
    """Metadata of the .npz at `path`; None: it has none, as ADM's reference batches, or `path` is not a zip file.

    Raises UserError if the metadata is damaged.
    """
    path = Path(path)
    if not path.is_file() or not zipfile.is_zipfile(path):
        return None
    try:
        with open_npz_file(path) as file:
            if "about" not in file.names:
                return None
            header = file.header("about")
            text = str(file.read("about")) if header.nbytes <= 4 * ABOUT_CHARACTERS else None
        if text is None or header.dtype.kind != "U" or header.shape != ():
            raise ValueError(f"it is {header.dtype} {header.shape}")
        values = parse_json(text)["reference"]
        if values["format"] != FORMAT:
            raise ValueError(f"format {values['format']!r}, this version knows {FORMAT}")
        about = About(**{**values, "shape": tuple(values["shape"])})
        for field in dataclasses.fields(About):
            _check_type(field.name, field.type, getattr(about, field.name))
        return about
    except READ_ERRORS as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: its metadata (array about) cannot be read ({reason}); make the reference again"
        ) from error


# Declared type of a field of About -> types that its value may have. The keys are types, not texts: this module has no
# `from __future__ import annotations`.
_RUNTIME_TYPES: dict[object, tuple[type, ...]] = {
    str: (str,),
    int: (int,),
    bool: (bool,),
    int | None: (int, type(None)),
    tuple[int, int, int]: (tuple,),
}


def _check_type(name: str, declared: object, value: object) -> None:
    """Raise ValueError unless a field's value has its declared type."""
    # for isinstance, a bool is also an int
    if not isinstance(value, _RUNTIME_TYPES[declared]) or (isinstance(value, bool) and declared is not bool):
        raise ValueError(f"{name} is {value!r}")


def check_network(path: Path, extractor: FeatureExtractor) -> None:
    """Raise UserError if the file's statistics are of another network than `extractor`. Call it before extraction."""
    about = read_about(path)
    if about is None or about.features_sha256 == extractor.sha256:
        return
    weights = " with other weights" if about.features == extractor.name else ""
    raise UserError(
        f"{path} holds statistics of {about.features} ({about.features_sha256[:12]}), made for suite {about.suite}, but"
        f" the samples' features are from {extractor.name}{weights} ({extractor.sha256[:12]}): use that network or suite,"
        f" or make the reference again with `harness data reference --suite`"
    )


def check_content(path: Path, about: About, arrays: Mapping[str, np.ndarray], kept_sha256: str) -> None:
    """Raise UserError if the file's images or statistics do not match the hashes in its metadata.

    arrays: its statistics, by the names in STATISTICS. kept_sha256: hash of its images, as they were read.
    """
    if kept_sha256 != about.kept_sha256:
        raise UserError(f"{path}: its images do not match the hash in its metadata; make the reference again")
    if statistics_sha256(arrays) != about.statistics_sha256:
        raise UserError(f"{path}: mu and sigma do not match the hash in its metadata; make the reference again")
