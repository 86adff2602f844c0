"""The 2015-12-05 Inception-v3 on images resized by the clean-fid package (Parmar et al., arXiv:2104.11222).

From the package itself: the resize of its mode `clean`, in float32 and not rounded. Equal to clean-fid: the normalisation
(x - 128) / 128 and the weights. Different: clean-fid downloads and runs NVIDIA's TorchScript file, which is executable
code; here the network is that of `inception_v3`, which differs by float32 rounding. clean-fid's modes `legacy_pytorch`
and `legacy_tensorflow` resize differently and give other numbers.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

# This module of clean-fid needs no torchvision, although the package does: see harness/frameworks/torchvision.py
from cleanfid.resize import build_resizer

from evaluators.features.inception_graph import InceptionWeights, missing_weights, read_weights
from evaluators.features.inception_v3 import InceptionFeatures
from evaluators.features.spec import FeatureSpec
from harness.io.processors import processors

MODE = "clean"
MAX_WORKERS = 8


class CleanInceptionFeatures(InceptionFeatures):
    """The extractor; see `evaluators.features.FeatureExtractor` for the contract. Threads resize images in parallel."""

    def __init__(
        self, spec: FeatureSpec, weights: InceptionWeights, device: str = "cpu", batch_size: int | None = None
    ):
        super().__init__(spec, weights, device, batch_size)
        # weights.sha256 includes the TF1 resize, which is replaced here; the description states the one of clean-fid.
        self.sha256 = hashlib.sha256(f"{weights.sha256}\n{spec.description}".encode()).hexdigest()
        self._resize = build_resizer(MODE)
        self._pool = ThreadPoolExecutor(min(processors(), MAX_WORKERS))  # Pillow releases the interpreter lock

    def prepare(self, batch: np.ndarray) -> torch.Tensor:
        """uint8 (N, H, W, 1 or 3) -> float32 (N, 3, 299, 299) in [-1, 127/128]; grey is repeated, as for a grey file."""
        images = np.broadcast_to(batch, (*batch.shape[:3], 3))
        x = torch.from_numpy(np.stack(list(self._pool.map(self._resize, images)))).to(self.device)  # (N, 299, 299, 3)
        return x.sub_(128.0).div_(128.0).permute(0, 3, 1, 2)  # (N, 3, 299, 299), channels last in memory


def load(
    spec: FeatureSpec, device: str = "cpu", weights: Path | None = None, entry: str | None = None
) -> CleanInceptionFeatures:
    """The loader of the FeatureSpec. weights: the frozen graph or its torch port, as for suite adm; entry: of the port."""
    if weights is None:
        raise missing_weights(spec.name)
    return CleanInceptionFeatures(spec, read_weights(weights, entry), device)
