"""`ImageSet`: images and labels to train on, in memory or mapped from a file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.data.examples import Normal
from harness.errors import UserError
from harness.randomness.threefry_numpy import Purpose, bits

if TYPE_CHECKING:
    from harness.protocols import Protocol


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Images to train on; implements `Examples`.

    images: uint8 (N, H, W, C) in [0, 255], in memory or mapped read-only. labels: int64 (N,). known_sha256: content hash
    of a prepared data set (`harness.data.prepared`), which is too large to be hashed when it is loaded. Raises UserError for
    arrays of another form.
    """

    name: str
    images: np.ndarray
    labels: np.ndarray
    known_sha256: str | None = None
    labelled: bool = True  # False: there are no labels, and `labels` are all 0

    def __post_init__(self) -> None:
        images, labels = np.asanyarray(self.images), np.asanyarray(self.labels)
        if images.dtype != np.uint8 or images.ndim != 4:
            raise UserError(
                f"data set {self.name!r}: images are {images.dtype} {images.shape}; they must be uint8 (N, H, W, C) in [0, 255]"
            )
        if labels.dtype != np.int64 or labels.shape != images.shape[:1]:
            raise UserError(
                f"data set {self.name!r}: labels are {labels.dtype} {labels.shape}; they must be int64 ({len(images)},)"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def sha256(self) -> str:
        """Content hash of images and labels, shapes included; of a prepared data set `known_sha256`."""
        if self.known_sha256 is not None:
            return self.known_sha256
        digest = hashlib.sha256(repr((self.images.shape, self.labels.shape)).encode())
        digest.update(np.ascontiguousarray(self.images).data)
        digest.update(np.ascontiguousarray(self.labels).data)
        return digest.hexdigest()

    @property
    def identity(self) -> dict[str, Any]:
        return {"dataset_sha256": self.sha256}

    @property
    def source_paths(self) -> dict[str, str]:
        return {}

    def check(self, protocol: Protocol) -> None:
        """UserError for images of another size than the protocol's."""
        found, wanted = self.images.shape[1:], (protocol.resolution, protocol.resolution, protocol.image_channels)
        if found != wanted:
            raise UserError(
                f"data set {self.name!r} has images {found}, protocol {protocol.name!r} wants {wanted} (H, W, C)"
                + ("; prepare it at that resolution" if self.known_sha256 else "")
            )

    def gather(self, rows: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
        """Images `rows`, int64 (n,), mirrored where `mirrored`, bool (n,): uint8 (n, H, W, C), a copy."""
        images = self.images[rows]
        images[mirrored] = images[mirrored, :, ::-1]
        return images

    def to_model_input(self, stored: Any, normal: Normal) -> Any:
        """uint8 (n, H, W, C), a torch tensor or a jax array, to float32 (n, C, H, W) in [-1, 1]. normal: not used."""
        # n H W C -> n C W H -> n C H W; torch and jax both have `swapaxes`
        return stored.swapaxes(1, 3).swapaxes(2, 3) / 127.5 - 1

    def reference(self, count: int) -> ImageSet:
        """The `count` images that are the reference of a protocol with `reference_images`, in their order; 0: this set.

        Which ones depends on the number of images alone. Returns this set unchanged if it has no more than `count`.
        """
        if not 0 < count < len(self):
            return self
        # the rows with the smallest of 32-bit numbers that are functions of the row
        numbers = bits(0, Purpose.EVALUATION, np.arange(len(self)), step=0, count=1)[:, 0]
        rows = np.sort(np.lexsort((np.arange(len(self)), numbers))[:count])
        return ImageSet(name=self.name, images=self.images[rows], labels=self.labels[rows], labelled=self.labelled)

    def downsampled(self, side: int) -> ImageSet:
        """The images averaged over blocks of pixels down to `side` x `side`, and rounded.

        Returns this set unchanged if `side` does not divide the images' size, if the images have that size already, or
        if the set is prepared: a prepared data set of another resolution is another data set.
        """
        if self.known_sha256 is not None:
            return self
        _, height, width, channels = self.images.shape
        factor = height // side
        if factor < 2 or (height, width) != (side * factor, side * factor):
            return self
        blocks = self.images.reshape(-1, side, factor, side, factor, channels)  # (N, side, f, side, f, C)
        images = np.rint(blocks.mean(axis=(2, 4))).astype(np.uint8)
        return ImageSet(name=self.name, images=images, labels=self.labels)
