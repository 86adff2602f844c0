"""Names, sizes and arguments. Imports no framework."""

from typing import NamedTuple

from harness.spec import BackboneSpec


class Size(NamedTuple):
    """One network."""

    depth: int
    width: int
    heads: int
    bottleneck: int  # features of a patch between its two linear maps
    patches: tuple[int, ...]  # sides, in pixels


SIZES = {
    "b": Size(12, 768, 12, 128, (16, 32)),  # the paper's JiT-B
    "xs": Size(6, 192, 3, 32, (4,)),
    "2xs": Size(4, 96, 2, 16, (4,)),
}

SPECS = tuple(
    BackboneSpec(
        name=f"jit-{size}-{patch}",
        family="jit-like",
        summary=f"{row.depth} blocks of width {row.width} on patches of {patch}x{patch} pixels, for the clean image",
        defaults={
            "input_size": 256,  # side in pixels
            "in_channels": 3,
            "num_classes": 1000,
            "out_channels": None,  # set by the objective; None: 2 * in_channels, noise and variance
            "depth": row.depth,
            "width": row.width,
            "heads": row.heads,
            "bottleneck": row.bottleneck,
            "patch": patch,
        },
        null_label="num_classes",  # the index after the last class means "no class"
        builders={"torch": "jit_like.torch_model:PixelTransformer"},
    )
    for size, row in SIZES.items()
    for patch in row.patches
)
