"""Closed-form compute and parameters of a BigGAN-deep generator; the convention is `harness.compute.CONVENTION`.

The paper prints no compute. The count is of the released networks: the read-out computes `width` channels, of which
three are used, and every batch normalisation costs 1 flop per element, as the normalisations of a U-Net. Dividing the
weights by their spectral norms is free, because it is done once for all images. Parts are named by module path.
"""

from __future__ import annotations

from collections.abc import Sequence

from backbones.biggan.layout import BOTTLENECK, START, START_MULTIPLE, layout
from harness.spec import Compute, ComputeRow


def count(
    *,
    input_size: int,
    num_classes: int,
    width: int,
    latent_size: int,
    blocks: Sequence[Sequence[int]] | None,
    attention: int | None,
) -> Compute:
    """Compute of generating one image, by part. Raises UserError for arguments from which no network can be built.

    blocks and attention: see `layout`.
    """
    block_layout = layout(
        input_size=input_size,
        num_classes=num_classes,
        width=width,
        latent_size=latent_size,
        blocks=blocks,
        attention=attention,
    )
    condition = 2 * latent_size  # z and the vector of the class
    rows: list[ComputeRow] = []
    params = num_classes * latent_size  # class vectors: a look-up is free

    def linear(part: str, inputs: int, outputs: int, *, bias: bool) -> None:
        """Add a linear layer of one vector."""
        nonlocal params
        params += (inputs + bias) * outputs
        rows.append(ComputeRow(part, "linear", inputs * outputs))

    def conv(part: str, inputs: int, outputs: int, kernel: int, cells: int, *, bias: bool = True) -> None:
        """Add a convolution with kernel x kernel weights per pair of channels and `cells` output cells."""
        nonlocal params
        params += (inputs * kernel**2 + bias) * outputs
        rows.append(ComputeRow(part, "conv", inputs * kernel**2 * outputs * cells))

    def conditional_norm(part: str, channels: int, cells: int) -> None:
        """Add a batch normalisation whose gain and offset are linear layers of the condition."""
        linear(f"{part}.scale", condition, channels, bias=False)
        linear(f"{part}.offset", condition, channels, bias=False)
        rows.append(ComputeRow(part, "norm", channels * cells))

    cells = START**2  # of the current feature map, from here to the end
    linear("generator.gen_z", condition, START_MULTIPLE * width * cells, bias=True)
    layer_index = 0  # in generator.layers, where self-attention is a separate layer
    for number, block in enumerate(block_layout):
        inputs, outputs = block.inputs * width, block.outputs * width
        inner = inputs // BOTTLENECK
        if number == attention:  # self-attention comes before this block
            path = f"generator.layers.{layer_index}"
            conv(f"{path}.snconv1x1_theta", inputs, inputs // 8, 1, cells, bias=False)
            conv(f"{path}.snconv1x1_phi", inputs, inputs // 8, 1, cells, bias=False)
            conv(f"{path}.snconv1x1_g", inputs, inputs // 2, 1, cells, bias=False)
            # Scores of inputs // 8 features and the weighted sum of inputs // 2; keys and values are max-pooled 2x2.
            rows.append(ComputeRow(path, "attention", cells * (cells // 4) * (inputs // 8 + inputs // 2)))
            conv(f"{path}.snconv1x1_o_conv", inputs // 2, inputs, 1, cells, bias=False)
            params += 1  # gamma
            layer_index += 1
        path = f"generator.layers.{layer_index}"
        conditional_norm(f"{path}.bn_0", inputs, cells)
        conv(f"{path}.conv_0", inputs, inner, 1, cells)
        conditional_norm(f"{path}.bn_1", inner, cells)
        cells *= 4 if block.up else 1
        conv(f"{path}.conv_1", inner, inner, 3, cells)
        conditional_norm(f"{path}.bn_2", inner, cells)
        conv(f"{path}.conv_2", inner, inner, 3, cells)
        conditional_norm(f"{path}.bn_3", inner, cells)
        conv(f"{path}.conv_3", inner, outputs, 1, cells)
        layer_index += 1
    rows.append(ComputeRow("generator.bn", "norm", width * cells))
    params += 2 * width
    conv("generator.conv_to_rgb", width, width, 3, cells)
    return Compute(params=params, rows=tuple(rows))
