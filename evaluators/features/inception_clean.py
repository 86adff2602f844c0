"""The 2015-12-05 Inception-v3 on images that the clean-fid package has resized (Parmar et al., arXiv:2104.11222).

What is clean-fid's own, called from its package: the resize of its mode `clean`, float32 and not rounded. What is equal
to it: (x - 128) / 128 and the weights. What is not the same: clean-fid runs them as NVIDIA's TorchScript file,
a program that a download would execute; here the network is `inception_v3`'s, which differs by float32 rounding.
Its modes `legacy_pytorch` and `legacy_tensorflow` are other resizes and other numbers.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

# Needs no torchvision, though the package as a whole does: see harness/torchvision_torch.py
from cleanfid.resize import build_resizer

from evaluators.features.inception_graph import InceptionWeights, missing, read_weights
from evaluators.features.inception_v3 import InceptionFeatures

MODE = "clean"
MAX_WORKERS = 8


class CleanInceptionFeatures(InceptionFeatures):
    """The extractor; see `evaluators.features.FeatureExtractor` for the contract. Images are resized one a thread."""

    def __init__(self, spec, weights: InceptionWeights, device: str = "cpu", batch_size: int | None = None):
        super().__init__(spec, weights, device, batch_size)
        self.sha256 = hashlib.sha256(f"{weights.sha256}\n{spec.description}".encode()).hexdigest()
        self._resize = build_resizer(MODE)
        self._pool = ThreadPoolExecutor(min(os.cpu_count() or 1, MAX_WORKERS))  # Pillow lets go of the interpreter

    def prepare(self, batch: np.ndarray) -> torch.Tensor:
        """uint8 (N, H, W, 1 or 3) to float32 (N, 3, 299, 299) in [-1, 127/128]; grey is repeated, as from a file."""
        images = np.broadcast_to(batch, (*batch.shape[:3], 3))
        x = torch.from_numpy(np.stack(list(self._pool.map(self._resize, images)))).to(self.device)  # (N, 299, 299, 3)
        return x.sub_(128.0).div_(128.0).permute(0, 3, 1, 2)  # (N, 3, 299, 299), channels last in memory


def load(spec, device: str = "cpu", weights: Path | None = None) -> CleanInceptionFeatures:
    """The loader named by the FeatureSpec. weights: the frozen graph or its torch port, as for suite adm."""
    if weights is None:
        raise missing(spec.name)
    return CleanInceptionFeatures(spec, read_weights(weights), device)
