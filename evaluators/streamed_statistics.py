"""Statistics of image sets of any size: one batch is held at a time, and what is done is kept on disk.

The accumulated sums are saved while they grow, in the folder and under the kind of key that features of references have
(`evaluators.reference`), so a killed process continues where it was and a second one finds everything done. The sums
are exact: where the work was cut, and in what order the images came, shows only as far as the network's own float32
rounding depends on an image's neighbours in its batch (1e-5 of the largest element is allowed; on CPUs it was 0).
"""

import hashlib
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluators.features import FeatureExtractor, Features
from evaluators.reference import IMAGES_PER_CALL, Progress, cache_key, extract, read_cache
from evaluators.statistics import Moments, Statistics
from harness.images.source import ImageSource
from harness.io import files

SAVE_SECONDS = 60.0  # at least, between two saves
SAVE_SHARE = 0.03  # of the time, at most, goes into saving


@dataclass(frozen=True, kw_only=True)
class ImageStatistics:
    """Statistics of the features of all images of a source; spatial: where the network has such features."""

    pooled: Statistics
    spatial: Statistics | None

    def arrays(self) -> dict[str, np.ndarray]:
        """Under the names of ADM's reference batches: mu, sigma, mu_s, sigma_s, float64."""
        named = {"mu": self.pooled.mean, "sigma": self.pooled.covariance}
        if self.spatial is not None:
            named |= {"mu_s": self.spatial.mean, "sigma_s": self.spatial.covariance}
        return named


def image_statistics(
    source: ImageSource,
    extractor: FeatureExtractor,
    *,
    cache: Path | None = None,  # folder of features and statistics by content; None: nothing is read or written
    progress: Progress | None = None,
) -> ImageStatistics:
    """Statistics of N >= 2 images. Those that are in the cache, as statistics or as features, are not seen again."""
    key = cache_key(source.sha256(), extractor.sha256)
    path = None if cache is None else Path(cache) / f"statistics-{key[:32]}.npz"
    stage = "reference features"
    done: dict[str, Moments] = {} if path is None else _read(path, key)
    if not done and cache is not None:
        features = read_cache(Path(cache) / f"features-{key[:32]}.npz", key, source.count, extractor.dim)
        if features is not None:
            done = _updated({}, features)
    n = done["pooled"].n if done else 0
    if n < source.count:
        if progress is not None:
            progress(stage, n, source.count)
        saved, pause, passed = time.monotonic(), SAVE_SECONDS, 0
        for batch in source.batches(IMAGES_PER_CALL):
            passed += len(batch)
            if passed <= n:
                continue  # read again, for the order is the source's, but not seen again by the network
            at = f"{stage}, the batch that begins at image {passed - len(batch)}"
            done = _updated(done, extract(batch, extractor, at))
            if progress is not None:
                progress(stage, passed, source.count)
            if path is not None and (passed == source.count or time.monotonic() - saved > pause):
                begin = time.monotonic()
                _write(path, key, done)
                saved = time.monotonic()
                pause = max(SAVE_SECONDS, (saved - begin) / SAVE_SHARE)
    spatial = done.get("spatial")
    return ImageStatistics(pooled=done["pooled"].finish(), spatial=None if spatial is None else spatial.finish())


def _updated(done: dict[str, Moments], features: Features) -> dict[str, Moments]:
    for name in ("pooled", "spatial"):
        rows = getattr(features, name)
        if rows is not None:
            done.setdefault(name, Moments(rows.shape[1])).update(rows)
    return done


def _arrays(done: dict[str, Moments]) -> dict[str, np.ndarray]:
    return {f"{kind}/{name}": array for kind, each in done.items() for name, array in each.state().items()}


def _checksum(key: str, arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(key.encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(arrays[name]))
    return digest.hexdigest()


def _write(path: Path, key: str, done: dict[str, Moments]) -> None:
    arrays = _arrays(done)
    with files.replacing(path) as file:
        np.savez(file, **arrays, checksum=np.array(_checksum(key, arrays)))


def _read(path: Path, key: str) -> dict[str, Moments]:
    """What `_write` wrote; nothing where the file is absent, damaged, or of another key."""
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
        done = {kind: Moments.from_state(part) for kind, part in kinds.items()}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return {}
    return done if "pooled" in done else {}
