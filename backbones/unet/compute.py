"""Closed-form compute and parameters of the parts of a U-Net; the convention is `harness.compute.CONVENTION`."""

from __future__ import annotations

from backbones.unet.layout import Attention, Downsample, InputConv, Layout, ResBlock, Upsample
from harness.spec import Compute, ComputeRow


class Tally:
    """Rows and number of parameters, added layer by layer. A part is named by `prefix` followed by its module path."""

    def __init__(self, prefix: str = ""):
        self.prefix = prefix
        self.params = 0
        self.rows: list[ComputeRow] = []

    def compute(self) -> Compute:
        """The result for all layers that were added."""
        return Compute(params=self.params, rows=tuple(self.rows))

    def add(self, part: str, kind: str, flops: int) -> None:
        """Add a row without parameters."""
        self.rows.append(ComputeRow(self.prefix + part, kind, flops))

    def linear(self, part: str, inputs: int, outputs: int, vectors: int = 1, bias: bool = True) -> None:
        """Add a linear layer applied to a number of vectors."""
        self.params += (inputs + bias) * outputs
        self.add(part, "linear", inputs * outputs * vectors)

    def conv(self, part: str, inputs: int, outputs: int, *, kernel_area: int, positions: int) -> None:
        """Add a convolution with bias. kernel_area: weights per pair of channels, 9 for 3x3. positions: of the output."""
        self.params += (inputs * kernel_area + 1) * outputs
        self.add(part, "conv", inputs * outputs * kernel_area * positions)

    def norm(self, part: str, channels: int, positions: int) -> None:
        """Add a normalisation with scale and shift."""
        self.params += 2 * channels
        self.add(part, "norm", channels * positions)

    def attention(self, part: str, queries: int, keys: int, channels: int) -> None:
        """Add scaled dot-product attention: the scores, and the weighted sum of values."""
        self.add(part, "attention", 2 * queries * keys * channels)


def count_timestep(tally: Tally, layout: Layout) -> None:
    """Add the two layers of the timestep embedding."""
    tally.linear("time_embed.0", layout.width, layout.embedding)
    tally.linear("time_embed.2", layout.embedding, layout.embedding)


def count_parts(tally: Tally, layout: Layout, *, scale_shift: bool, context: tuple[int, int, int] | None) -> None:
    """Add all parts of all blocks.

    scale_shift: residual blocks scale and shift by the embedding (ADM) instead of adding it (LDM). context: (tokens of
    the context, their width, transformer depth) of LDM's spatial transformers; None: ADM's self-attention.
    """
    for part in layout.parts:
        if isinstance(part, InputConv):
            tally.conv(part.path, part.inputs, part.outputs, kernel_area=9, positions=part.side**2)
        elif isinstance(part, ResBlock):
            _count_res_block(tally, part, layout.embedding, scale_shift)
        elif isinstance(part, Downsample):
            positions = (part.side // 2) ** 2
            tally.conv(f"{part.path}.op", part.channels, part.channels, kernel_area=9, positions=positions)
        elif isinstance(part, Upsample):
            positions = (part.side * 2) ** 2
            tally.conv(f"{part.path}.conv", part.channels, part.channels, kernel_area=9, positions=positions)
        elif context is None:
            _count_attention(tally, part)
        else:
            _count_transformer(tally, part, *context)


def _count_res_block(tally: Tally, part: ResBlock, embedding: int, scale_shift: bool) -> None:
    """Add a residual block; `embedding` is the width of the timestep embedding."""
    before, after = part.side**2, part.side_out**2  # positions before and after the resampling, which precedes conv 1
    tally.norm(f"{part.path}.in_layers.0", part.inputs, before)
    tally.conv(f"{part.path}.in_layers.2", part.inputs, part.outputs, kernel_area=9, positions=after)
    tally.linear(f"{part.path}.emb_layers.1", embedding, (2 if scale_shift else 1) * part.outputs)
    tally.norm(f"{part.path}.out_layers.0", part.outputs, after)
    tally.conv(f"{part.path}.out_layers.3", part.outputs, part.outputs, kernel_area=9, positions=after)
    if part.inputs != part.outputs:
        tally.conv(f"{part.path}.skip_connection", part.inputs, part.outputs, kernel_area=1, positions=after)


def _count_attention(tally: Tally, part: Attention) -> None:
    """Add ADM's self-attention; its heads do not change the compute."""
    channels, tokens = part.channels, part.side**2
    tally.norm(f"{part.path}.norm", channels, tokens)
    tally.conv(f"{part.path}.qkv", channels, 3 * channels, kernel_area=1, positions=tokens)
    tally.attention(part.path, tokens, tokens, channels)
    tally.conv(f"{part.path}.proj_out", channels, channels, kernel_area=1, positions=tokens)


def _count_transformer(tally: Tally, part: Attention, context_tokens: int, context_width: int, depth: int) -> None:
    """Add a spatial transformer of `depth` blocks."""
    channels, tokens = part.channels, part.side**2
    tally.norm(f"{part.path}.norm", channels, tokens)
    tally.conv(f"{part.path}.proj_in", channels, channels, kernel_area=1, positions=tokens)
    for index in range(depth):
        path = f"{part.path}.transformer_blocks.{index}"
        # attn1 is self-attention, attn2 is attention to the context
        for number, (keys, key_width) in enumerate(((tokens, channels), (context_tokens, context_width)), start=1):
            tally.norm(f"{path}.norm{number}", channels, tokens)
            tally.linear(f"{path}.attn{number}.to_q", channels, channels, tokens, bias=False)
            tally.linear(f"{path}.attn{number}.to_k", key_width, channels, keys, bias=False)
            tally.linear(f"{path}.attn{number}.to_v", key_width, channels, keys, bias=False)
            tally.attention(f"{path}.attn{number}", tokens, keys, channels)
            tally.linear(f"{path}.attn{number}.to_out.0", channels, channels, tokens)
        tally.norm(f"{path}.norm3", channels, tokens)
        tally.linear(f"{path}.ff.net.0.proj", channels, 8 * channels, tokens)  # 4 * channels values, and their gates
        tally.linear(f"{path}.ff.net.2", 4 * channels, channels, tokens)
    tally.conv(f"{part.path}.proj_out", channels, channels, kernel_area=1, positions=tokens)
