"""Making evaluation references: from images of any kind to a file that judges samples (`evaluators.reference_file`).

The source is read three times: to know what it is and which images are kept, for the network, and to write. Memory
holds one batch, the sums of the statistics and 8 bytes an image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from evaluators.reference_file import About, read_about, statistics_sha256, write
from harness import registry
from harness._version import VERSION
from harness.errors import RunError, UserError
from harness.images.open import open_images
from harness.images.source import ImageSource, from_batches
from harness.io import files
from harness.io.progress import Stages
from harness.randomness.threefry_numpy import Purpose, bits

if TYPE_CHECKING:
    from evaluators.suites import Suite

BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Made:
    """about: what the file says. written: False where the same reference was there already."""

    about: About
    written: bool


def open_source(source: str, data: Path | None = None) -> ImageSource:
    """The images of a registered data set (`data`: where it is, if it needs a place), or of a path (`./digits` where a
    data set has that name)."""
    if source in registry.datasets:
        images = registry.datasets.get(source).load(data)
        return from_batches([images.images], len(images), labels=images.labels, name=f"data set {source}")
    if data is not None:
        raise UserError(f"--data names the place of a data set, and {source!r} is none; leave it out")
    path = Path(source)
    if not path.exists() and not any(sign in source for sign in "*?["):
        known = registry.unknown("data set", source, registry.datasets.names())
        raise UserError(f"{source}: no such file or folder, and {known}")
    return open_images(path)


def make_reference(
    source: ImageSource,
    out: Path,
    suite: Suite,
    *,
    weights: Path | None = None,  # of the suite's network, where the user brings them
    images: int | None = None,  # how many are kept for precision and recall; None: all
    seed: int = 0,  # of the choice
    cache: Path | None = None,  # folder of features and statistics by content
    device: str = "cpu",
) -> Made:
    """Write the reference of `source` for `suite` to `out`, or find it there.

    Refused: fewer than 20 images, more to be kept than there are, another file at `out`.
    """
    from evaluators.reference import MINIMUM_IMAGES
    from evaluators.streamed_statistics import feature_statistics

    count = source.count
    assert count is not None, source
    if count < MINIMUM_IMAGES or (images is not None and images < MINIMUM_IMAGES):
        few = count if count < MINIMUM_IMAGES else images
        raise UserError(f"a reference of {few} images is too small: give {MINIMUM_IMAGES}, better thousands")
    if images is not None and images > count:
        raise UserError(f"--images {images} is more than the {count} images of {source.name}; leave it out to keep all")
    if out.suffix != ".npz":
        raise UserError(f"--out {out}: a reference is an .npz; give it that ending")
    there = read_about(out)
    if out.exists() and there is None:
        raise UserError(f"{out} is there and is no reference of `harness data reference`; give another --out")
    keeps_all = images is None or images == count
    with files.claimed(out), Stages() as progress:
        extractor = suite.features.load(device, weights=weights)
        kept = _choose(source, count if keeps_all else images, seed, progress)
        wanted = {
            "images_sha256": source.sha256(),
            "kept": int(kept.sum()),
            "seed": None if keeps_all else seed,
            "features_sha256": extractor.sha256,
        }
        if there is not None:
            for field, value in wanted.items():
                if getattr(there, field) != value:
                    raise UserError(
                        f"{out} is another reference ({field} {getattr(there, field)} there, {value} here); give another"
                        " --out, or move it away"
                    )
            return Made(about=there, written=False)
        seen = feature_statistics(source, extractor, cache=cache, progress=progress)
        statistics = seen.arrays()
        passing = _Passing(source, kept, progress)

        def finish() -> tuple[dict[str, np.ndarray], About]:
            if passing.all_sha256 != wanted["images_sha256"]:
                raise RunError(f"{source.name} changed while it was read; repeat the command when it is at rest")
            about = About(
                source=Path(source.name).name,
                images=count,
                kept_sha256=passing.kept_sha256,
                shape=tuple(int(each) for each in source.shape),
                lossy=source.lossy,
                suite=suite.name,
                suite_version=str(suite.version),
                features=suite.features.name,
                statistics_sha256=statistics_sha256(statistics),
                harness_version=VERSION,
                **wanted,
            )
            return {**_labels(source, kept), **statistics}, about

        about = write(out, (wanted["kept"], *source.shape), passing, finish)
    return Made(about=about, written=True)


def _choose(source: ImageSource, kept: int, seed: int, progress: Stages) -> np.ndarray:
    """bool (N,): the images that are kept. Each draws a random number from the seed and its own pixels, so the order in
    which they come does not matter; the `kept` smallest numbers win."""
    whole = kept == source.count
    keys = np.zeros(source.count, np.int64)
    done = 0
    for batch in source.batches(BATCH):
        if not whole:
            digests = (hashlib.sha256(np.ascontiguousarray(image)).digest() for image in batch)
            keys[done : done + len(batch)] = [int.from_bytes(each[:8], "little") >> 1 for each in digests]
        done += len(batch)
        progress("reading images", done, source.count)
    mask = np.ones(source.count, bool)
    if not whole:
        words = bits(seed, Purpose.EVALUATION, keys, 0, 2).astype(np.uint64)
        draws = (words[:, 0] << np.uint64(32)) | words[:, 1]
        mask[np.lexsort((keys, draws))[kept:]] = False
    return mask


class _Passing:
    """The images to keep as they pass; the hashes of all and of the kept ones are there at the end."""

    def __init__(self, source: ImageSource, kept: np.ndarray, progress: Stages):
        self._source, self._kept, self._progress = source, kept, progress
        self.all_sha256 = self.kept_sha256 = ""

    def __iter__(self) -> Iterator[np.ndarray]:
        shape = self._source.shape
        counts = (len(self._kept), int(self._kept.sum()))
        # as `evaluators.reference.images_sha256` has it
        digests = [hashlib.sha256(f"uint8 {(n, *shape)}\n".encode()) for n in counts]
        done = 0
        for batch in self._source.batches(BATCH):
            part = batch[self._kept[done : done + len(batch)]]
            for digest, images in zip(digests, (batch, part), strict=True):
                digest.update(np.ascontiguousarray(images))
            done += len(batch)
            self._progress("writing", done, len(self._kept))
            yield part
        self.all_sha256, self.kept_sha256 = (digest.hexdigest() for digest in digests)


def _labels(source: ImageSource, kept: np.ndarray) -> dict[str, np.ndarray]:
    """arr_1 of the images that are kept and the histogram of all; nothing where there are no labels."""
    if source.labels is None:
        return {}
    values, counts = np.unique(source.labels, return_counts=True)
    return {
        "arr_1": source.labels[kept].astype("<i8"),
        "label_values": values.astype("<i8"),
        "label_counts": counts.astype("<i8"),
    }
