"""Public weight files of BigGAN-deep: pytorch_model.bin, a state dict with our parameter names.

Source: huggingface/pytorch-pretrained-BigGAN 1e18aed, model.py.
"""

from __future__ import annotations

from typing import Any

from harness.spec import BackboneSpec
from harness.weights.maps import Layout, Shapes, WeightMap, take_all


def facts(spec: BackboneSpec, shapes: Shapes) -> dict[str, Any]:
    """Builder arguments that follow from the shapes; without the tensor of an argument, that argument is left out."""
    arguments: dict[str, Any] = {}
    if len(labels := shapes.get("embeddings.weight", ())) == 2:
        arguments |= {"latent_size": labels[0], "num_classes": labels[1]}
    if len(read_out := shapes.get("generator.conv_to_rgb.weight_orig", ())) == 4:
        arguments["width"] = read_out[0]  # the read-out has `width` output channels, of which three are used
    return arguments


MAP = WeightMap(
    layouts=(
        Layout(
            name="huggingface",
            title="Hugging Face BigGAN state dict",
            marks=("embeddings.weight", "generator.gen_z.weight_orig", "generator.conv_to_rgb.weight_orig"),
            suffix=".bin",
            inward=take_all,
            outward=take_all,
        ),
    ),
    facts=facts,
)
