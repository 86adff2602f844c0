"""The blocks of ADM's U-Nets, from their arguments.

Source: Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis" (arXiv:2105.05233), appendix I; the
command lines of openai/guided-diffusion 22e0df8, README.md, and its script_util.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backbones.unet.layout import Layout, check_arguments, heads_rule, unet_layout
from harness.errors import UserError


def adm_layout(kind: str, arguments: Mapping[str, Any]) -> Layout:
    """The layout of a network with these arguments. Raises UserError if there is no such network.

    kind: "denoiser", "upsampler" or "classifier"; arguments: of the builder.
    """
    check_arguments("ADM", arguments)
    low = arguments.get("low_res_size")
    if kind == "upsampler" and not (type(low) is int and 1 <= low <= arguments["input_size"]):
        raise UserError(f"ADM: low_res_size {low!r} must lie between 1 and input_size {arguments['input_size']}")
    if kind == "classifier" and arguments["num_classes"] < 1:
        raise UserError("ADM: a classifier needs num_classes of at least 1")
    return unet_layout(
        input_size=arguments["input_size"],
        in_channels=arguments["in_channels"] * (2 if kind == "upsampler" else 1),  # and those of the resized image
        width=arguments["width"],
        multipliers=tuple(arguments["multipliers"]),
        res_blocks=arguments["res_blocks"],
        attention_sides=frozenset(arguments["attention_resolutions"]),
        heads_of=heads_rule("ADM", arguments["heads"], arguments["head_channels"]),
        residual_resampling=True,
        encoder_only=kind == "classifier",
    )
