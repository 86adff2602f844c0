"""`Examples`: what both engines know of a data set, be it images or latents.

An example is made in two steps. On the host `gather` reads what is stored of it; on the device `to_model_input` makes
what the network learns, in the framework's own arithmetic. Everything random is decided elsewhere, by position in the
stream: whether an example is mirrored, and the normal numbers with which a posterior is sampled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from harness import protocols

Normal = Callable[[tuple[int, ...]], Any]
"""Normal(shape): standard normal numbers float32 (N, *shape); those of an example depend on seed and position alone."""


class Examples(Protocol):
    """A data set to train on."""

    @property
    def name(self) -> str:
        """Name of the data set."""

    @property
    def labels(self) -> np.ndarray:
        """int64 (N,)."""

    @property
    def identity(self) -> dict[str, Any]:
        """What the data add to a run's identity: dataset_sha256, of the images; for latents also "latents", how they were made."""

    @property
    def source_paths(self) -> dict[str, str]:
        """Paths or names of what a run needs later: of latents "vae", their autoencoder, and "images"; else empty.

        They are no part of the identity.
        """

    def check(self, protocol: protocols.Protocol) -> None:
        """UserError where `protocol` wants images or latents of another size."""

    def gather(self, rows: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
        """What is stored of examples `rows`, int64 (n,), mirrored left to right where `mirrored`, bool (n,): (n, ...)."""

    def to_model_input(self, stored: object, normal: Normal) -> Any:
        """`stored` (n, ...), a torch tensor or a jax array, to what the network learns, float32 (n, C, H, W)."""
