"""What the harness counts for the networks of the paper's tables, to stand beside what the paper prints."""

import functools
from typing import NamedTuple

from harness.registry import backbones
from results.paper import PublishedValue

LATENT_FACTOR = 8  # pixels a side of a cell of Stable Diffusion's auto-encoder, which the DiTs are trained on
GFLOPS_COLUMNS = ("Gflops (I=32, p=4)", "Flops (G)", "Base Flops (G)", "Upsampler Flops (G)", "Total Flops (G)")
PARAMS_COLUMN = "Params (M)"


class Counted(NamedTuple):
    """A count and how far it is from the printed figure, in %: 0 where it rounds to it."""

    value: float
    text: str  # with the decimals of the printed figure
    deviation: float


def counted(cell: PublishedValue) -> Counted | None:
    """The closed-form count behind a printed figure of Gflops or parameters; None for other cells and blanks."""
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
    """(Gflops, millions of parameters) of one forward pass; resolution None: at the network's own default."""
    spec = backbones.get(backbone)
    is_dit = backbone.startswith("dit-") and resolution is not None
    compute = spec.count(**({"input_size": resolution // LATENT_FACTOR} if is_dit else {}))
    return compute.gflops, compute.params / 1e6
