"""The blocks of the U-Nets of ADM and LDM, with their order and names; no framework.

Source: openai/guided-diffusion 22e0df8, guided_diffusion/unet.py (UNetModel, EncoderUNetModel), the origin of the U-Net of
CompVis/latent-diffusion. The names are those of the public checkpoints.

The torch network, the Flax network and the closed-form compute are built from the same layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from harness.errors import UserError

GROUPS = 32  # of every group normalisation
MAX_INT = 1 << 20  # upper bound of integer arguments, so that a typing error is refused at once
MAX_BLOCKS = 1000
MAX_MULTIPLE = 1000


class InputConv(NamedTuple):
    """First layer: a 3x3 convolution of the network's input."""

    path: str
    inputs: int
    outputs: int
    side: int


class ResBlock(NamedTuple):
    """Residual block conditioned on the timestep. resample: "down" or "up" by a factor of 2; "": it keeps the side."""

    path: str
    inputs: int
    outputs: int
    side: int  # of its input
    resample: str = ""

    @property
    def side_out(self) -> int:
        """Side of its output."""
        return {"": self.side, "down": self.side // 2, "up": self.side * 2}[self.resample]


class Attention(NamedTuple):
    """Self-attention over all positions, or, in an LDM, a spatial transformer with cross-attention."""

    path: str
    channels: int
    side: int
    heads: int


class Downsample(NamedTuple):
    """3x3 convolution of stride 2, without a residual branch."""

    path: str
    channels: int
    side: int  # of its input


class Upsample(NamedTuple):
    """Nearest-neighbour interpolation by 2 and a 3x3 convolution, without a residual branch."""

    path: str
    channels: int
    side: int  # of its input


Part = InputConv | ResBlock | Attention | Downsample | Upsample


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The blocks of a U-Net, which are sequences of parts."""

    input_blocks: tuple[tuple[Part, ...], ...]
    middle_block: tuple[ResBlock, Attention, ResBlock]
    output_blocks: tuple[tuple[Part, ...], ...]  # empty for an encoder
    embedding: int  # width of the timestep embedding
    width: int  # channels at multiplier 1, and number of sinusoids of the timestep
    channels: int  # of the last feature map, the input of the network's head
    side: int  # of the last feature map

    @property
    def parts(self) -> tuple[Part, ...]:
        """Every part, in the order of execution."""
        blocks = (*self.input_blocks, self.middle_block, *self.output_blocks)
        return tuple(part for block in blocks for part in block)


def unet_layout(
    *,
    input_size: int,
    in_channels: int,  # of the first convolution
    width: int,  # channels at multiplier 1
    multipliers: tuple[float, ...],  # channels of each level, divided by width; each level halves the side
    res_blocks: int,  # per level
    attention_sides: frozenset[int],  # sides of the feature maps with attention
    heads_of: Callable[[int], int],  # channels -> attention heads
    residual_resampling: bool,  # resample by residual blocks (ADM) or by plain convolutions (LDM)
    encoder_only: bool = False,
) -> Layout:
    """The layout of a U-Net. The arguments must have passed `check_arguments`; the side is halved without a check."""
    channels, side = int(width * multipliers[0]), input_size  # of the current feature map, from here to the end
    inputs: list[tuple[Part, ...]] = [(InputConv("input_blocks.0.0", in_channels, channels, side),)]
    skips = [channels]  # channels of the input blocks' outputs; an output block concatenates the last one that is left

    def attention(path: str) -> tuple[Part, ...]:
        """An attention part if the current side has attention, else nothing."""
        return (Attention(path, channels, side, heads_of(channels)),) if side in attention_sides else ()

    for level, multiplier in enumerate(multipliers):
        for _ in range(res_blocks):
            path = f"input_blocks.{len(inputs)}"
            block = ResBlock(f"{path}.0", channels, int(width * multiplier), side)
            channels = block.outputs
            inputs.append((block, *attention(f"{path}.1")))
            skips.append(channels)
        if level < len(multipliers) - 1:
            path = f"input_blocks.{len(inputs)}.0"
            if residual_resampling:
                inputs.append((ResBlock(path, channels, channels, side, "down"),))
            else:
                inputs.append((Downsample(path, channels, side),))
            skips.append(channels)
            side //= 2

    middle = (
        ResBlock("middle_block.0", channels, channels, side),
        Attention("middle_block.1", channels, side, heads_of(channels)),
        ResBlock("middle_block.2", channels, channels, side),
    )
    outputs: list[tuple[Part, ...]] = []
    decoder_levels = [] if encoder_only else reversed(list(enumerate(multipliers)))
    for level, multiplier in decoder_levels:
        # One more than in the encoder, for the skip of the layer before the level: downsampling or input convolution
        for index in range(res_blocks + 1):
            path = f"output_blocks.{len(outputs)}"
            parts: tuple[Part, ...] = (ResBlock(f"{path}.0", channels + skips.pop(), int(width * multiplier), side),)
            channels = int(width * multiplier)
            parts += attention(f"{path}.1")
            if level and index == res_blocks:  # the last block of a level upsamples, except at the outermost level, 0
                last = f"{path}.{len(parts)}"
                if residual_resampling:
                    parts += (ResBlock(last, channels, channels, side, "up"),)
                else:
                    parts += (Upsample(last, channels, side),)
                side *= 2
            outputs.append(parts)
    return Layout(
        input_blocks=tuple(inputs), middle_block=middle, output_blocks=tuple(outputs), embedding=4 * width, width=width,
        channels=channels, side=side,
    )  # fmt: skip


def check_arguments(family: str, arguments: Mapping[str, Any]) -> None:
    """Raise UserError for arguments from which no U-Net can be built.

    Arguments that the family does not have may be missing. Not checked: heads and head_channels (see `heads_rule`), and
    what the layouts of the two families check, such as low_res_size and context_width.
    """
    for name in ("input_size", "in_channels", "width"):
        check_whole(family, name, arguments[name], 1)
    check_whole(family, "res_blocks", arguments["res_blocks"], 1, MAX_BLOCKS)
    check_whole(family, "num_classes", arguments["num_classes"], 0)
    if arguments.get("out_channels") is not None:
        check_whole(family, "out_channels", arguments["out_channels"], 1)
    multipliers = arguments["multipliers"]
    if (
        not isinstance(multipliers, (tuple, list))
        or not multipliers
        or not all(_positive(multiplier) and multiplier <= MAX_MULTIPLE for multiplier in multipliers)
    ):
        raise UserError(
            f"{family}: multipliers are {multipliers!r}; give one positive number per level, as in (1, 2, 4)"
        )
    for name in ("attention_resolutions", "attention_rates"):  # of ADM, of LDM
        numbers = arguments.get(name, ())
        if not isinstance(numbers, (tuple, list)) or not all(type(value) is int and value > 0 for value in numbers):
            raise UserError(f"{family}: {name} is {numbers!r}; give whole numbers of at least 1, as in (32, 16, 8)")
    for name in ("qkv_first", "null_class", "gradient_checkpointing"):
        if not isinstance(arguments.get(name, False), bool):
            raise UserError(f"{family}: {name} is {arguments[name]!r}; it must be true or false")
    dropout = arguments["dropout"]
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise UserError(f"{family}: dropout is {arguments['dropout']}; it must lie in [0, 1)")
    if arguments["width"] % 2:
        raise UserError(
            f"{family}: width {arguments['width']} is odd; the sines and cosines of the timestep need an even width"
        )
    for multiplier in multipliers:
        if arguments["width"] * multiplier % GROUPS:
            raise UserError(
                f"{family}: width {arguments['width']} x {multiplier:g} is not a multiple of {GROUPS}, the number of "
                "groups of its normalisations; choose another width"
            )
    halvings, size = len(multipliers) - 1, arguments["input_size"]
    # A group norm of GROUPS channels has groups of one channel; at one position, such a group is a single number. The
    # first block of the last level normalises the channels of the level before.
    if size == 2**halvings and GROUPS in [arguments["width"] * multiplier for multiplier in multipliers[-2:]]:
        raise UserError(
            f"{family}: its last level has one position and {GROUPS} channels, so every group would normalise a single "
            "number; use a larger input_size or width"
        )
    if size % 2**halvings:
        fitting = max(level for level in range(halvings + 1) if size % 2**level == 0)
        raise UserError(
            f"{family}: input_size {size} cannot be halved {halvings} times, as its {len(multipliers)} levels require; "
            f"pad the images to a multiple of {2**halvings}, or use a backbone of at most {fitting + 1} levels"
        )


def heads_rule(family: str, heads: int, head_channels: int) -> Callable[[int], int]:
    """A function from channels to attention heads: `heads` for all channels, or channels / head_channels.

    Exactly one of the two must be 0, else UserError. The function raises UserError for channels that cannot be split.
    """
    for name, value in (("heads", heads), ("head_channels", head_channels)):
        check_whole(family, name, value, 0)
    if bool(heads) == bool(head_channels):
        raise UserError(
            f"{family}: give heads or head_channels and leave the other 0 (now {heads} and {head_channels})"
        )

    def heads_of(channels: int) -> int:
        count = heads or channels // head_channels
        if not count or channels % count or (head_channels and count * head_channels != channels):
            rule = f"heads {heads}" if heads else f"head_channels {head_channels}"
            raise UserError(f"{family}: {channels} channels cannot be split by {rule}; choose a divisor")
        return count

    return heads_of


def _positive(value: Any) -> bool:
    """Whether a value is a finite number above 0."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def check_whole(family: str, name: str, value: Any, least: int, most: int = MAX_INT) -> None:
    """Raise UserError unless `value` is an integer from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{family}: {name} is {value!r}; it must be a whole number of at least {least}")
    if value > most:
        raise UserError(f"{family}: {name} is {value}; more than {most:,} cannot be built")
