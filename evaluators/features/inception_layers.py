"""The layers of the Inception-v3 of 2015-12-05 (Szegedy et al., arXiv:1512.00567), under the names of its public graph.

Each convolution also has a second name, that of the public torch ports of the same weights. Every convolution is
without bias and followed by batch normalisation (eps 1e-3, scale and shift) and ReLU. Padding is TensorFlow's SAME,
which is symmetric for these kernels and strides, or VALID. Average pools divide by the number of pixels without the
padding. The pool branch of the last block takes the maximum, that of the block before it the average.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SIDE = 299
EPSILON = 0.001  # of every batch normalisation; a float32 in the graph
POOLED = 2048
CLASSES = 1008
SPATIAL_SIDE, SPATIAL_CHANNELS = 17, 7
SPATIAL = SPATIAL_SIDE * SPATIAL_SIDE * SPATIAL_CHANNELS  # 2023


@dataclass(frozen=True)
class Conv:
    """Convolution, normalisation, ReLU. scope: name in the graph. port: name in the torch ports. kernel: (height, width)."""

    scope: str
    port: str
    width_in: int
    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    same: bool = True  # padding SAME; False: VALID


@dataclass(frozen=True)
class Pool:
    """Average or maximum pooling over a square window."""

    average: bool
    kernel: int
    stride: int
    same: bool  # padding SAME; False: VALID


@dataclass(frozen=True)
class Join:
    """Branches from one input, concatenated along the channels in this order. A branch is a sequence of layers."""

    branches: tuple[tuple["Layer", ...], ...]


Layer = Conv | Pool | Join


MAX_HALVE = Pool(average=False, kernel=3, stride=2, same=False)
MAX_KEEP = Pool(average=False, kernel=3, stride=1, same=True)
AVERAGE_KEEP = Pool(average=True, kernel=3, stride=1, same=True)
POOL_3 = Pool(average=True, kernel=8, stride=1, same=False)


def _chain(scope: str, port: str, width_in: int, *links: tuple[Any, ...]) -> tuple[Conv, ...]:
    """Consecutive convolutions scope/conv, scope/conv_1, ...; a link is (suffix of port, width, kernel[, stride, same]).

    A kernel given as one number is square. width_in: input channels of the first convolution.
    """
    chain = []
    for i, (suffix, width, kernel, *rest) in enumerate(links):
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        chain.append(Conv(f"{scope}/conv{f'_{i}' if i else ''}", f"{port}.{suffix}", width_in, width, kernel, *rest))
        width_in = width
    return tuple(chain)


# The blocks have the letters of torchvision's classes InceptionA to InceptionE.


def _block_a(scope: str, port: str, width_in: int, pool_width: int) -> Join:
    return Join((
        _chain(scope, port, width_in, ("branch1x1", 64, 1)),
        _chain(f"{scope}/tower", port, width_in, ("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)),
        _chain(f"{scope}/tower_1", port, width_in,
               ("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)),
        (AVERAGE_KEEP, *_chain(f"{scope}/tower_2", port, width_in, ("branch_pool", pool_width, 1))),
    ))  # fmt: skip


def _block_b(scope: str, port: str) -> Join:
    return Join((
        _chain(scope, port, 288, ("branch3x3", 384, 3, 2, False)),
        _chain(f"{scope}/tower", port, 288,
               ("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2, False)),
        (MAX_HALVE,),
    ))  # fmt: skip


def _block_c(scope: str, port: str, width: int) -> Join:
    return Join((
        _chain(scope, port, 768, ("branch1x1", 192, 1)),
        _chain(f"{scope}/tower", port, 768,
               ("branch7x7_1", width, 1), ("branch7x7_2", width, (1, 7)), ("branch7x7_3", 192, (7, 1))),
        _chain(f"{scope}/tower_1", port, 768,
               ("branch7x7dbl_1", width, 1), ("branch7x7dbl_2", width, (7, 1)), ("branch7x7dbl_3", width, (1, 7)),
               ("branch7x7dbl_4", width, (7, 1)), ("branch7x7dbl_5", 192, (1, 7))),
        (AVERAGE_KEEP, *_chain(f"{scope}/tower_2", port, 768, ("branch_pool", 192, 1))),
    ))  # fmt: skip


def _block_d(scope: str, port: str) -> Join:
    return Join((
        _chain(f"{scope}/tower", port, 768, ("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2, False)),
        _chain(f"{scope}/tower_1", port, 768,
               ("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)), ("branch7x7x3_3", 192, (7, 1)),
               ("branch7x7x3_4", 192, 3, 2, False)),
        (MAX_HALVE,),
    ))  # fmt: skip


def _block_e(scope: str, port: str, width_in: int, pool: Pool) -> Join:
    def fork(tower: str, name: str) -> Join:
        """A 1x3 and a 3x1 convolution of the same input, side by side. name: of both in the torch ports, without a or b."""
        return Join((
            (Conv(f"{tower}/mixed/conv", f"{port}.{name}a", 384, 384, (1, 3)),),
            (Conv(f"{tower}/mixed/conv_1", f"{port}.{name}b", 384, 384, (3, 1)),),
        ))  # fmt: skip

    return Join((
        _chain(scope, port, width_in, ("branch1x1", 320, 1)),
        (*_chain(f"{scope}/tower", port, width_in, ("branch3x3_1", 384, 1)), fork(f"{scope}/tower", "branch3x3_2")),
        (*_chain(f"{scope}/tower_1", port, width_in, ("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3)),
         fork(f"{scope}/tower_1", "branch3x3dbl_3")),
        (pool, *_chain(f"{scope}/tower_2", port, width_in, ("branch_pool", 192, 1))),
    ))  # fmt: skip


STEM: tuple[Layer, ...] = (
    Conv("conv", "Conv2d_1a_3x3", 3, 32, (3, 3), 2, False),
    Conv("conv_1", "Conv2d_2a_3x3", 32, 32, (3, 3), 1, False),
    Conv("conv_2", "Conv2d_2b_3x3", 32, 64, (3, 3)),
    MAX_HALVE,
    Conv("conv_3", "Conv2d_3b_1x1", 64, 80, (1, 1), 1, False),
    Conv("conv_4", "Conv2d_4a_3x3", 80, 192, (3, 3), 1, False),
    MAX_HALVE,
)
BLOCKS = {  # by scope in the graph
    "mixed": _block_a("mixed", "Mixed_5b", 192, 32),
    "mixed_1": _block_a("mixed_1", "Mixed_5c", 256, 64),
    "mixed_2": _block_a("mixed_2", "Mixed_5d", 288, 64),
    "mixed_3": _block_b("mixed_3", "Mixed_6a"),
    "mixed_4": _block_c("mixed_4", "Mixed_6b", 128),
    "mixed_5": _block_c("mixed_5", "Mixed_6c", 160),
    "mixed_6": _block_c("mixed_6", "Mixed_6d", 160),
    "mixed_7": _block_c("mixed_7", "Mixed_6e", 192),
    "mixed_8": _block_d("mixed_8", "Mixed_7a"),
    "mixed_9": _block_e("mixed_9", "Mixed_7b", 1280, AVERAGE_KEEP),
    "mixed_10": _block_e("mixed_10", "Mixed_7c", 2048, MAX_KEEP),
}


def convolutions(layers: Sequence[Layer] | None = None) -> tuple[Conv, ...]:
    """The convolutions in `layers`, in order. None: the 94 of the whole network."""
    convs: list[Conv] = []
    for layer in (*STEM, *BLOCKS.values()) if layers is None else layers:
        if isinstance(layer, Conv):
            convs.append(layer)
        elif isinstance(layer, Join):
            for branch in layer.branches:
                convs += convolutions(branch)
    return tuple(convs)
