"""Names, sizes and arguments of ADM's U-Nets, upsamplers and noisy classifiers.

Source: Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis" (arXiv:2105.05233), appendix I; the
command lines of openai/guided-diffusion 22e0df8, README.md, and its script_util.py.
"""

from __future__ import annotations

from harness.spec import BackboneSpec

SHARED = {
    "in_channels": 3,
    "num_classes": 1000,  # 0: no class conditioning
    "out_channels": None,  # 2 * in_channels: noise and variance
    "attention_resolutions": (32, 16, 8),  # sides of the feature maps with self-attention
    "heads": 0,  # 0: channels / head_channels
    "head_channels": 64,
    "qkv_first": False,  # order of the qkv layer's channels: (3, heads, C/heads) if true, else (heads, 3, C/heads)
    "dropout": 0.0,
    "gradient_checkpointing": False,
}

# fmt: off
DENOISERS = {
    "adm-64":  {"input_size": 64, "width": 192, "multipliers": (1, 2, 3, 4), "res_blocks": 3, "qkv_first": True, "dropout": 0.1},
    "adm-128": {"input_size": 128, "width": 256, "multipliers": (1, 1, 2, 3, 4), "res_blocks": 2, "heads": 4, "head_channels": 0},
    "adm-256": {"input_size": 256, "width": 256, "multipliers": (1, 1, 2, 2, 4, 4), "res_blocks": 2},
    "adm-512": {"input_size": 512, "width": 256, "multipliers": (0.5, 1, 1, 2, 2, 4, 4), "res_blocks": 2},
    # not of the paper: for machines without an accelerator
    "adm-2xs": {"input_size": 16, "width": 32, "multipliers": (1, 1), "res_blocks": 1, "attention_resolutions": (8,), "head_channels": 32},
    "adm-xs":  {"input_size": 32, "width": 64, "multipliers": (1, 2), "res_blocks": 1, "attention_resolutions": (8, 4), "head_channels": 32},
}
UPSAMPLERS = {
    "adm-u-64-256":  {"input_size": 256, "low_res_size": 64, "width": 192, "multipliers": (1, 1, 2, 2, 4, 4), "res_blocks": 2, "heads": 4, "head_channels": 0},
    "adm-u-128-512": {"input_size": 512, "low_res_size": 128, "width": 192, "multipliers": (1, 1, 2, 2, 4, 4), "res_blocks": 2, "attention_resolutions": (32, 16)},
    # not of the paper: built as adm-64, for the first step of a cascade over 32, 64 and 256 pixels; and a small one
    "adm-u-32-64":   {"input_size": 64, "low_res_size": 32, "width": 192, "multipliers": (1, 2, 3, 4), "res_blocks": 3, "dropout": 0.1},
    "adm-u-xs":      {"input_size": 32, "low_res_size": 16, "width": 64, "multipliers": (1, 2), "res_blocks": 1, "attention_resolutions": (8, 4), "head_channels": 32},
}
CLASSIFIERS = {
    "adm-classifier-64":  {"input_size": 64, "width": 128, "multipliers": (1, 2, 3, 4), "res_blocks": 4},
    "adm-classifier-128": {"input_size": 128, "width": 128, "multipliers": (1, 1, 2, 3, 4), "res_blocks": 2},
    "adm-classifier-256": {"input_size": 256, "width": 128, "multipliers": (1, 1, 2, 2, 4, 4), "res_blocks": 2},
    "adm-classifier-512": {"input_size": 512, "width": 128, "multipliers": (0.5, 1, 1, 2, 2, 4, 4), "res_blocks": 2},
    "adm-classifier-xs":  {"input_size": 32, "width": 64, "multipliers": (1, 2), "res_blocks": 1, "attention_resolutions": (8, 4), "head_channels": 32},
}
# fmt: on


def _specs() -> tuple[BackboneSpec, ...]:
    """The specs of the rows of the three tables above."""
    tables = (  # (kind, class of the network, its rows, summary with the row's arguments in braces)
        ("denoiser", "ADM", DENOISERS, "pixel-space U-Net for {input_size}x{input_size}"),
        ("upsampler", "ADMUpsampler", UPSAMPLERS, "ADM-U, {low_res_size}x{low_res_size} to {input_size}x{input_size}"),
        ("classifier", "ADMClassifier", CLASSIFIERS, "classifier of noised {input_size}x{input_size} images"),
    )
    specs = []
    for kind, network, rows, summary in tables:
        for name, row in rows.items():
            defaults = {**SHARED, **row}
            if kind == "classifier":
                del defaults["out_channels"]  # the outputs are num_classes logits
            specs.append(
                BackboneSpec(
                    name=name,
                    kind=kind,
                    family="adm",
                    summary=summary.format(**row),
                    defaults=defaults,
                    null_label=None,
                    builders={
                        "torch": f"backbones.adm.torch_model:{network}",
                        "jax": f"backbones.adm.flax_model:{network}",
                    },
                    closed_form=f"backbones.adm.compute:count_{kind}",
                )
            )
    return tuple(specs)


SPECS: tuple[BackboneSpec, ...] = _specs()
"""The networks of the ADM paper, and small networks of each kind."""
