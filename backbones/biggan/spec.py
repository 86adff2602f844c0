"""Names, blocks and arguments of the BigGAN-deep generators.

Source: Brock, Donahue and Simonyan, "Large Scale GAN Training for High Fidelity Natural Image Synthesis"
(arXiv:1809.11096), appendix B, for the architecture; huggingface/pytorch-pretrained-BigGAN 1e18aed,
convert_tf_to_pytorch.py, for the blocks of the released networks.
"""

from __future__ import annotations

from backbones.biggan.layout import ATTENTION, BLOCKS
from harness.spec import BackboneSpec

SPECS: tuple[BackboneSpec, ...] = tuple(
    BackboneSpec(
        name=f"biggan-deep-{pixels}",
        kind="generator",
        family="biggan",
        summary=f"BigGAN-deep generator of {pixels}x{pixels} pixels",
        defaults={
            "input_size": pixels,  # side of the generated image in pixels
            "num_classes": 1000,
            "width": 128,  # ch of the paper's tables
            "latent_size": 128,  # of z, and of a class vector
            "blocks": None,  # None: those of input_size in BLOCKS; else (up, inputs, outputs) of every block
            "attention": ATTENTION,  # index of the block that follows self-attention; None: no self-attention
        },
        builders={"torch": "backbones.biggan.torch_model:BigGAN"},
        closed_form="backbones.biggan.compute:count",
    )
    for pixels in BLOCKS
)
"""The three generators whose weights were released."""
