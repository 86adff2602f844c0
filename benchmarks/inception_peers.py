"""The Inception of the harness and of the public packages with the same random weights, each from uint8 images
(N, H, W, 3) to pool3 float32 (N, 2048), resizing included, in batches of one size.

torch-fidelity: FeatureExtractorInceptionV3, features "2048": TensorFlow 1's resize, as the harness. pytorch-fid:
InceptionV3() on images in [0, 1]: half-pixel resize. clean-fid: its resizer of mode "clean" (PIL, bicubic, image by
image) and its InceptionV3; the TorchScript network of that mode is a download, so the one of its mode legacy_pytorch
stands for it. None of them gives the spatial features and the logits that the harness gives besides.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from evaluators.features import INCEPTION_2015
from evaluators.features.inception_graph import InceptionWeights, Layer
from evaluators.features.inception_layers import CLASSES, POOLED, convolutions
from evaluators.features.inception_v3 import InceptionFeatures

Extract = Callable[[np.ndarray], np.ndarray]


def random_weights(seed: int = 0) -> tuple[InceptionWeights, dict[str, torch.Tensor]]:
    """Weights that keep the activations' scale, for the harness and under the names of the torch ports."""
    r = np.random.default_rng(seed)
    layers, port = {}, {}
    for conv in convolutions():
        fan_in = conv.kernel[0] * conv.kernel[1] * conv.width_in
        kernel = r.standard_normal((*conv.kernel, conv.width_in, conv.width), np.float32)
        kernel *= np.float32(np.sqrt(2 / fan_in))
        vectors = {
            "gamma": r.uniform(0.8, 1.2, conv.width).astype(np.float32),
            "beta": r.normal(0.1, 0.2, conv.width).astype(np.float32),
            "mean": r.normal(0, 0.1, conv.width).astype(np.float32),
            "variance": r.uniform(0.8, 1.2, conv.width).astype(np.float32),
        }
        layers[conv.scope] = Layer(kernel=kernel, **vectors)
        port[f"{conv.port}.conv.weight"] = torch.from_numpy(kernel).permute(3, 2, 0, 1).contiguous()
        for name, mine in (
            ("weight", "gamma"),
            ("bias", "beta"),
            ("running_mean", "mean"),
            ("running_var", "variance"),
        ):
            port[f"{conv.port}.bn.{name}"] = torch.from_numpy(vectors[mine])
    classifier = r.standard_normal((POOLED, CLASSES), np.float32) * np.float32(0.05)
    port["fc.weight"], port["fc.bias"] = torch.from_numpy(classifier.T.copy()), torch.zeros(CLASSES)
    weights = InceptionWeights(
        path=Path("random"), layers=layers, classifier=classifier, sha256="0" * 64,
        found="random weights", known=False, is_graph=False,
    )  # fmt: skip
    return weights, port


def harness_extractor(weights: InceptionWeights, batch: int) -> Extract:
    network = InceptionFeatures(INCEPTION_2015, weights, batch_size=batch)
    return lambda images: network(images).pooled


def _batches(images: np.ndarray, batch: int, forward: Callable[[np.ndarray], torch.Tensor]) -> np.ndarray:
    with torch.inference_mode():
        return np.concatenate([forward(images[i : i + batch]).numpy() for i in range(0, len(images), batch)])


def torch_fidelity(port: dict[str, torch.Tensor], batch: int) -> Extract:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with tempfile.TemporaryDirectory() as folder:
        torch.save(port, Path(folder) / "port.pth")
        network = FeatureExtractorInceptionV3("inception", ["2048"], str(Path(folder) / "port.pth"))

    def forward(part: np.ndarray) -> torch.Tensor:
        return network(torch.from_numpy(part).permute(0, 3, 1, 2))[0]

    return lambda images: _batches(images, batch, forward)


def _built(module, port: dict[str, torch.Tensor], **arguments) -> torch.nn.Module:
    """A package's InceptionV3 with these weights in the place of its download."""
    kept = module.load_state_dict_from_url
    module.load_state_dict_from_url = lambda *_, **__: port
    try:
        return module.InceptionV3(**arguments).eval()
    finally:
        module.load_state_dict_from_url = kept


def pytorch_fid(port: dict[str, torch.Tensor], batch: int) -> Extract:
    from pytorch_fid import inception

    network = _built(inception, port)

    def forward(part: np.ndarray) -> torch.Tensor:
        return network(torch.from_numpy(part).permute(0, 3, 1, 2).float().div(255))[0].flatten(1)

    return lambda images: _batches(images, batch, forward)


def clean_fid(port: dict[str, torch.Tensor], batch: int) -> Extract:
    from cleanfid import inception_pytorch
    from cleanfid.resize import build_resizer

    network = _built(inception_pytorch, port, output_blocks=[3], resize_input=False)
    resize = build_resizer("clean")

    def forward(part: np.ndarray) -> torch.Tensor:
        resized = torch.stack([torch.from_numpy(resize(image)).permute(2, 0, 1).contiguous() for image in part])
        return network(resized / 255)[0].flatten(1)

    return lambda images: _batches(images, batch, forward)


PEERS = {"torch-fidelity": torch_fidelity, "pytorch-fid": pytorch_fid, "clean-fid": clean_fid}
