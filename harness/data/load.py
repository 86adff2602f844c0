"""Loading data sets: what a run is trained on, the images that it is compared with, and the images behind latents."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness import registry
from harness.data import latents, npz, prepared
from harness.data.examples import Examples
from harness.data.images import ImageSet
from harness.errors import UserError
from harness.protocols import Protocol

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class NamedImages:
    """Images with the name that opens them again from any folder.

    crop: of a prepared data set; None: unknown. name: an absolute path, or the name of a data set (`open_image_set`).
    """

    images: ImageSet
    crop: str | None
    name: str


def training_data(protocol: Protocol, data: Path | None) -> Examples:
    """What a run is trained on: the images of the protocol's data set, or their latents in the cache `data`."""
    if protocol.space == "latents":
        if (problem := latents.missing(data, protocol)) is not None:
            raise UserError(f"data set {protocol.dataset!r} in latents: {problem}")
        assert data is not None
        return latents.load(data)
    return load_data(protocol, data)


def load_data(protocol: Protocol, data: Path | None) -> ImageSet:
    """The images of the protocol's data set, averaged down to its resolution if that divides their size.

    Prepared images are not averaged: they are returned at the size they have. data: as --data names it. If it is a cache
    of latents, the images that it was made of are loaded, as they are.
    """
    if data is not None and latents.is_cache(data):
        meta = latents.read_meta(data)
        return source_images(meta.source_paths, meta.images["sha256"], str(data))
    images = registry.datasets.get(protocol.dataset).load(data)
    if not images.labelled and protocol.num_classes > 1:
        raise UserError(f"{data} {npz.WITHOUT_LABELS} {protocol.num_classes}; without classes it is num_classes = 0")
    return images.downsampled(protocol.resolution)


def open_image_set(source: str) -> NamedImages:
    """The images of `source`: a prepared folder, an .npz with labels, or a name of `harness list datasets`."""
    path = Path(source)
    if path.is_dir() and prepared.is_prepared(path):
        return NamedImages(images=prepared.load(path), crop=prepared.read_meta(path).crop, name=str(path.resolve()))
    if path.suffix == ".npz" and path.is_file():
        images = npz.load(path)
        if not images.labelled:
            raise UserError(f"{path} has no labels (arr_1); a cache of latents needs one for each image")
        return NamedImages(images=images, crop=None, name=str(path.resolve()))
    if not path.exists() and source in registry.datasets and not registry.datasets.get(source).needs_folder:
        return NamedImages(images=registry.datasets.get(source).load(None), crop=None, name=source)
    problem = (
        "is neither a prepared data set nor an .npz"
        if path.exists()
        else "is neither a folder nor a data set that needs none"
    )
    name = source if source in registry.datasets else "NAME"
    raise UserError(
        f"{source} {problem}; give the folder that `harness data prepare {name} --from PATH --out DIR` makes"
    )


COMPARE_OTHERS = "name images to compare with by --reference PATH"


def source_images(source_paths: dict[str, str], sha256: str, owner: str, remedy: str = COMPARE_OTHERS) -> ImageSet:
    """The images that a cache of latents was made of; UserError where they are gone or have changed.

    source_paths: see `Examples`. sha256: of the images. owner: the run or cache that messages name. remedy: what they advise.
    """
    path = source_paths.get("images", "")
    try:
        images = open_image_set(path).images
    except UserError as error:
        raise UserError(f"the images behind {owner} are not where they were ({path}); {remedy}") from error
    if images.sha256 != sha256:
        raise UserError(
            f"{path} holds other images ({images.sha256[:12]}) than those behind {owner} ({sha256[:12]}); {remedy}"
        )
    return images


def check_labels(data: Examples, num_classes: int) -> None:
    """UserError for a label outside 0 .. num_classes - 1, before anything is trained on it."""
    num_classes = max(num_classes, 1)  # without classes all labels are 0
    low, high = int(data.labels.min()), int(data.labels.max())
    if low < 0 or high >= num_classes:
        bad = low if low < 0 else high
        raise UserError(f"data set {data.name!r} has label {bad}, but the protocol has classes 0 to {num_classes - 1}")
    empty = np.flatnonzero(np.bincount(data.labels, minlength=num_classes) == 0)
    if len(empty):
        more = f", nor have {len(empty) - 1:,} more" if len(empty) > 1 else ""
        logger.warning(
            f"data set {data.name!r} has no image of class {empty[0]}{more}; samples of it will come of nothing learned"
        )
