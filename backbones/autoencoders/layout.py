"""Arguments of an autoencoder's network: their check, the downsampling factor, and their inference from weight shapes.

The arguments are described at `backbones.autoencoders.spec.AutoencoderSpec`. No framework is needed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from harness.errors import UserError

GROUPS = 32  # of every group normalisation
RESOLUTION = 256  # image side in pixels that the attention resolutions of the public networks refer to


def factor(multipliers: tuple[int, ...]) -> int:
    """Downsampling factor, image side over latent side: each level but the last halves the side."""
    return 2 ** (len(multipliers) - 1)


def check_arguments(
    *,
    resolution: int,
    image_channels: int,
    width: int,
    multipliers: tuple[int, ...],
    blocks: int,
    attention_resolutions: tuple[int, ...],
    latent_channels: int,
    code_channels: int,
    codes: int | None,
) -> None:
    """Raise UserError for arguments from which no network can be built."""
    numbers = {
        "resolution": resolution,
        "image_channels": image_channels,
        "width": width,
        "blocks": blocks,
        "latent_channels": latent_channels,
        "code_channels": code_channels,
        "codes": 1 if codes is None else codes,  # None is valid, so a number that passes stands for it
        **{f"multipliers[{i}]": value for i, value in enumerate(multipliers)},
    }
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"autoencoder: {name} is {value!r}; it must be a whole number of at least 1")
    if not multipliers:
        raise UserError("autoencoder: multipliers are empty; give one for each level, such as (1, 2, 4)")
    if width % GROUPS:
        raise UserError(f"autoencoder: width {width} is not divisible by the {GROUPS} groups of its normalisation")
    sides = [resolution >> level for level in range(len(multipliers))]
    if resolution % factor(multipliers):
        raise UserError(f"autoencoder: resolution {resolution} cannot be halved {len(multipliers) - 1} times")
    for side in attention_resolutions:
        if side not in sides:
            raise UserError(f"autoencoder: no level has attention resolution {side}; the levels have {sides}")


def infer_arguments(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Arguments of the VQ network whose parameters have these names and shapes, in the public layout.

    Attention resolutions are relative to RESOLUTION. Raises KeyError with the name of a missing parameter; the other
    parameters are not checked.
    """
    codes, code_channels = shapes["quantize.embedding.weight"]
    width, image_channels = shapes["encoder.conv_in.weight"][:2]
    levels = {int(match[1]) for name in shapes if (match := re.match(r"encoder\.down\.(\d+)\.", name))}
    blocks = {int(match[1]) for name in shapes if (match := re.match(r"encoder\.down\.0\.block\.(\d+)\.", name))}
    return {
        "resolution": RESOLUTION,
        "image_channels": image_channels,
        "width": width,
        "multipliers": tuple(  # without any level, level 0 raises the KeyError
            shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] // width for i in range(max(levels, default=0) + 1)
        ),
        "blocks": max(blocks, default=0) + 1,
        "attention_resolutions": tuple(
            RESOLUTION >> i for i in sorted(levels) if f"encoder.down.{i}.attn.0.q.weight" in shapes
        ),
        "latent_channels": shapes["post_quant_conv.weight"][0],
        "code_channels": code_channels,
        "codes": codes,
    }
