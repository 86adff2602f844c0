"""Feature statistics of image sets of any size, one batch at a time, with saved progress.

The accumulated sums are saved periodically in the cache of reference features, under the same kind of key
(`evaluators.reference`): a killed process continues from the last save, and a second run reads the finished sums. The
sums are exact. So interruptions and the order of images change the result only as far as the network's float32 rounding
depends on the other images of a batch (tolerance 1e-5 of the largest element; 0 was measured on CPUs).
"""

import hashlib
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluators.features.spec import FeatureExtractor, Features
from evaluators.reference import IMAGES_PER_CALL, Progress, cache_key, cache_path, extract, read_cache, without_cache
from evaluators.statistics import Moments, Statistics
from harness.images.source import ImageSource
from harness.io import files

MIN_SAVE_INTERVAL_SECONDS = 60.0
MAX_SAVE_SHARE = 0.03  # of the time may be spent on saving


@dataclass(frozen=True, kw_only=True)
class FeatureStatistics:
    """Statistics of the features of all images of a source. spatial: None if the network has no spatial features."""

    pooled: Statistics
    spatial: Statistics | None

    def arrays(self) -> dict[str, np.ndarray]:
        """The statistics by their names in ADM's reference batches: mu, sigma, mu_s, sigma_s, float64."""
        named = {"mu": self.pooled.mean, "sigma": self.pooled.covariance}
        if self.spatial is not None:
            named |= {"mu_s": self.spatial.mean, "sigma_s": self.spatial.covariance}
        return named


def feature_statistics(
    source: ImageSource,
    extractor: FeatureExtractor,
    *,
    cache: Path | None = None,  # folder of features and statistics by content hash; None: no cache
    progress: Progress | None = None,
) -> FeatureStatistics:
    """Feature statistics of N >= 2 images. What the cache holds is not computed again.

    The cache may hold sums that this function saved, perhaps of a part of the images, or the features of all of them,
    which `evaluators.reference.build_reference` saved.

    Raises UserError for images that cannot be read, RunError as `evaluators.reference.extract`.
    """
    key = cache_key(source.sha256(), extractor.sha256)
    assert source.count is not None  # `sha256` has counted the images
    path = None if cache is None else Path(cache) / f"statistics-{key[:32]}.npz"
    stage = "reference features"
    sums: dict[str, Moments] = {} if path is None else _read(path, key)
    if not sums and cache is not None:
        features = read_cache(cache_path(cache, key), key, source.count, extractor.dim)
        if features is not None:
            sums = _add_batch({}, features)
    n = sums["pooled"].n if sums else 0  # images in the sums
    if n < source.count:
        if progress is not None:
            progress(stage, n, source.count)
        saved_at, interval = time.monotonic(), MIN_SAVE_INTERVAL_SECONDS
        read = 0  # images that the source has yielded
        for batch in source.batches(IMAGES_PER_CALL):
            read += len(batch)
            if read <= n:
                # The sums hold this batch already, and all of it, because they are saved between batches. A source can
                # only be read from its start.
                continue
            batch_stage = f"{stage}, the batch that begins at image {read - len(batch)}"
            sums = _add_batch(sums, extract(batch, extractor, batch_stage))
            if progress is not None:
                progress(stage, read, source.count)
            if path is not None and (read == source.count or time.monotonic() - saved_at > interval):
                begin = time.monotonic()
                with without_cache(path.parent):
                    _write(path, key, sums)
                saved_at = time.monotonic()
                interval = max(MIN_SAVE_INTERVAL_SECONDS, (saved_at - begin) / MAX_SAVE_SHARE)
    spatial = sums.get("spatial")
    return FeatureStatistics(pooled=sums["pooled"].finish(), spatial=None if spatial is None else spatial.finish())


def _add_batch(sums: dict[str, Moments], features: Features) -> dict[str, Moments]:
    """Add a batch's features to the sums, in place, and return them. sums: "pooled" and "spatial" -> Moments."""
    for name in ("pooled", "spatial"):
        rows = getattr(features, name)
        if rows is not None:
            sums.setdefault(name, Moments(rows.shape[1])).update(rows)
    return sums


def _arrays(sums: dict[str, Moments]) -> dict[str, np.ndarray]:
    """The arrays of `Moments.state` of all sums, under "pooled/NAME" and "spatial/NAME"."""
    return {f"{kind}/{name}": array for kind, moments in sums.items() for name, array in moments.state().items()}


def _checksum(key: str, arrays: dict[str, np.ndarray]) -> str:
    """Hash of the key and of all arrays, by which a damaged file is detected."""
    digest = hashlib.sha256(key.encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def _write(path: Path, key: str, sums: dict[str, Moments]) -> None:
    """Save the sums atomically, for `_read`."""
    arrays = _arrays(sums)
    named: dict[str, Any] = arrays  # not ndarray: mypy would check it against savez's parameter allow_pickle
    with files.replacing(path) as file:
        np.savez(file, **named, checksum=np.array(_checksum(key, arrays)))


def _read(path: Path, key: str) -> dict[str, Moments]:
    """The saved sums, "pooled" and "spatial" -> Moments; empty if the file is missing, damaged, or of another key."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as data:
            arrays = {name: data[name] for name in data.files}
        checksum = str(arrays.pop("checksum"))
        if checksum != _checksum(key, arrays):
            return {}
        kinds: dict[str, dict[str, np.ndarray]] = {}
        for name, array in arrays.items():
            kind, _, part = name.partition("/")
            kinds.setdefault(kind, {})[part] = array
        sums = {kind: Moments.from_state(part) for kind, part in kinds.items()}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return {}
    return sums if "pooled" in sums else {}
