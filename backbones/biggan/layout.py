"""The blocks of a BigGAN-deep generator, from its arguments.

Source: Brock, Donahue and Simonyan, "Large Scale GAN Training for High Fidelity Natural Image Synthesis"
(arXiv:1809.11096), appendix B, for the architecture; huggingface/pytorch-pretrained-BigGAN 1e18aed,
convert_tf_to_pytorch.py, for the blocks of the released networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from harness.errors import UserError

START = 4  # side of the feature map that the first block gets
START_MULTIPLE = 16  # channels of that feature map, divided by the width
BOTTLENECK = 4  # channels of a block, divided by those between its two 1x1 convolutions
IMAGE_CHANNELS = 3  # the first three of the `width` channels of the read-out
MAX_INT = 1 << 20  # upper bound of integer arguments, so that a typing error is refused at once
STATISTICS = 51  # rows of standing statistics: truncation 0, 0.02, ... 1


class Block(NamedTuple):
    """A residual block of four convolutions: 1x1, 3x3, 3x3, 1x1."""

    up: bool  # doubles the side of the feature map, between the first and the second convolution
    inputs: int  # input channels, divided by the width
    outputs: int  # output channels, divided by the width


# fmt: off
BLOCKS = {  # image side in pixels -> (up, inputs, outputs) of every block, as in `Block`
    128: ((0, 16, 16), (1, 16, 16), (0, 16, 16), (1, 16, 8), (0, 8, 8), (1, 8, 4), (0, 4, 4), (1, 4, 2),
          (0, 2, 2), (1, 2, 1)),
    256: ((0, 16, 16), (1, 16, 16), (0, 16, 16), (1, 16, 8), (0, 8, 8), (1, 8, 8), (0, 8, 8), (1, 8, 4),
          (0, 4, 4), (1, 4, 2), (0, 2, 2), (1, 2, 1)),
    512: ((0, 16, 16), (1, 16, 16), (0, 16, 16), (1, 16, 8), (0, 8, 8), (1, 8, 8), (0, 8, 8), (1, 8, 4),
          (0, 4, 4), (1, 4, 2), (0, 2, 2), (1, 2, 1), (0, 1, 1), (1, 1, 1)),
}
# fmt: on
ATTENTION = 8  # self-attention is before this block, on a feature map of 64x64 in all three networks


def layout(
    *,
    input_size: int,
    num_classes: int,
    width: int,
    latent_size: int,
    blocks: Sequence[Sequence[int]] | None,
    attention: int | None,
) -> tuple[Block, ...]:
    """The blocks of the generator with these arguments. Raises UserError if there is no such generator.

    blocks: (up, inputs, outputs) of every block, as in `Block`; None: those of input_size in BLOCKS. attention: index of
    the block that follows self-attention; None: no self-attention.
    """
    numbers = {"input_size": input_size, "num_classes": num_classes, "width": width, "latent_size": latent_size}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"BigGAN-deep: {name} is {value!r}; it must be a whole number of at least 1")
        if value > MAX_INT:
            raise UserError(f"BigGAN-deep: {name} is {value}; more than {MAX_INT:,} cannot be built")
    if width % BOTTLENECK:
        raise UserError(f"BigGAN-deep: width {width} is not divisible by {BOTTLENECK}, as its bottleneck blocks need")
    if blocks is None:
        if input_size not in BLOCKS:
            sizes = ", ".join(map(str, BLOCKS))
            raise UserError(
                f"BigGAN-deep: there is no generator of {input_size} pixels a side, only of {sizes};"
                " choose one of these or give your own blocks"
            )
        blocks = BLOCKS[input_size]
    checked = _checked_blocks(blocks, input_size)
    if attention is not None:
        if isinstance(attention, bool) or not isinstance(attention, int) or not 0 <= attention < len(checked):
            raise UserError(
                f"BigGAN-deep: attention is {attention!r}; it must be the index of the block that follows it,"
                f" 0 to {len(checked) - 1}, or None"
            )
        if (channels := checked[attention].inputs * width) % 8:  # queries and keys have an eighth of the channels
            raise UserError(
                f"BigGAN-deep: self-attention on {channels} channels, which are not divisible by 8; choose another"
                " width or an earlier block"
            )
    return checked


def _checked_blocks(blocks: Sequence[Sequence[int]], input_size: int) -> tuple[Block, ...]:
    """The blocks as `Block`. Raises UserError if they do not fit together or do not end at input_size."""
    try:
        converted = tuple(Block(bool(up), int(inputs), int(outputs)) for up, inputs, outputs in blocks)
    except (TypeError, ValueError):
        raise UserError(
            f"BigGAN-deep: blocks {blocks!r} is not a sequence of (doubles the map, input channels, output channels)"
        ) from None
    channels, size = START_MULTIPLE, START
    for number, block in enumerate(converted):
        if block.inputs != channels:
            raise UserError(
                f"BigGAN-deep: block {number} takes {block.inputs} times the width, but its input has {channels} times"
            )
        if block.outputs < 1 or block.outputs not in (block.inputs, block.inputs / 2):
            raise UserError(
                f"BigGAN-deep: block {number} turns {block.inputs} times the width into {block.outputs}; its skip path"
                " can only keep the channels or drop one half"
            )
        channels, size = block.outputs, size * (2 if block.up else 1)
    if channels != 1 or size != input_size:
        raise UserError(
            f"BigGAN-deep: these blocks give {channels} times the width at {size} pixels a side; they must end with"
            f" 1 at input_size {input_size}"
        )
    return converted
