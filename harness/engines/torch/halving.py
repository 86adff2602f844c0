"""Batches that are halved where the memory of a GPU does not suffice for them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from harness.errors import RunError, one_line

logger = logging.getLogger(__name__)

T = TypeVar("T")


class HalvedBatches:
    """Calls of a function with as many of a batch's images at once as the memory suffices for, which is found by trying.

    What was found holds for later batches. fill: size up to which the function fills up smaller parts; 0: not.
    """

    def __init__(self, device: torch.device, fill: int = 0):
        self._device, self._fill = device, fill
        self.most: int | None = None  # images that fit at once; None: any number, as far as is known

    def filled(self, images: int) -> int:
        """How many images are computed at once for a part of `images`."""
        return max(images, min(self._fill, self.most or self._fill))

    def call(self, function: Callable[[slice], T], count: int) -> list[T]:
        """The results of `function` for consecutive parts of `count` images.

        Where it raises torch.OutOfMemoryError, its part is halved and tried again. Raises RunError where not even one image
        fits.
        """
        results: list[T] = []
        start = 0
        while start < count:
            part = slice(start, min(start + (self.most or count), count))
            try:
                results.append(function(part))
            except torch.OutOfMemoryError as error:
                images = self.filled(part.stop - start)
                if images == 1:
                    raise RunError(
                        f"the memory of {self._device} is too small to sample one image ({one_line(error)[:160]}); free it of "
                        "other programs, or sample on another --device"
                    ) from error
                self.most = -(-images // 2)
            else:
                start = part.stop
                continue
            # Here, where nothing refers to the tensors of the failed call any more.
            logger.info(f"{images} images at once do not fit in the memory of {self._device}; trying {self.most}")
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
        return results


class SharedProgress:
    """The progress of a batch whose parts are sampled one after the other, in units of the whole batch.

    advance: called `units` times in all. A part that is begun again does not count twice.
    """

    def __init__(self, advance: Callable[[], None], units: int, images: int):
        self._advance, self._units, self._images = advance, units, images
        self._called = 0

    def of(self, part: slice) -> Callable[[], None]:
        """What is called `units` times while a part is sampled."""
        done = 0

        def step() -> None:
            nonlocal done
            done += 1
            reached = (part.start * self._units + (part.stop - part.start) * done) // self._images
            while self._called < reached:
                self._called += 1
                self._advance()

        return step
