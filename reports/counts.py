"""Counts of the harness for the networks of the paper's tables, to be compared with the printed figures."""

import functools
from typing import NamedTuple

from harness.registry import backbones
from results.paper import PublishedValue

LATENT_FACTOR = 8  # image side over latent side of Stable Diffusion's autoencoder, in whose latents DiTs are trained
GFLOPS_COLUMNS = ("Gflops (I=32, p=4)", "Flops (G)", "Base Flops (G)", "Upsampler Flops (G)", "Total Flops (G)")
PARAMS_COLUMN = "Params (M)"


class Counted(NamedTuple):
    """A count and its deviation from the printed figure in %: 0 where the count rounds to the figure."""

    value: float
    text: str  # with the decimals of the printed figure
    deviation: float


def counted(cell: PublishedValue) -> Counted | None:
    """The closed-form count for a printed figure of Gflops or parameters; None for other cells and blanks."""
    if not cell.value or cell.column not in (*GFLOPS_COLUMNS, PARAMS_COLUMN):
        return None
    counts = [_count(name, cell.resolution) for name in cell.backbone.split("+")]
    index = 0 if cell.column in GFLOPS_COLUMNS else 1
    value = sum(each[index] for each in counts)
    decimals = len(cell.value.partition(".")[2])
    printed = float(cell.value)
    return Counted(value, f"{value:.{decimals}f}", 100 * (round(value, decimals) - printed) / printed)


@functools.cache
def _count(backbone: str, resolution: int | None) -> tuple[float, float]:
    """(Gflops, millions of parameters) of one forward pass; resolution None: at the network's default size."""
    spec = backbones.get(backbone)
    sizes = {}
    if backbone.startswith("dit-") and resolution is not None:
        sizes["input_size"] = resolution // LATENT_FACTOR
    compute = spec.count(**sizes)
    return compute.gflops, compute.params / 1e6
