"""Features of a torch network in batches, of images of any number."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from evaluators.features.spec import Features, FeatureSpec
from harness.errors import RunError, UserError
from harness.frameworks.torch_float32 import exact_float32


def in_batches(
    net: Callable[[Tensor], tuple[Tensor, Tensor]],
    images: np.ndarray,
    spec: FeatureSpec,
    batch_size: int,
    device: torch.device,
) -> Features:
    """Pooled features and logits of uint8 images (N, H, W, 1 or 3); UserError for others, RunError for values not finite.

    net: from a batch uint8 (n, H, W, C) on the device to float32 (n, D) and (n, K), D and K as in the spec.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise UserError(f"features need uint8 images (N, H, W, 1 or 3), got {images.dtype} {images.shape}")
    pooled = np.empty((len(images), spec.dim), np.float32)
    logits = np.empty((len(images), spec.classes or 0), np.float32)
    with torch.inference_mode(), exact_float32(device.type):
        for start in range(0, len(images), batch_size):
            rows = slice(start, start + batch_size)
            batch = torch.from_numpy(np.array(images[rows])).to(device)  # copied: torch warns of read-only maps
            batch_pooled, batch_logits = net(batch)
            pooled[rows], logits[rows] = batch_pooled.cpu().numpy(), batch_logits.cpu().numpy()
    if not (np.isfinite(pooled).all() and np.isfinite(logits).all()):
        raise RunError(f"features {spec.name} are not finite: the network or this device is broken")
    return Features(pooled=pooled, logits=logits)
