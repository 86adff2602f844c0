"""The blocks of LDM's U-Nets, from their arguments.

Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (arXiv:2112.10752), Table 13;
CompVis/latent-diffusion a506df5, configs/latent-diffusion/cin256-v2.yaml (LDM-4), models/ldm/cin256/config.yaml (LDM-8).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backbones.unet.layout import MAX_BLOCKS, Layout, check_arguments, check_whole, heads_rule, unet_layout

CONTEXT_TOKENS = 1  # the class


def ldm_layout(arguments: Mapping[str, Any]) -> Layout:
    """The layout of the U-Net with these arguments of the builder. Raises UserError if there is no such network."""
    check_arguments("LDM", arguments)
    for name in ("num_classes", "context_width"):
        check_whole("LDM", name, arguments[name], 1)
    check_whole("LDM", "transformer_depth", arguments["transformer_depth"], 1, MAX_BLOCKS)
    size = arguments["input_size"]
    # A feature map that is downsampled by `rate` has side size // rate. A rate above the size has no feature map.
    attention_sides = frozenset(size // rate for rate in arguments["attention_rates"] if rate <= size)
    return unet_layout(
        input_size=size,
        in_channels=arguments["in_channels"],
        width=arguments["width"],
        multipliers=tuple(arguments["multipliers"]),
        res_blocks=arguments["res_blocks"],
        attention_sides=attention_sides,
        heads_of=heads_rule("LDM", arguments["heads"], arguments["head_channels"]),
        residual_resampling=False,
    )
