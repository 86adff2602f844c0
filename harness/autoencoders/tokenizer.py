"""Autoencoders of packages, which own both directions of normalisation: the objects of `harness.autoencoders` entry points."""

from __future__ import annotations

import math
from dataclasses import dataclass

from harness.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """An autoencoder with its name.

    builder: "module:attribute", a callable without arguments that returns a torch.nn.Module with its trained weights. Its
    `encode` takes images, float32 (N, image_channels, H, W) in [-1, 1], and returns latents, float32 (N, channels, h, w), or
    the pair (mean, standard deviation) of a posterior. They are normalised: of about mean 0 and standard deviation 1 over a
    data set. Its `decode` takes such latents and returns images. factor: pixels for each latent cell along a side.
    round_trip: largest root mean square of decode(encode(images)) - images, which `harness data latents` checks.
    """

    name: str
    builder: str
    channels: int
    factor: int
    round_trip: float
    image_channels: int = 3
    summary: str = ""

    def __post_init__(self) -> None:
        for name in ("channels", "factor", "image_channels"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise UserError(f"autoencoder {self.name!r}: {name} {value!r} is no positive whole number")
        if not 0 < self.round_trip < math.inf:
            raise UserError(f"autoencoder {self.name!r}: round_trip {self.round_trip!r} is no positive number")
