"""References: the real images that samples are compared with, and their features, which are cached by content hash."""

import hashlib
import logging
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from evaluators.features.spec import KINDS, FeatureExtractor, Features
from evaluators.reference_file import STATISTICS, check_content, check_network, read_about
from evaluators.sharded_extraction import ShardedExtraction
from evaluators.statistics import Statistics, statistics
from harness.errors import RunError, UserError
from harness.images.source import readable
from harness.io.arrays import RowsInOrder, release_freed_memory, release_pages

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]  # (stage, images done, total)

CACHE_FORMAT = 2
IMAGES_PER_CALL = 512
MAX_STATISTIC = 1e50  # of mu and sigma; products of larger ones overflow
MINIMUM_IMAGES = 20  # enough for a third nearest neighbour and a covariance


@dataclass(frozen=True, kw_only=True)
class Reference:
    """M real images, and their features by one extractor.

    images: uint8 (M, H, W, C); M = 0 for a file of statistics alone. statistics: of the pooled features, or those of the
    reference's file. sha256: of the images' shape and pixels or, with statistics of a file, the hash that
    `with_statistics` describes. extractor: samples must use the same one.
    """

    images: np.ndarray
    features: Features
    statistics: Statistics
    sha256: str
    extractor: FeatureExtractor
    spatial_statistics: Statistics | None = None  # of the spatial features; None: the extractor has none


def images_sha256(images: np.ndarray) -> str:
    """Hash of shape and pixels of uint8 (N, H, W, C); it does not depend on how the images are stored or batched."""
    digest = hashlib.sha256(f"uint8 {images.shape}\n".encode())
    for start in range(0, len(images), IMAGES_PER_CALL):
        digest.update(np.ascontiguousarray(images[start : start + IMAGES_PER_CALL]).tobytes())
    return digest.hexdigest()


def check_images(images: np.ndarray, what: str) -> None:
    """Raise UserError unless images are uint8 (N, H, W, 1 or 3) with N >= 1; `what` names them in the message."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
        raise UserError(f"{what} must be uint8 images (N, H, W, C) with C 1 or 3, got {images.dtype} {images.shape}")


def extract(
    images: np.ndarray,
    extractor: FeatureExtractor,
    stage: str,
    progress: Progress | None = None,
    sharding: ShardedExtraction | None = None,  # of several processes, in process 0; None: this one computes all
) -> Features:
    """Features of all images. stage: a description for progress and errors.

    Raises RunError when a feature is not finite or the extractor breaks its contract.
    """
    key = "" if sharding is None else cache_key(images_sha256(images), extractor.sha256)
    collected: dict[str, RowsInOrder] = {}  # by kind of feature
    if progress is not None:
        progress(stage, 0, len(images))
    for call, start in enumerate(range(0, len(images), IMAGES_PER_CALL)):
        if sharding is None or sharding.is_local(call):
            features = extractor(images[start : start + IMAGES_PER_CALL])
        else:
            features = sharding.wait_for(key, call)
        release_pages(images)
        count = min(IMAGES_PER_CALL, len(images) - start)
        if features.pooled.shape != (count, extractor.dim):
            shape, expected = features.pooled.shape, (count, extractor.dim)
            raise RunError(f"features {extractor.name}: shape {shape}, expected {expected}")
        for name in KINDS:
            rows: np.ndarray | None = getattr(features, name)
            if rows is None:
                continue
            finite = np.isfinite(rows).all(axis=1)
            if not finite.all():
                image = start + int(np.argmin(finite))
                raise RunError(f"features {extractor.name} of image {image} are not finite ({stage})")
            if start == 0:
                collected[name] = RowsInOrder(len(images), rows.shape[1])
            collected[name].add(rows)
        if progress is not None:
            progress(stage, start + count, len(images))
    release_freed_memory()
    return Features(**{name: rows.finish() for name, rows in collected.items()})


def compute_shard(images: np.ndarray, extractor: FeatureExtractor, sharding: ShardedExtraction) -> None:
    """Compute and save this process's share of the features that `extract` collects in process 0."""
    key = cache_key(images_sha256(images), extractor.sha256)
    for call, start in enumerate(range(0, len(images), IMAGES_PER_CALL)):
        if sharding.is_local(call) and not sharding.is_saved(key, call):
            sharding.save(key, call, extractor(images[start : start + IMAGES_PER_CALL]))
            release_pages(images)


