"""This harness's counts of Gflops and parameters of the networks in the paper's tables, to compare with the printed ones."""

import functools
from typing import NamedTuple

from harness.registry import backbones
from results.paper import PublishedValue

LATENT_FACTOR = 8  # image side over latent side of Stable Diffusion's autoencoder, in whose latents DiTs are trained
GFLOPS_COLUMNS = ("Gflops (I=32, p=4)", "Flops (G)", "Base Flops (G)", "Upsampler Flops (G)", "Total Flops (G)")
PARAMS_COLUMN = "Params (M)"


class Counted(NamedTuple):
    """A count, and how far it deviates from the printed figure."""

    value: float  # Gflops, or millions of parameters
    text: str  # with the decimals of the printed figure
    deviation: float  # in % of the printed figure; 0 if the count rounds to it


def counted(cell: PublishedValue) -> Counted | None:
    """The closed-form count for a printed cell of Gflops or parameters, summed over the networks of a cascade.

    None for cells of other columns, and for blank ones. The names of the networks of a cascade are joined with "+".
    """
    if not cell.value or cell.column not in (*GFLOPS_COLUMNS, PARAMS_COLUMN):
        return None
    counts = [_count(name, cell.resolution) for name in cell.backbone.split("+")]
    value = sum(gflops if cell.column in GFLOPS_COLUMNS else millions for gflops, millions in counts)
    decimals = len(cell.value.partition(".")[2])
    printed = float(cell.value)
    return Counted(value, f"{value:.{decimals}f}", 100 * (round(value, decimals) - printed) / printed)


@functools.cache
def _count(backbone: str, resolution: int | None) -> tuple[float, float]:
    """(Gflops of one forward pass, millions of parameters) of one network.

    resolution: side of the images that a DiT is counted at; None: that of its default input. Networks other than DiTs are
    always counted at their default input, because their names fix the resolution.
    """
    spec = backbones.get(backbone)
    sizes = {}
    if backbone.startswith("dit-") and resolution is not None:
        sizes["input_size"] = resolution // LATENT_FACTOR
    compute = spec.count(**sizes)
    return compute.gflops, compute.params / 1e6
