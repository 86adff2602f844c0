"""REPA's heads: a projector for each tap, and the cosine between its tokens and the encoder's (arXiv:2410.06940, eq. 8).

The projector is that of the public code (sihyun-yu/REPA, models/sit.py, build_mlp): three linear layers with SiLU between
them, 2048 wide.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.errors import UserError, shown

PROJECTOR_WIDTH = 2048


class Projectors(nn.Module):
    """The heads of `harness.diffusion.auxiliary.AuxiliaryLoss` "repa".

    shapes: of the tapped outputs, tokens (T, D) row by row or a map (C, H, W). tokens: (T, D) of the encoder.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], tokens: tuple[int, int] | None):
        super().__init__()
        assert tokens is not None  # it needs an encoder
        self._side = _side(tokens[0], "the encoder")
        for tap, shape in shapes.items():
            if len(shape) not in (2, 3):
                raise UserError(
                    f"auxiliary loss repa: the output of {tap} is {shape}, neither tokens (T, D) nor a map (C, H, W)"
                )
            if len(shape) == 2:
                _side(shape[0], tap)
        widths = [shape[-1] if len(shape) == 2 else shape[0] for shape in shapes.values()]
        self.projectors = nn.ModuleList(
            nn.Sequential(
                nn.Linear(width, PROJECTOR_WIDTH),
                nn.SiLU(),
                nn.Linear(PROJECTOR_WIDTH, PROJECTOR_WIDTH),
                nn.SiLU(),
                nn.Linear(PROJECTOR_WIDTH, tokens[1]),
            )
            for width in widths
        )

    def forward(self, tapped: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
        """The negative mean cosine over patches and taps, float32 (N,). tokens: float32 (N, T, D) of the encoder."""
        total = torch.zeros(len(tokens), device=tokens.device)
        for projector, out in zip(self.projectors, tapped.values(), strict=True):
            grid = out if out.dim() == 4 else _grid(out, _side(out.shape[1], "the tap"))  # (N, C, h, w)
            target = _grid(tokens, self._side)  # (N, D, s, s)
            if target.shape[2:] != grid.shape[2:]:
                target = F.interpolate(target, size=grid.shape[2:], mode="bilinear", antialias=True)
            projected = projector(grid.flatten(2).transpose(1, 2))  # (N, h w, D)
            total = total - F.cosine_similarity(projected, target.flatten(2).transpose(1, 2), dim=2).mean(dim=1)
        return total / len(self.projectors)


def _grid(tokens: Tensor, side: int) -> Tensor:
    """Tokens (N, T, D), numbered row by row, as a map (N, D, side, side)."""
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def _side(tokens: int, where: str) -> int:
    """The side of the square of patches. Raises `UserError` for a number that is no square, as with a class token."""
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise UserError(f"auxiliary loss repa: {where} has {shown(tokens)} tokens, which are no square of patches")
    return side
