"""Images in memory."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Images in memory: `images` (N, H, W, C) uint8 in [0, 255], `labels` (N,) int64."""

    name: str
    images: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        assert self.images.dtype == np.uint8 and self.images.ndim == 4, (self.images.dtype, self.images.shape)
        assert self.labels.dtype == np.int64 and self.labels.shape == self.images.shape[:1]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def sha256(self) -> str:
        """Content hash of images and labels, shapes included."""
        digest = hashlib.sha256(repr((self.images.shape, self.labels.shape)).encode())
        digest.update(np.ascontiguousarray(self.images))
        digest.update(np.ascontiguousarray(self.labels))
        return digest.hexdigest()

    def shrunk(self, side: int) -> ImageSet:
        """The images averaged over areas down to `side` pixels, rounded; themselves where they are not a multiple of it."""
        _, height, width, channels = self.images.shape
        factor = height // side
        if factor < 2 or (height, width) != (side * factor, side * factor):
            return self
        blocks = self.images.reshape(-1, side, factor, side, factor, channels)  # (N, side, f, side, f, C)
        images = np.rint(blocks.mean(axis=(2, 4))).astype(np.uint8)
        return ImageSet(name=self.name, images=images, labels=self.labels)