def cache_key(images_sha256: str, features_sha256: str) -> str:
    """Key of cached features, from the hashes of the images and of the feature extractor."""
    return hashlib.sha256(f"{CACHE_FORMAT} {images_sha256} {features_sha256}".encode()).hexdigest()


def build_reference(
    images: np.ndarray,
    extractor: FeatureExtractor,
    *,
    cache: Path | None = None,  # folder of feature files; None: no cache
    progress: Progress | None = None,
    sharding: ShardedExtraction | None = None,  # of several processes, in process 0; None: this one computes all
) -> Reference:
    """The reference of images uint8 (M, H, W, C), M >= 20. A damaged cache file is replaced.

    Raises UserError for unsuitable images, RunError as `extract`. A cache that cannot be written is a warning.
    """
    check_images(images, "the reference")
    if len(images) < MINIMUM_IMAGES:
        raise UserError(
            f"a reference of {len(images)} images is too small: give at least {MINIMUM_IMAGES}, better thousands"
        )
    digest = images_sha256(images)
    features = cached_features(images, digest, extractor, cache)
    if features is None:
        features = extract(images, extractor, "reference features", progress, sharding)
        if cache is not None:
            key = cache_key(digest, extractor.sha256)
            with without_cache(cache):
                _write_cache(cache_path(cache, key), key, features)
    return Reference(
        images=images,
        features=features,
        statistics=statistics(features.pooled),
        sha256=digest,
        extractor=extractor,
        spatial_statistics=None if features.spatial is None else statistics(features.spatial),
    )


def statistics_alone(path: Path, extractor: FeatureExtractor) -> Reference:
    """The reference of an .npz that holds mu and sigma, and no images. Raises UserError as `with_statistics` does."""
    nothing = np.zeros(0)
    bare = Reference(
        images=np.empty((0, 1, 1, 3), np.uint8),
        features=Features(pooled=np.empty((0, extractor.dim), np.float32)),
        statistics=Statistics(n=None, mean=nothing, covariance=np.diag(nothing)),
        sha256="",
        extractor=extractor,
    )
    return with_statistics(bare, path)


