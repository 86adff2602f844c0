"""Names, sizes and arguments. Imports no framework."""

from typing import NamedTuple

from harness.spec import BackboneSpec


class Size(NamedTuple):
    """One network: depth is odd, for half of the blocks come before the middle one and half after it."""

    depth: int
    width: int
    heads: int
    patches: tuple[int, ...]


SIZES = {
    "s": Size(13, 512, 8, (2,)),  # the paper's Table 1
    "xs": Size(5, 192, 3, (4, 2)),
    "2xs": Size(3, 96, 2, (4, 2)),
}

SPECS = tuple(
    BackboneSpec(
        name=f"u-vit-{size}-{patch}",
        family="u-vit",
        summary=f"U-ViT-{size.upper()}/{patch}: {row.depth} blocks of width {row.width} with long skips",
        defaults={
            "input_size": 32,  # side in pixels or latent cells
            "in_channels": 4,
            "num_classes": 1000,
            "out_channels": None,  # set by the objective; None: 2 * in_channels, noise and variance
            "depth": row.depth,
            "width": row.width,
            "heads": row.heads,
            "patch": patch,
        },
        null_label="num_classes",  # the index after the last class means "no class"
        builders={"torch": "u_vit.torch_model:UViT"},
    )
    for size, row in SIZES.items()
    for patch in row.patches
)
