"""Names, sizes and arguments. Imports no framework."""

from harness.spec import BackboneSpec

# fmt: off
SIZES = {                  #  width  depth  kernel  patch
    "convmixer-64-4":        (64,    4,     3,      2),
}
# fmt: on

SPECS = tuple(
    BackboneSpec(
        name=name,
        family="convmixer",
        summary=f"ConvMixer, {depth} blocks of width {width}: convolutions alone",
        defaults={
            "input_size": 32,
            "in_channels": 4,
            "num_classes": 1000,
            "out_channels": None,  # 2 * in_channels: noise and variance
            "width": width,
            "depth": depth,
            "kernel": kernel,
            "patch": patch,
        },
        null_label="num_classes",
        builders={"torch": "convmixer_example.torch_model:ConvMixer"},
    )
    for name, (width, depth, kernel, patch) in SIZES.items()
)
