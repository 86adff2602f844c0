"""Names, sizes and arguments of the Diffusion Transformers.

Source: Peebles and Xie, "Scalable Diffusion Models with Transformers" (arXiv:2212.09748), Table 1 for the sizes and
Sec. 3.2 for the patch sizes and the four ways of conditioning a block on timestep and class.
"""

from __future__ import annotations

from typing import NamedTuple

from backbones.dit.layout import BLOCKS
from harness.spec import BackboneSpec


class Size(NamedTuple):
    """One row of Table 1."""

    depth: int  # number of blocks
    width: int  # features per token
    heads: int  # attention heads
    patches: tuple[int, ...]  # patch sizes, in latent cells, of the named networks


# fmt: off
SIZES = {           #      depth  width  heads  patches
    "s":   Size(           12,    384,    6,   (8, 4, 2)),
    "b":   Size(           12,    768,   12,   (8, 4, 2)),
    "l":   Size(           24,   1024,   16,   (8, 4, 2)),
    "xl":  Size(           28,   1152,   16,   (8, 4, 2)),
    # not of the paper: for machines without an accelerator
    "xs":  Size(            6,    192,    3,   (8, 4, 2)),
    "2xs": Size(            4,     96,    2,   (8, 4, 2)),
    "3xs": Size(            3,     64,    2,   (8, 4, 2)),
}
# fmt: on


def _specs() -> tuple[BackboneSpec, ...]:
    """The specs of every block design, size and patch size."""
    specs = []
    for block in BLOCKS:
        for size, row in SIZES.items():
            for patch in row.patches:
                suffix = "" if block == "adaln-zero" else f"-{block}"
                specs.append(
                    BackboneSpec(
                        name=f"dit-{size}-{patch}{suffix}",
                        family="dit",
                        summary=f"DiT-{size.upper()}/{patch}, {block} blocks",
                        defaults={
                            "input_size": 32,  # side in latent cells: 256 pixels with a VAE of factor 8
                            "in_channels": 4,
                            "num_classes": 1000,
                            "out_channels": None,  # 2 * in_channels: noise and variance
                            "depth": row.depth,
                            "width": row.width,
                            "heads": row.heads,
                            "patch": patch,
                            "block": block,
                            "gradient_checkpointing": False,
                        },
                        null_label="num_classes",
                        builders={"torch": "backbones.dit.torch_model:DiT", "jax": "backbones.dit.flax_model:DiT"},
                        closed_form="backbones.dit.compute:count",
                        # The paper's Gflops include only the two layer norms around self-attention and MLP.
                        uncounted_norms=("final_layer.norm_final", "blocks.*.norm_cross"),
                    )
                )
    return tuple(specs)


SPECS: tuple[BackboneSpec, ...] = _specs()
"""All named DiTs: 12 sizes of the paper and 9 small ones, with four block designs each."""
