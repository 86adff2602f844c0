"""Makes a reference file (`evaluators.reference_file`) of images from any source.

The source is read three times: to hash it and choose the images that are kept, to compute features, and to write. Memory
holds one batch, the sums of the statistics and 8 bytes per image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluators.products import products_on
from evaluators.reference import MINIMUM_IMAGES
from evaluators.reference_file import About, read_about, statistics_sha256, write
from evaluators.streamed_statistics import feature_statistics
from evaluators.suites import Suite
from harness import registry
from harness._version import VERSION
from harness.errors import RunError, UserError
from harness.images.open import open_images
from harness.images.source import ImageSource, from_batches, pixel_hash
from harness.io import files
from harness.io.progress import Stages
from harness.io.text import read_path
from harness.randomness.threefry_numpy import Purpose, bits

BATCH = 256  # images read at a time


@dataclass(frozen=True, kw_only=True)
class ReferenceResult:
    """What `make_reference` returns. about: the description of the file. written: False if it existed already."""

    about: About
    written: bool


def open_source(source: str, data: Path | None = None) -> ImageSource:
    """The images of the data set named `source`, or else of the file, folder or pattern `source`.

    If a path is also the name of a data set, such as digits, the data set is meant; ./digits is the path. data: path of
    the data set, if it needs one.
    """
    if source in registry.datasets:
        images = registry.datasets.get(source).load(data)
        return from_batches([images.images], len(images), labels=images.labels, name=f"data set {source}")
    if data is not None:
        raise UserError(f"--data is the path of a data set, and {source!r} is none; leave it out")
    try:
        path = read_path(source)
    except ValueError as error:
        raise UserError(f"SOURCE: {error}") from error
    if not path.exists() and not any(sign in source for sign in "*?["):
        known = registry.unknown("data set", source, registry.datasets.names())
        raise UserError(f"{source}: no such file or folder, and {known}")
    return open_images(path)


def make_reference(
    source: ImageSource,
    out: Path,
    suite: Suite,
    *,
    weights: Path | None = None,
    entry: str | None = None,
    images: int | None = None,
    seed: int = 0,
    cache: Path | None = None,
    device: str = "cpu",
) -> ReferenceResult:
    """Write the reference of `source` for `suite` to `out`, unless it exists already.

    weights: of the suite's network, if it needs a file. entry: of that file, where several fit. images: number of
    images that are kept for precision and recall; None: all. seed: for choosing these. cache: folder where features and statistics are stored under hashes of the
    images and the network. UserError: fewer than MINIMUM_IMAGES images, more images than there are, or another file at
    `out`.
    """
    count = source.count
    assert count is not None, source
    kept_count = count if images is None else images
    if min(count, kept_count) < MINIMUM_IMAGES:
        too_few = count if count < MINIMUM_IMAGES else kept_count
        raise UserError(f"a reference of {too_few} images is too small: give {MINIMUM_IMAGES}, better thousands")
    if images is not None and images > count:
        raise UserError(f"--images {images} is more than the {count} images of {source.name}; leave it out to keep all")
    if out.suffix != ".npz":
        raise UserError(f"--out {out}: a reference is an .npz; give it that ending")
    existing = read_about(out)
    if out.exists() and existing is None:
        raise UserError(f"{out} exists and is no reference of `harness data reference`; give another --out")
    with files.claimed(out), Stages() as progress:
        extractor = suite.features.load(device, weights=weights, entry=entry)
        kept = _choose_kept(source, count, kept_count, seed, progress)
        images_sha256 = source.sha256()  # known since `_choose_kept` has read all images
        choice_seed = None if kept_count == count else seed  # None: nothing was chosen
        if existing is not None:
            for field, found, wanted in (
                ("images_sha256", existing.images_sha256, images_sha256),
                ("kept", existing.kept, kept_count),
                ("seed", existing.seed, choice_seed),
                ("features_sha256", existing.features_sha256, extractor.sha256),
            ):
                if found != wanted:
                    raise UserError(
                        f"{out} is another reference ({field} {found} there, {wanted} here); give another --out, or move "
                        "it away"
                    )
            return ReferenceResult(about=existing, written=False)
        with products_on(device):
            statistics = feature_statistics(source, extractor, cache=cache, progress=progress).arrays()
        kept_images = _KeptImages(source, kept, progress)

        def finish() -> tuple[dict[str, np.ndarray], About]:
            """The arrays beside the images, and the description; `write` calls it when it has written the images."""
            if kept_images.all_sha256 != images_sha256:
                raise RunError(f"{source.name} changed while it was read; repeat the command when it no longer changes")
            height, width, channels = source.shape
            about = About(
                source=Path(source.name).name,
                images=count,
                images_sha256=images_sha256,
                kept=kept_count,
                kept_sha256=kept_images.kept_sha256,
                seed=choice_seed,
                shape=(int(height), int(width), int(channels)),
                lossy=source.lossy,
                suite=suite.name,
                suite_version=str(suite.version),
                features=suite.features.name,
                features_sha256=extractor.sha256,
                statistics_sha256=statistics_sha256(statistics),
                harness_version=VERSION,
            )
            return {**_labels(source, kept), **statistics}, about

        about = write(out, (kept_count, *source.shape), kept_images, finish)
    return ReferenceResult(about=about, written=True)


def _choose_kept(source: ImageSource, count: int, kept: int, seed: int, progress: Stages) -> np.ndarray:
    """A mask of the images to keep: bool (count,), of which `kept` are True.

    Each image gets a random number that is a function of the seed and its pixels, so the choice does not depend on the
    order of images; those with the smallest numbers are kept.
    """
    keys = np.zeros(count, np.int64)  # 63 bits of each image's hash
    done = 0
    for batch in source.batches(BATCH):  # also if all images are kept: this pass gives the source its own hash
        if kept < count:
            digests = (hashlib.sha256(np.ascontiguousarray(image).data).digest() for image in batch)
            keys[done : done + len(batch)] = [int.from_bytes(digest[:8], "little") >> 1 for digest in digests]
        done += len(batch)
        progress("reading images", done, count)
    mask = np.ones(count, np.bool_)
    if kept < count:
        words = bits(seed, Purpose.EVALUATION, keys, step=0, count=2).astype(np.uint64)
        numbers = (words[:, 0] << np.uint64(32)) | words[:, 1]
        mask[np.lexsort((keys, numbers))[kept:]] = False  # sorted by number; equal numbers by key
    return mask


class _KeptImages:
    """Iterates over the images to keep, uint8 (n, H, W, C) batches.

    kept: bool mask over all images. After a complete pass, `all_sha256` and `kept_sha256` are the hashes of all images
    and of the kept ones.
    """

    def __init__(self, source: ImageSource, kept: np.ndarray, progress: Stages):
        self._source, self._kept, self._progress = source, kept, progress
        self.all_sha256 = self.kept_sha256 = ""

    def __iter__(self) -> Iterator[np.ndarray]:
        counts = (len(self._kept), int(self._kept.sum()))
        digests = [pixel_hash((n, *self._source.shape)) for n in counts]
        done = 0
        for batch in self._source.batches(BATCH):
            part = batch[self._kept[done : done + len(batch)]]
            for digest, images in zip(digests, (batch, part), strict=True):
                digest.update(np.ascontiguousarray(images).data)
            done += len(batch)
            self._progress("writing", done, len(self._kept))
            yield part
        self.all_sha256, self.kept_sha256 = (digest.hexdigest() for digest in digests)


def _labels(source: ImageSource, kept: np.ndarray) -> dict[str, np.ndarray]:
    """The label arrays of the file, by name: arr_1 of the kept images, and the count of each label among all images.

    Empty if the source has no labels.
    """
    if source.labels is None:
        return {}
    values, counts = np.unique(source.labels, return_counts=True)
    return {
        "arr_1": source.labels[kept].astype("<i8"),
        "label_values": values.astype("<i8"),
        "label_counts": counts.astype("<i8"),
    }
