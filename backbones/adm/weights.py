"""Public weight files of ADM: a state dict with our parameter names (openai/guided-diffusion 22e0df8)."""

from __future__ import annotations

from typing import Any

from harness.spec import BackboneSpec
from harness.weights.maps import Layout, Shapes, WeightMap, take_all


def facts(spec: BackboneSpec, shapes: Shapes) -> dict[str, Any]:
    """Builder arguments that follow from the shapes of a network of the kind of `spec`.

    Without the tensor of an argument, that argument is left out; without a label table, num_classes of a U-Net is 0.
    """
    arguments: dict[str, Any] = {}
    if len(embedding := shapes.get("time_embed.0.weight", ())) == 2:
        arguments["width"] = embedding[1]
    if len(first := shapes.get("input_blocks.0.0.weight", ())) == 4:
        # An upsampler's input is concatenated with the low-resolution image, of as many channels.
        arguments["in_channels"] = first[1] // 2 if spec.kind == "upsampler" else first[1]
    if spec.kind == "classifier":
        if logits := shapes.get("out.2.c_proj.bias"):
            arguments["num_classes"] = logits[0]
        return arguments
    arguments["num_classes"] = shapes["label_emb.weight"][0] if "label_emb.weight" in shapes else 0
    if (last := shapes.get("out.2.bias")) and "in_channels" in arguments:
        outputs = last[0]
        default = 2 * arguments["in_channels"]
        arguments["out_channels"] = None if outputs == default else outputs
    return arguments


MAP = WeightMap(
    layouts=(
        Layout(
            name="guided-diffusion",
            title="guided-diffusion state dict",
            marks=("time_embed.0.weight", "input_blocks.0.0.weight", "middle_block.0.in_layers.0.weight"),
            inward=take_all,
            outward=take_all,
        ),
    ),
    facts=facts,
)
