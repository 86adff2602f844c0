"""References: the real images that samples are judged by, with their features, kept on disk by content."""

import hashlib
import os
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from evaluators.division import Division
from evaluators.features import FeatureExtractor, Features
from evaluators.reference_file import STATISTICS, check_content, check_network, read_about
from evaluators.statistics import Statistics, statistics
from harness.errors import RunError, UserError
from harness.images.source import readable
from harness.io.arrays import RowsInOrder, release_freed_memory, release_pages

Progress = Callable[[str, int, int], None]  # (stage, images done, images in all)

CACHE_FORMAT = 2
IMAGES_PER_CALL = 512
MINIMUM_IMAGES = 20  # the third nearest neighbour and a covariance must at least exist


@dataclass(frozen=True, kw_only=True)
class Reference:
    """M real images as one feature extractor sees them.

    images: uint8 (M, H, W, C). sha256: of their shape and pixels. statistics: of the pooled features.
    extractor: the one that samples must go through as well.
    """

    images: np.ndarray
    features: Features
    statistics: Statistics
    sha256: str
    extractor: FeatureExtractor
    spatial_statistics: Statistics | None = None  # of the spatial features, where the extractor has them


def images_sha256(images: np.ndarray) -> str:
    """Hash of shape and pixels of uint8 (N, H, W, C), the same however the images are stored or batched."""
    digest = hashlib.sha256(f"uint8 {images.shape}\n".encode())
    for start in range(0, len(images), IMAGES_PER_CALL):
        digest.update(np.ascontiguousarray(images[start : start + IMAGES_PER_CALL]).tobytes())
    return digest.hexdigest()


