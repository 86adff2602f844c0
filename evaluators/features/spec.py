"""Interface of feature extractors: `FeatureSpec` describes and loads one, which returns `Features`.

Importing this module loads no framework: a `FeatureSpec` names an extractor, which is imported when it is loaded.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from harness.errors import UserError, shown

if TYPE_CHECKING:
    import numpy as np


KINDS = ("pooled", "logits", "spatial")  # the fields of Features


@dataclass(frozen=True, kw_only=True)
class Features:
    """Activations of a network for N images.

    pooled: float32 (N, D), before the classifier.
    logits: float32 (N, K), the classifier's outputs before the softmax; None: the network has no classifier.
    spatial: float32 (N, S), activations before spatial pooling, for sFID; None: the extractor does not give them.
    """

    pooled: np.ndarray
    logits: np.ndarray | None = None
    spatial: np.ndarray | None = None


class FeatureExtractor(Protocol):
    """A loaded network with its preprocessing. Row i of the result depends on image i alone, up to float32 rounding."""

    name: str  # of the FeatureSpec
    sha256: str  # of the weights and the preprocessing: two extractors with equal hashes give comparable numbers
    dim: int  # D, the width of the pooled features
    description: str  # one line: network, weights, input size, resizing, normalisation

    def __call__(self, images: np.ndarray) -> Features:
        """uint8 (N, H, W, C), C 1 or 3, values 0 to 255 -> Features of N rows."""
        ...


@dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """Description of an extractor, which can be listed without loading it. The object of `harness.features` entry points.

    loader: "module:attribute" of a callable (spec, device) -> FeatureExtractor, where device is a torch-style name. With
    weights_option it is called as (spec, device, path of the weights or None), and where users choose one of the entries
    of a checkpoint, with its name as a fourth argument, `entry`, if the loader has that parameter.
    """

    name: str
    dim: int  # D of the pooled features
    classes: int | None  # K of the logits; None: no logits, so no Inception Score
    input_size: int  # height and width in pixels after resizing
    loader: str
    description: str
    requires: str = ""  # arguments of `pip install` if the loader's imports are missing
    tokens: str = ""  # "module:attribute" of a callable (spec, device), see `load_tokens`; empty: it gives no tokens
    weights_option: str = ""  # flag with which users name the weight file; empty: the loader takes none

    def load_tokens(self, device: str = "cpu") -> Any:
        """The network as a frozen encoder (`harness.diffusion.auxiliary`): a callable in torch, images float32
        (N, C, H, W) in [-1, 1], C 1 or 3 -> patch tokens float32 (N, T, D), T a square, row by row. UserError: it gives none.
        """
        if not self.tokens:
            raise UserError(
                f"features {self.name} give no patch tokens, so they cannot be the encoder of an auxiliary loss"
            )
        module, _, attribute = self.tokens.partition(":")
        try:
            loader = getattr(importlib.import_module(module), attribute)
        except ImportError as error:
            raise UserError(f"features {self.name} cannot be loaded ({error}): pip install {self.requires}") from error
        return loader(self, device)

    def load(self, device: str = "cpu", weights: Path | None = None, entry: str | None = None) -> FeatureExtractor:
        """Import the loader and build the extractor. Raises UserError with the fix if a package or file is missing.

        entry: of the weight file, where several fit (`harness.weights.files.open_weights`).
        """
        if weights is not None and not self.weights_option:
            raise UserError(
                f"features {self.name} take no weight file, because theirs is packaged: leave {weights} out"
            )
        module, _, attribute = self.loader.partition(":")
        try:
            loader = getattr(importlib.import_module(module), attribute)
        except ImportError as error:
            raise UserError(f"features {self.name} cannot be loaded ({error}): pip install {self.requires}") from error
        if entry is not None:
            if not self.weights_option or "entry" not in inspect.signature(loader).parameters:
                raise UserError(
                    f"features {self.name} take no entry of a weight file: leave out --entry {shown(entry)}"
                )
            return loader(self, device, weights, entry)
        return loader(self, device, weights) if self.weights_option else loader(self, device)
