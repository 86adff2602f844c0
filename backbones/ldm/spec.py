"""Names, sizes and arguments of the class-conditional U-Nets of LDM.

Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (arXiv:2112.10752), Table 13;
CompVis/latent-diffusion a506df5, configs/latent-diffusion/cin256-v2.yaml (LDM-4), models/ldm/cin256/config.yaml (LDM-8).
"""

from __future__ import annotations

from harness.spec import BackboneSpec

SHARED = {
    "in_channels": 3,
    "num_classes": 1000,
    "out_channels": None,  # None: in_channels, for noise only
    "res_blocks": 2,
    "heads": 0,  # 0: channels / head_channels
    "head_channels": 0,
    "context_width": 512,  # of the class embedding
    "transformer_depth": 1,
    "null_class": True,  # an additional last label for "no class"
    "dropout": 0.0,
    "gradient_checkpointing": False,
}

# fmt: off
DENOISERS = {
    # attention_rates: downsampling factors (1, 2, 4, ...) of the levels with attention
    "ldm-4":  {"input_size": 64, "width": 192, "multipliers": (1, 2, 3, 5), "attention_rates": (8, 4, 2), "heads": 1},
    "ldm-8":  {"input_size": 32, "in_channels": 4, "width": 256, "multipliers": (1, 2, 4), "attention_rates": (4, 2, 1), "head_channels": 32, "null_class": False},
    # not of the paper: for machines without an accelerator
    "ldm-2xs": {"input_size": 16, "width": 32, "multipliers": (1, 1), "res_blocks": 1, "attention_rates": (2,), "head_channels": 32, "context_width": 32},
    "ldm-xs": {"input_size": 32, "width": 64, "multipliers": (1, 2), "res_blocks": 1, "attention_rates": (2,), "head_channels": 32, "context_width": 64},
}
SUMMARIES = {
    "ldm-4": "U-Net in the latents of a VQ autoencoder of factor 4",
    "ldm-8": "U-Net in the latents of a VQ autoencoder of factor 8; no null label",
    "ldm-2xs": "very small U-Net with cross-attention to the class",
    "ldm-xs": "small U-Net with cross-attention to the class",
}
# fmt: on


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
"""The two LDMs of the paper's Table 6, and two small ones."""