def check_images(images: np.ndarray, what: str) -> None:
    """Refuse what is not uint8 (N, H, W, 1 or 3) with N >= 1; `what` names it in the message."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
        raise UserError(f"{what} must be uint8 images (N, H, W, C) with C 1 or 3, got {images.dtype} {images.shape}")


def extract(
    images: np.ndarray,
    extractor: FeatureExtractor,
    stage: str,
    progress: Progress | None = None,
    division: Division | None = None,  # among processes, of which this one collects
) -> Features:
    """Features of all images, reporting progress. RunError when a feature is not finite or the extractor breaks its
    contract."""
    key = "" if division is None else cache_key(images_sha256(images), extractor.sha256)
    kept: dict[str, RowsInOrder] = {}
    if progress is not None:
        progress(stage, 0, len(images))
    for call, start in enumerate(range(0, len(images), IMAGES_PER_CALL)):
        if division is None or division.mine(call):
            seen = extractor(images[start : start + IMAGES_PER_CALL])
        else:
            seen = division.take(key, call)
        release_pages(images)
        count = min(IMAGES_PER_CALL, len(images) - start)
        if seen.pooled.shape != (count, extractor.dim):
            raise RunError(f"features {extractor.name}: shape {seen.pooled.shape}, expected {(count, extractor.dim)}")
        for name in ("pooled", "logits", "spatial"):
            rows = getattr(seen, name)
            if rows is None:
                continue
            finite = np.isfinite(rows).all(axis=1)
            if not finite.all():
                image = start + int(np.argmin(finite))
                raise RunError(f"features {extractor.name} of image {image} are not finite ({stage})")
            if start == 0:
                kept[name] = RowsInOrder(len(images), rows.shape[1])
            kept[name].add(rows)
        if progress is not None:
            progress(stage, start + count, len(images))
    release_freed_memory()
    return Features(**{name: rows.done() for name, rows in kept.items()})


def contribute(images: np.ndarray, extractor: FeatureExtractor, division: Division) -> None:
    """Compute what `extract` of the same images in the collecting process leaves to this one."""
    key = cache_key(images_sha256(images), extractor.sha256)
    for call, start in enumerate(range(0, len(images), IMAGES_PER_CALL)):
        if division.mine(call) and not division.has(key, call):
            division.put(key, call, extractor(images[start : start + IMAGES_PER_CALL]))
            release_pages(images)


def cache_key(images_sha256: str, features_sha256: str) -> str:
    """What is kept of these images as this network sees them is filed under this."""
    return hashlib.sha256(f"{CACHE_FORMAT} {images_sha256} {features_sha256}".encode()).hexdigest()


def build_reference(
    images: np.ndarray,
    extractor: FeatureExtractor,
    *,
    cache: Path | None = None,  # folder of feature files; None: nothing is read or written
    progress: Progress | None = None,
    division: Division | None = None,  # among processes, of which this one collects
) -> Reference:
    """Features and statistics of uint8 (M, H, W, C), M >= 20. A cached file is used only if it is intact, else made
    again."""
    check_images(images, "the reference")
    if len(images) < MINIMUM_IMAGES:
        raise UserError(f"a reference of {len(images)} images is too small: give {MINIMUM_IMAGES}, better thousands")
    digest = images_sha256(images)
    features = cached(images, digest, extractor, cache)
    if features is None:
        features = extract(images, extractor, "reference features", progress, division)
        if cache is not None:
            key = cache_key(digest, extractor.sha256)
            _write_cache(_cache_path(cache, key), key, features)
    return Reference(
        images=images,
        features=features,
        statistics=statistics(features.pooled),
        sha256=digest,
        extractor=extractor,
        spatial_statistics=None if features.spatial is None else statistics(features.spatial),
    )


def with_statistics(reference: Reference, path: Path) -> Reference:
    """The reference with the statistics that its file brings, as ADM's reference batches do: mu, sigma, mu_s, sigma_s.

    Those are of a whole training set, while the images in the file serve precision and recall alone. The hash is then of
    images and statistics, or the one that a file of `harness data reference` has. A file without mu is returned as it
    is; statistics that do not fit the features, or the file's own account of them, are refused.
    """
    check_network(path, reference.extractor)
    about = read_about(path)
    with readable(path), path.open("rb") as file, np.load(file, allow_pickle=False) as data:
        if "mu" not in data.files:
            return reference
        if about is not None:
            check_content(
                path, about, {name: data[name] for name in STATISTICS if name in data.files}, reference.sha256
            )
        given = {}
        for mean, covariance, dim in (("mu", "sigma", reference.extractor.dim), ("mu_s", "sigma_s", None)):
            if mean not in data.files or covariance not in data.files:
                continue
            mu, sigma = data[mean], np.asarray(data[covariance], np.float64)
            wanted = len(mu) if dim is None else dim
            if mu.shape != (wanted,) or sigma.shape != (wanted, wanted):
                raise UserError(
                    f"{path}: {mean} {mu.shape} and {covariance} {sigma.shape} are not statistics of "
                    f"{reference.extractor.name}, which has {wanted} features"
                )
            if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
                raise UserError(f"{path}: {mean} or {covariance} is not finite; fetch the file again")
            given[mean] = Statistics(n=None, mean=mu.astype(np.float64), covariance=(sigma + sigma.T) / 2)
    digest = hashlib.sha256(reference.sha256.encode())
    for each in given.values():
        digest.update(each.mean.tobytes())
        digest.update(each.covariance.tobytes())
    return replace(
        reference,
        statistics=given["mu"],
        spatial_statistics=given.get("mu_s", reference.spatial_statistics),
        sha256=digest.hexdigest() if about is None else about.sha256,
    )


def _checksum(key: str, features: Features) -> str:
    digest = hashlib.sha256(key.encode())
    digest.update(np.ascontiguousarray(features.pooled).tobytes())
    for more in (features.logits, features.spatial):
        if more is not None:
            digest.update(np.ascontiguousarray(more).tobytes())
    return digest.hexdigest()


def cached(images: np.ndarray, digest: str, extractor: FeatureExtractor, cache: Path | None) -> Features | None:
    """What the cache has of images with the hash `digest`; None: nothing, or nothing intact."""
    key = cache_key(digest, extractor.sha256)
    return None if cache is None else read_cache(_cache_path(cache, key), key, len(images), extractor.dim)


def _cache_path(cache: Path, key: str) -> Path:
    return Path(cache) / f"features-{key[:32]}.npz"


def read_cache(path: Path, key: str, n: int, dim: int) -> Features | None:
    """The features, or None where the file is absent, damaged or not what its name says."""
    try:
        # numpy leaves the file open when it refuses the content, so it is opened here
        with path.open("rb") as file, np.load(file, allow_pickle=False) as data:
            more = {name: data[name] for name in ("logits", "spatial") if name in data.files}
            features = Features(pooled=data["pooled"], **more)
            checksum = str(data["checksum"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    sound = features.pooled.dtype == np.float32 and features.pooled.shape == (n, dim)
    return features if sound and checksum == _checksum(key, features) else None


def _write_cache(path: Path, key: str, features: Features) -> None:
    arrays = {"pooled": features.pooled, "checksum": np.array(_checksum(key, features))}
    for name in ("logits", "spatial"):
        if getattr(features, name) is not None:
            arrays[name] = getattr(features, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)  # mkstemp makes it the owner's alone; a group shares its runs
        Path(temporary).replace(path)
    except OSError as error:
        raise RunError(f"{path}: the reference's features could not be cached: {error.strerror}") from error
    finally:
        Path(temporary).unlink(missing_ok=True)
