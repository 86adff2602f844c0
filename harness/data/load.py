"""The stages of a run on this machine: create or open it, train, sample, evaluate. What is done is not repeated."""

from __future__ import annotations

from pathlib import Path

from harness import registry
from harness.data import latents
from harness.data.examples import Examples
from harness.data.images import ImageSet
from harness.errors import UserError
from harness.protocols import Protocol


def training_data(protocol: Protocol, data: Path | None) -> Examples:
    """What is trained on: the images of the protocol's data set, or the cache of their latents that `data` is."""
    if protocol.space == "latents":
        if (lack := latents.missing(data, protocol)) is not None:
            raise UserError(f"data set {protocol.dataset!r} in latents: {lack}")
        assert data is not None
        return latents.load(data)
    return load_data(protocol, data)


def load_data(protocol: Protocol, data: Path | None) -> ImageSet:
    """The images of the protocol's data set, averaged down to its resolution where they are a multiple of it. `data` may
    be a cache of their latents."""
    if data is not None and latents.is_cache(data):
        meta = latents.read_meta(data)
        return source_images(meta.places, meta.images["sha256"], str(data))
    return registry.datasets.get(protocol.dataset).load(data).downsampled(protocol.resolution)


def source_images(places: dict[str, str], sha256: str, whose: str) -> ImageSet:
    """The images that latents were made of, where they were then; refused if they are gone, or others by now."""
    from harness.data.encode import open_images

    place = places.get("images", "")
    remedy = "name images to judge by with --reference PATH"
    try:
        images = open_images(place).data
    except UserError as error:
        raise UserError(f"the images behind {whose} are not where they were ({place}); {remedy}") from error
    if images.sha256 != sha256:
        raise UserError(
            f"{place} holds other images ({images.sha256[:12]}) than {whose} is of ({sha256[:12]}); {remedy}"
        )
    return images


def check_labels(data: Examples, num_classes: int) -> None:
    """A label outside the classes is refused before anything is trained on it."""
    low, high = int(data.labels.min()), int(data.labels.max())
    if low < 0 or high >= num_classes:
        bad = low if low < 0 else high
        raise UserError(f"data set {data.name!r} has label {bad}, but the protocol has classes 0 to {num_classes - 1}")
