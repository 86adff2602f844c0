"""Where a training example comes from: what both engines know of a data set, be it images or latents.

An example is made in two halves. On the host `gather` reads what is stored of it; on the device `x0` makes of that what
the network learns, in the framework's own arithmetic. What is random is decided elsewhere, by position in the stream:
the mirroring before it is read, and the normal numbers that a posterior is drawn with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from harness import protocols

Normal = Callable[[tuple[int, ...]], Any]
"""Standard normal numbers float32 (N, *shape), one example's a function of seed and position alone."""


class Examples(Protocol):
    """A data set to train on. labels: int64 (N,)."""

    name: str
    labels: np.ndarray

    @property
    def identity(self) -> dict[str, Any]:
        """What of it makes a run another experiment: dataset_sha256, of the images, and for latents how they came about."""

    @property
    def places(self) -> dict[str, str]:
        """Where things are that a run needs later: "vae" and "images" of latents. No part of what the run is."""

    def check(self, task: protocols.Protocol) -> None:
        """Refuse a protocol that is of other images, or of other latents."""

    def gather(self, rows: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
        """What is stored of examples `rows`, int64 (n,), mirrored left to right where bool (n,) says so: (n, ...)."""

    def to_model_input(self, stored: Any, normal: Normal) -> Any:
        """`stored` as a torch tensor or a jax array, (n, ...) -> float32 (n, C, H, W): what the network learns."""
