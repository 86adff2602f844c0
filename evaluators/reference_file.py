"""Reference files: real images and the statistics of their features, in the layout of ADM's evaluator, with what they
are in the file itself.

An uncompressed .npz with arr_0 uint8 (M, H, W, C), the images for precision and recall; arr_1 int64 (M,), their labels
where they are known; mu, sigma and, where the network has spatial features, mu_s, sigma_s, float64, of all N >= M
images; label_values and label_counts int64 (K,), the labels of all N; and `about`, a JSON text (see `About`).
Nothing in it needs pickle.
"""

import dataclasses
import hashlib
import json
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from evaluators.features import FeatureExtractor
from harness.errors import RunError, UserError
from harness.images.npz import open_npz_file
from harness.io import files

FORMAT = 1
ABOUT_CHARACTERS = 1 << 16
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")
BROKEN = (ValueError, KeyError, TypeError, RuntimeError)  # `open_npz_file` turns others into UserError, a ValueError


@dataclass(frozen=True, kw_only=True)
class About:
    """What a reference file says of itself.

    source: what the images were called. images, images_sha256: number of all and their hash, in their order
    (`evaluators.reference.images_sha256`). kept, kept_sha256: the same of arr_0. seed: of the choice; None: all were
    kept. lossy: some were stored with loss. suite, suite_version: what it was made for; any suite on the same network
    may use it. features_sha256: of that network. statistics_sha256: of mu, sigma, mu_s and sigma_s.
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
        """The reference's name in records: of the images, whatever machine took the statistics of them. It is that of
        the images alone where all were kept, as if they had been given without a file of statistics."""
        if self.kept_sha256 == self.images_sha256:
            return self.images_sha256
        return hashlib.sha256(f"reference {self.images_sha256} {self.kept_sha256}\n".encode()).hexdigest()


def statistics_sha256(arrays: Mapping[str, np.ndarray]) -> str:
    """Of those of mu, sigma, mu_s and sigma_s that are there."""
    digest = hashlib.sha256()
    for name in STATISTICS:
        if name in arrays:
            digest.update(f"{name} {arrays[name].dtype.str} {arrays[name].shape}\n".encode())
            digest.update(np.ascontiguousarray(arrays[name]))
    return digest.hexdigest()


def write(path: Path, shape: tuple[int, ...], batches: Iterable[np.ndarray], finish) -> About:
    """Write a reference file; the same content gives the same bytes.

    shape: of arr_0, (M, H, W, C). batches: its images, uint8, held one at a time. finish() is called when they are
    written, and gives the other arrays and the `About`. The file is there when it is whole.
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
            raise RunError(
                f"{path}: {written} images came where {shape[0]} were to be kept; were they changed meanwhile?"
            )
        arrays, about = finish()
        text = json.dumps({"reference": dataclasses.asdict(about)}, indent=1)
        for name, array in {**arrays, "about": np.array(text)}.items():
            with _member(archive, name) as out:
                np.lib.format.write_array(out, np.asarray(array), version=(1, 0), allow_pickle=False)
    return about


def _member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    # a fixed date, or the same reference would hash differently tomorrow
    return archive.open(zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0)), "w", force_zip64=True)


def read_about(path: Path) -> About | None:
    """What the .npz at `path` says of itself; None where it says nothing, as ADM's own reference batches do."""
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
        found = json.loads(text)["reference"]
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']!r}, this version knows {FORMAT}")
        about = About(**{**found, "shape": tuple(found["shape"])})
        for field in dataclasses.fields(About):
            _check_type(field.name, field.type, getattr(about, field.name))
        return about
    except BROKEN as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: what it says of itself cannot be read ({reason}); make the reference again"
        ) from error


def _check_type(name: str, wanted: object, value: object) -> None:
    plain = {str: str, int: int, bool: bool, int | None: (int, type(None)), tuple[int, int, int]: tuple}[wanted]
    if not isinstance(value, plain) or (isinstance(value, bool) and wanted is not bool):
        raise ValueError(f"{name} is {value!r}")


def check_network(path: Path, extractor: FeatureExtractor) -> None:
    """Refuse a reference file whose statistics another network saw; before anything is computed."""
    about = read_about(path)
    if about is None or about.features_sha256 == extractor.sha256:
        return
    weights = " with other weights" if about.features == extractor.name else ""
    raise UserError(
        f"{path} holds statistics of {about.features} ({about.features_sha256[:12]}), made for suite {about.suite}, but"
        f" samples are judged by {extractor.name}{weights} ({extractor.sha256[:12]}): give that network or suite, or make"
        f" the reference again with `harness data reference --suite`"
    )


def check_content(path: Path, about: About, arrays: Mapping[str, np.ndarray], kept_sha256: str) -> None:
    """Refuse a file whose images or statistics are not those that it describes."""
    if kept_sha256 != about.kept_sha256:
        raise UserError(f"{path}: its images are not those that it describes (their hash differs); make it again")
    if statistics_sha256(arrays) != about.statistics_sha256:
        raise UserError(f"{path}: mu and sigma are not those that it describes (their hash differs); make it again")