def with_statistics(reference: Reference, path: Path) -> Reference:
    """The reference with the statistics in the .npz at `path`: mu, sigma, mu_s, sigma_s, as in ADM's reference batches.

    The statistics are of a whole training set; the images in the file are then used for precision and recall only.
    sha256 becomes the hash of images and statistics or, for a file of `harness data reference`, that of its metadata.
    If the file has no mu and sigma, the reference is returned unchanged. Raises UserError for statistics of another
    network, of a wrong shape, not finite, without their other half, or not those of the metadata.
    """
    check_network(path, reference.extractor)
    about = read_about(path)
    with readable(path), path.open("rb") as file, np.load(file, allow_pickle=False) as data:
        for pair in (("mu", "sigma"), ("mu_s", "sigma_s")):
            missing = [name for name in pair if name not in data.files]
            if len(missing) == 1:
                raise UserError(
                    f"{path}: {missing[0]} of {' and '.join(pair)} is missing; fetch or make the file again"
                )
        if "mu" not in data.files:
            return reference
        if about is not None:
            check_content(
                path, about, {name: data[name] for name in STATISTICS if name in data.files}, reference.sha256
            )
        given = {}  # "mu" and "mu_s" -> statistics of the pooled and of the spatial features
        # dim None: the length of mu_s, because an extractor does not state the number of its spatial features
        for mean, covariance, dim in (("mu", "sigma", reference.extractor.dim), ("mu_s", "sigma_s", None)):
            if mean not in data.files:
                continue
            mu, sigma = data[mean], data[covariance]
            if mu.dtype.kind not in "fiu" or sigma.dtype.kind not in "fiu":
                raise UserError(
                    f"{path}: {mean} and {covariance} are {mu.dtype} and {sigma.dtype}, and statistics are real numbers; make or "
                    "fetch the file again"
                )
            sigma = np.asarray(sigma, np.float64)
            wanted = mu.size if dim is None else dim
            if mu.shape != (wanted,) or sigma.shape != (wanted, wanted):
                raise UserError(
                    f"{path}: {mean} {mu.shape} and {covariance} {sigma.shape} are not statistics of "
                    f"{reference.extractor.name}, which has {wanted} features"
                )
            if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
                raise UserError(f"{path}: {mean} or {covariance} is not finite; fetch the file again")
            if max(np.abs(mu).max(initial=0), np.abs(sigma).max(initial=0)) > MAX_STATISTIC:
                raise UserError(
                    f"{path}: {mean} or {covariance} has values above {MAX_STATISTIC:g}, which no features have"
                )
            given[mean] = Statistics(n=None, mean=mu.astype(np.float64), covariance=(sigma + sigma.T) / 2)
    digest = hashlib.sha256(reference.sha256.encode())
    for from_file in given.values():
        digest.update(from_file.mean.tobytes())
        digest.update(from_file.covariance.tobytes())
    return replace(
        reference,
        statistics=given["mu"],
        spatial_statistics=given.get("mu_s", reference.spatial_statistics),
        sha256=digest.hexdigest() if about is None else about.sha256,
    )


def _checksum(key: str, features: Features) -> str:
    """Hash of the key and of all features, by which a damaged cache file is detected."""
    digest = hashlib.sha256(key.encode())
    for rows in (features.pooled, features.logits, features.spatial):
        if rows is not None:
            digest.update(np.ascontiguousarray(rows).tobytes())
    return digest.hexdigest()


def cached_features(
    images: np.ndarray, digest: str, extractor: FeatureExtractor, cache: Path | None
) -> Features | None:
    """Cached features of images with the hash `digest`; None: not in the cache, or damaged."""
    key = cache_key(digest, extractor.sha256)
    return None if cache is None else read_cache(cache_path(cache, key), key, len(images), extractor.dim)


def cache_path(cache: Path, key: str) -> Path:
    """The file of cached features in the folder `cache`."""
    return Path(cache) / f"features-{key[:32]}.npz"


def read_cache(path: Path, key: str, n: int, dim: int) -> Features | None:
    """The n features in a cache file; None: the file is missing, damaged, or of another key."""
    try:
        # opened here, because numpy does not close the file when it refuses the content
        with path.open("rb") as file, np.load(file, allow_pickle=False) as data:
            optional = {name: data[name] for name in ("logits", "spatial") if name in data.files}
            features = Features(pooled=data["pooled"], **optional)
            checksum = str(data["checksum"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    fits = features.pooled.dtype == np.float32 and features.pooled.shape == (n, dim)
    return features if fits and checksum == _checksum(key, features) else None


@contextmanager
def without_cache(cache: Path) -> Iterator[None]:
    """Log a warning where the cache, which only saves time, cannot be written: a read-only folder, a full disk."""
    try:
        yield
    except (OSError, RunError, ValueError) as error:  # ValueError: a name that the system cannot hold
        reason = (error.strerror or error) if isinstance(error, OSError) else error
        logger.warning(f"{cache} cannot be written ({reason}): the features are computed again next time")


def _write_cache(path: Path, key: str, features: Features) -> None:
    """Write a cache file atomically: processes may write the same file at the same time."""
    arrays = {"pooled": features.pooled, "checksum": np.array(_checksum(key, features))}
    for name in ("logits", "spatial"):
        if getattr(features, name) is not None:
            arrays[name] = getattr(features, name)
    named: dict[str, Any] = arrays  # not ndarray: mypy would check it against savez's parameter allow_pickle
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **named)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)  # mkstemp lets only the owner read it, but groups share their runs
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)
