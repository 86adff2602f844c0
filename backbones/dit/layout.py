"""The shape of a Diffusion Transformer: what its arguments must be, and the fixed numbers of its blocks.

Source: Peebles and Xie, "Scalable Diffusion Models with Transformers" (arXiv:2212.09748), Table 1 for the sizes and
Sec. 3.2 for the patch sizes and the four ways of conditioning a block on timestep and class.
"""

from __future__ import annotations

from harness.errors import UserError

BLOCKS = ("adaln-zero", "in-context", "cross-attention", "adaln")
"""The paper's four block designs (Sec. 3.2). adaln-zero, the paper's choice, has no name suffix."""

TIME_FEATURES = 256  # sinusoidal features of the timestep (appendix A, "DiT model details")
MAX_INT, MAX_BLOCKS = 1 << 20, 1000  # upper bounds of integer arguments, so that a typing error is refused at once
MLP_RATIO = 4  # hidden width of a block's MLP, divided by the width of the network, as in ViT


def check_arguments(
    *,
    input_size: int,
    in_channels: int,
    num_classes: int,
    out_channels: int | None,
    depth: int,
    width: int,
    heads: int,
    patch: int,
    block: str,
    gradient_checkpointing: bool = False,
) -> None:
    """Raise UserError for arguments from which no DiT can be built. Takes every argument of the builder."""
    numbers = {
        "input_size": input_size,
        "in_channels": in_channels,
        "num_classes": num_classes,
        "depth": depth,
        "width": width,
        "heads": heads,
        "patch": patch,
    }
    if out_channels is not None:
        numbers["out_channels"] = out_channels
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"DiT: {name} is {value!r}; it must be a whole number of at least 1")
        limit = MAX_BLOCKS if name == "depth" else MAX_INT
        if value > limit:
            raise UserError(f"DiT: {name} is {value}; more than {limit:,} cannot be built")
    if not isinstance(gradient_checkpointing, bool):
        raise UserError(f"DiT: gradient_checkpointing is {gradient_checkpointing!r}; it must be true or false")
    if block not in BLOCKS:
        raise UserError(f"DiT: block {block!r} is not one of {', '.join(BLOCKS)}")
    if width % heads:
        raise UserError(f"DiT: width {width} is not divisible by heads {heads}; choose heads that divide it")
    if width % 4:
        raise UserError(f"DiT: width {width} is not divisible by 4, which the 2-D sine-cosine positions need")
    if input_size % patch:
        fitting = [p for p in (8, 4, 2) if input_size % p == 0]
        if fitting:
            names = " or ".join(f"dit-*-{p}" for p in fitting)
            remedy = f"patch {' or '.join(map(str, fitting))} fits: use {names}"
        else:
            remedy = "no DiT patch size (8, 4, 2) fits: crop or pad the images to an even size"
        raise UserError(f"DiT: input_size {input_size} is not divisible by patch {patch}; {remedy}")
