"""Closed-form compute and parameters of an autoencoder; the convention is `harness.compute.CONVENTION`.

Parts are named by the module paths of the public network (CompVis/latent-diffusion a506df5,
ldm/modules/diffusionmodules/model.py). The search for the nearest code is counted as a matrix product; it is under 0.1 %
of a decode.
"""

from __future__ import annotations

from backbones.autoencoders.layout import check_arguments, factor
from harness.errors import UserError
from harness.spec import Compute, ComputeRow

DIRECTIONS = ("decode", "encode")


def count(
    *,
    direction: str,
    image_size: int,
    resolution: int,
    image_channels: int,
    width: int,
    multipliers: tuple[int, ...],
    blocks: int,
    attention_resolutions: tuple[int, ...],
    latent_channels: int,
    code_channels: int,
    codes: int | None,
) -> Compute:
    """Compute by part of one square image: "decode" with the search for the nearest code, or "encode" up to the latent.

    image_size: side in pixels; the latent has side image_size / factor. `params` of the result counts encoder, decoder
    and codebook for both directions. The other arguments are those of `AutoencoderSpec`. Raises UserError for arguments
    from which no network can be built, for an image_size that is not a multiple of the factor, and for other
    directions.
    """
    check_arguments(
        resolution=resolution,
        image_channels=image_channels,
        width=width,
        multipliers=multipliers,
        blocks=blocks,
        attention_resolutions=attention_resolutions,
        latent_channels=latent_channels,
        code_channels=code_channels,
        codes=codes,
    )
    if direction not in DIRECTIONS:
        raise UserError(f"autoencoder: direction {direction!r} is not one of {', '.join(DIRECTIONS)}")
    if image_size < 1 or image_size % factor(multipliers):
        raise UserError(f"autoencoder: image size {image_size} is not a multiple of its factor {factor(multipliers)}")
    widths = [width * multiplier for multiplier in multipliers]
    attended = [(resolution >> level) in attention_resolutions for level in range(len(multipliers))]
    moments = 1 if codes is not None else 2  # a Gaussian posterior has a mean and a log-variance
    last = len(widths) - 1
    inner = image_size >> last  # side of the latent

    encode = _Tally()
    encode.conv("encoder.conv_in", image_channels, width, 3, image_size)
    channels = width
    for level, out in enumerate(widths):
        for index in range(blocks):
            encode.residual(f"encoder.down.{level}.block.{index}", channels, out, image_size >> level)
            channels = out
            if attended[level]:
                encode.attention(f"encoder.down.{level}.attn.{index}", channels, image_size >> level)
        if level != last:
            encode.conv(f"encoder.down.{level}.downsample.conv", channels, channels, 3, image_size >> (level + 1))
    encode.middle("encoder.mid", channels, inner)
    encode.norm("encoder.norm_out", channels, inner)
    encode.conv("encoder.conv_out", channels, moments * latent_channels, 3, inner)
    encode.conv("quant_conv", moments * latent_channels, moments * code_channels, 1, inner)

    decode = _Tally()
    if codes is not None:
        decode.params += codes * code_channels
        decode.rows.append(ComputeRow("quantize", "linear", inner**2 * codes * code_channels))
    decode.conv("post_quant_conv", code_channels, latent_channels, 1, inner)
    channels = widths[last]
    decode.conv("decoder.conv_in", latent_channels, channels, 3, inner)
    decode.middle("decoder.mid", channels, inner)
    for level in reversed(range(len(widths))):
        side = image_size >> level
        for index in range(blocks + 1):  # one more than in the encoder
            decode.residual(f"decoder.up.{level}.block.{index}", channels, widths[level], side)
            channels = widths[level]
            if attended[level]:
                decode.attention(f"decoder.up.{level}.attn.{index}", channels, side)
        if level:
            decode.conv(f"decoder.up.{level}.upsample.conv", channels, channels, 3, 2 * side)
    decode.norm("decoder.norm_out", channels, image_size)
    decode.conv("decoder.conv_out", channels, image_channels, 3, image_size)

    rows = decode.rows if direction == "decode" else encode.rows
    return Compute(params=encode.params + decode.params, rows=tuple(rows))


class _Tally:
    """Rows and number of parameters of the added layers, in the network's order. side: that of a layer's output."""

    def __init__(self) -> None:
        self.rows: list[ComputeRow] = []
        self.params = 0

    def conv(self, part: str, inputs: int, outputs: int, kernel: int, side: int) -> None:
        """A convolution with bias, kernel x kernel weights per pair of channels, and an output of side x side cells."""
        self.params += (inputs * kernel**2 + 1) * outputs
        self.rows.append(ComputeRow(part, "conv", inputs * outputs * kernel**2 * side**2))

    def norm(self, part: str, channels: int, side: int) -> None:
        """A group norm with scale and shift."""
        self.params += 2 * channels
        self.rows.append(ComputeRow(part, "norm", channels * side**2))

    def residual(self, part: str, inputs: int, outputs: int, side: int) -> None:
        """A residual block of two 3x3 convolutions, with a 1x1 convolution as its skip if the channels change."""
        self.norm(f"{part}.norm1", inputs, side)
        self.conv(f"{part}.conv1", inputs, outputs, 3, side)
        self.norm(f"{part}.norm2", outputs, side)
        self.conv(f"{part}.conv2", outputs, outputs, 3, side)
        if inputs != outputs:
            self.conv(f"{part}.nin_shortcut", inputs, outputs, 1, side)

    def attention(self, part: str, channels: int, side: int) -> None:
        """An attention block: group norm, 1x1 convolutions for q, k, v and the output, and self-attention of all cells."""
        self.norm(f"{part}.norm", channels, side)
        for name in ("q", "k", "v"):
            self.conv(f"{part}.{name}", channels, channels, 1, side)
        # Scores and weighted sum of values, for side**2 queries and side**2 keys.
        self.rows.append(ComputeRow(part, "attention", 2 * side**4 * channels))
        self.conv(f"{part}.proj_out", channels, channels, 1, side)

    def middle(self, part: str, channels: int, side: int) -> None:
        """Residual block, attention block, residual block."""
        self.residual(f"{part}.block_1", channels, channels, side)
        self.attention(f"{part}.attn_1", channels, side)
        self.residual(f"{part}.block_2", channels, channels, side)
