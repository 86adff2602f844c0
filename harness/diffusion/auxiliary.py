"""Auxiliary losses: trained heads on a backbone's inner activations, often held against a frozen encoder's tokens.

The recipe's item is `auxiliary = "NAME:ENCODER:TAP[+TAP...][:WEIGHT]"`, as in "repa:efficientnet-lite0-96:blocks.2:0.5". ENCODER
is a name of `harness list features` that gives tokens (`FeatureSpec.tokens`), or "none". TAP is the path of a module of the
network, whose output the heads get. The heads are trained with the network and are part of its checkpoints; sampling needs
neither heads nor encoder.

REPA: Yu et al., "Representation Alignment for Generation" (arXiv:2410.06940).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from harness.errors import UserError, shown

FORM = "NAME:ENCODER:TAP[+TAP...][:WEIGHT]"
NO_ENCODER = "none"
ENCODER_FACTOR = 1
"""Passes of the frozen encoder in a training step: the forward pass alone. Heads count as the network does."""


@dataclass(frozen=True, kw_only=True)
class AuxiliaryLoss:
    """An auxiliary loss with its name. The object of `harness.auxiliary_losses` entry points.

    builders: framework -> "module:attribute" of the heads, today "torch" alone: a callable of (shapes, tokens) that returns
    a torch.nn.Module. shapes: tap -> shape of the tapped output without the batch, such as (T, D); tokens: (T, D) of the
    encoder, None without one. The module is called with (tapped, tokens), tap -> float32 (N, ...) and float32 (N, T, D) or
    None, and returns the loss of each image, float32 (N,). weight: of the loss, where the recipe names none.
    """

    name: str
    summary: str = ""
    weight: float = 1.0
    needs_encoder: bool = True
    builders: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class AuxiliaryCompute:
    """Flops for one image: of the encoder's forward pass, and of one pass through the heads. params: of the heads."""

    encoder: int
    heads: int
    params: int

    @property
    def training_flops(self) -> int:
        """Flops that the auxiliary loss adds to the training on one image."""
        from harness.compute import TRAINING_FACTOR

        return ENCODER_FACTOR * self.encoder + TRAINING_FACTOR * self.heads


@dataclass(frozen=True, kw_only=True)
class Auxiliary:
    """What a recipe asks for. encoder: "" for none. weight: None: that of the loss."""

    name: str
    encoder: str
    taps: tuple[str, ...]
    weight: float | None

    def __str__(self) -> str:
        weight = "" if self.weight is None else f":{self.weight!r}"
        return f"{self.name}:{self.encoder or NO_ENCODER}:{'+'.join(self.taps)}{weight}"


def read_auxiliary(text: str) -> Auxiliary:
    """The recipe's text in parts. Raises `UserError` for text of another form; names are not looked up."""
    words = text.split(":")
    if len(words) not in (3, 4) or not all(words) or not all(words[2].split("+")):
        raise UserError(f"recipe: auxiliary {shown(text)} is not of the form {FORM}")
    weight = None
    if len(words) == 4:
        try:
            weight = float(words[3])
        except ValueError:
            weight = math.nan
        if not 0 < weight < math.inf:
            raise UserError(f"recipe: auxiliary {shown(text)}: the weight {shown(words[3])} is no positive number")
    return Auxiliary(
        name=words[0],
        encoder="" if words[1] == NO_ENCODER else words[1],
        taps=tuple(words[2].split("+")),
        weight=weight,
    )


LOSSES = (
    AuxiliaryLoss(
        name="repa",
        summary="representation alignment: the cosine between projected tokens and those of an encoder (arXiv:2410.06940)",
        weight=0.5,  # the paper's lambda
        builders={"torch": "harness.engines.torch.repa:Projectors"},
    ),
)
