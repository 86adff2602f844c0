"""Names, sizes and arguments. Imports no framework."""

from harness.spec import BackboneSpec

SIZES = {
    # name: (width, depth, patch)
    "gated-conv-xs-2": (192, 6, 2),
    "gated-conv-2xs-2": (96, 4, 2),
}

SPECS = tuple(
    BackboneSpec(
        name=name,
        family="gated-conv",
        summary=f"{depth} gated convolution blocks of width {width}, patches of {patch}x{patch}",
        defaults={
            "input_size": 32,  # side in pixels or latent cells
            "in_channels": 4,
            "num_classes": 1000,
            "out_channels": None,  # set by the objective; None: 2 * in_channels, noise and variance
            "width": width,
            "depth": depth,
            "patch": patch,
        },
        null_label="num_classes",  # the index after the last class means "no class"
        builders={"torch": "gated_conv.torch_model:GatedConv", "jax": "gated_conv.jax_model:GatedConv"},
    )
    for name, (width, depth, patch) in SIZES.items()
)
