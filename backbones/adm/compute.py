"""Closed-form compute and parameters of ADM's networks; the convention is `harness.compute.CONVENTION`.

It reproduces the Gflops of the DiT paper's Table 6: 307, 1120 and 1983 for ADM at 128, 256 and 512 pixels, and 742 and
2813 for ADM-U including its base network.
"""

from __future__ import annotations

from typing import Any

from backbones.adm.layout import adm_layout
from backbones.unet.compute import Tally, count_parts, count_timestep
from harness.spec import Compute


def count_denoiser(**arguments: Any) -> Compute:
    """Compute of one forward pass on one image, by part. Takes every argument of the builder."""
    return _count_unet("denoiser", arguments)


def count_upsampler(**arguments: Any) -> Compute:
    """As `count_denoiser`, for an upsampler; the interpolation of the low-resolution image is free."""
    return _count_unet("upsampler", arguments)


def count_classifier(**arguments: Any) -> Compute:
    """As `count_denoiser`, for a classifier of noised images."""
    layout = adm_layout("classifier", arguments)
    tally = Tally()
    count_timestep(tally, layout)
    count_parts(tally, layout, scale_shift=True, context=None)
    channels, tokens = layout.channels, layout.side**2 + 1  # all positions, and their mean as one more token
    tally.norm("out.0", channels, layout.side**2)
    tally.params += channels * tokens  # position table: adding it is free
    tally.conv("out.2.qkv_proj", channels, 3 * channels, kernel_area=1, positions=tokens)
    # Only the token of the mean is a query, and only its output is projected to the logits.
    tally.attention("out.2", queries=1, keys=tokens, channels=channels)
    tally.conv("out.2.c_proj", channels, arguments["num_classes"], kernel_area=1, positions=1)
    return tally.compute()


def _count_unet(kind: str, arguments: dict[str, Any]) -> Compute:
    """Compute of a whole U-Net. kind: "denoiser" or "upsampler"."""
    layout = adm_layout(kind, arguments)
    tally = Tally()
    count_timestep(tally, layout)
    tally.params += arguments["num_classes"] * layout.embedding  # label table: a look-up is free
    count_parts(tally, layout, scale_shift=True, context=None)
    tally.norm("out.0", layout.channels, layout.side**2)
    outputs = arguments["out_channels"] or 2 * arguments["in_channels"]
    tally.conv("out.2", layout.channels, outputs, kernel_area=9, positions=layout.side**2)
    return tally.compute()
