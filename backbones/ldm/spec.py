"""Names, sizes and arguments of the class-conditional U-Nets of LDM.

Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (arXiv:2112.10752), Table 13;
CompVis/latent-diffusion a506df5, configs/latent-diffusion/cin256-v2.yaml (LDM-4), models/ldm/cin256/config.yaml (LDM-8).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backbones.unet.layout import MAX_BLOCKS, Layout, check_arguments, check_whole, heads_rule, unet_layout
from harness.spec import BackboneSpec

CONTEXT_TOKENS = 1  # the class

SHARED = {
    "in_channels": 3,
    "num_classes": 1000,
    "out_channels": None,  # in_channels: the noise alone
    "res_blocks": 2,
    "heads": 0,  # 0: as many as have head_channels each
    "head_channels": 0,
    "context_width": 512,  # of the class's vector
    "transformer_depth": 1,
    "null_class": True,  # one more label, the last, for "no class"
    "dropout": 0.0,
    "gradient_checkpointing": False,
}

# fmt: off
DENOISERS = {
    # attention_rates: how often the side was halved where attention stands, as 1, 2, 4, ...
    "ldm-4":  {"input_size": 64, "width": 192, "multipliers": (1, 2, 3, 5), "attention_rates": (8, 4, 2), "heads": 1},
    "ldm-8":  {"input_size": 32, "in_channels": 4, "width": 256, "multipliers": (1, 2, 4), "attention_rates": (4, 2, 1), "head_channels": 32, "null_class": False},
    # not of the paper: for machines without an accelerator
    "ldm-xs": {"input_size": 32, "width": 64, "multipliers": (1, 2), "res_blocks": 1, "attention_rates": (2,), "head_channels": 32, "context_width": 64},
}
SUMMARIES = {
    "ldm-4": "U-Net in the latents of a VQ autoencoder of factor 4",
    "ldm-8": "U-Net in the latents of a VQ autoencoder of factor 8; no null label",
    "ldm-xs": "small U-Net with cross-attention to the class",
}
# fmt: on


def ldm_layout(arguments: Mapping[str, Any]) -> Layout:
    """The layout of the U-Net from the builder's arguments; what cannot be built is refused in one line."""
    check_arguments("LDM", arguments)
    for name in ("num_classes", "context_width"):
        check_whole("LDM", name, arguments[name], 1)
    check_whole("LDM", "transformer_depth", arguments["transformer_depth"], 1, MAX_BLOCKS)
    return unet_layout(
        input_size=arguments["input_size"],
        in_channels=arguments["in_channels"],
        width=arguments["width"],
        multipliers=tuple(arguments["multipliers"]),
        res_blocks=arguments["res_blocks"],
        attention_sides=frozenset(
            arguments["input_size"] // rate for rate in arguments["attention_rates"] if arguments["input_size"] >= rate
        ),
        heads_of=heads_rule("LDM", arguments["heads"], arguments["head_channels"]),
        residual_resampling=False,
    )


SPECS: tuple[BackboneSpec, ...] = tuple(
    BackboneSpec(
        name=name,
        family="ldm",
        summary=SUMMARIES[name],
        defaults={**SHARED, **row},
        null_label="num_classes" if {**SHARED, **row}["null_class"] else None,
        builders={"torch": "backbones.ldm.torch_model:LDM", "jax": "backbones.ldm.flax_model:LDM"},
        closed_form="backbones.ldm.compute:count",
    )
    for name, row in DENOISERS.items()
)
"""The two LDMs of the paper's Table 6, and a small one."""
