"""The 2015-12-05 Inception-v3 in torch: the features of ADM's evaluator without TensorFlow.

Layers: `inception_layers`; weights: `inception_graph`; resize: `tf1_resize`. Batch normalisation is folded into the
convolution before it, in float64 and rounded once. The graph with the same weights gives features that differ by float32
rounding alone, within `TOLERANCES`.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from evaluators.features import inception_layers as table
from evaluators.features.inception_graph import (
    InceptionWeights,
    Layer,
    extract_in_batches,
    missing_weights,
    read_weights,
)
from evaluators.features.spec import Features, FeatureSpec
from evaluators.features.tf1_resize import resize_torch
from harness.frameworks.torch_float32 import exact_float32

# Largest difference from TensorFlow with the same graph, relative to the root mean square of each stage. Measured on 64
# images with random weights, TensorFlow 2.21 and torch 2.13 on a CPU: 0, 1.5e-4, 1.0e-4 and 6e-5. Both frameworks differ
# by as much from the same network in float64.
TOLERANCES = {"resize": 0.0, "pooled": 5e-4, "spatial": 5e-4, "logits": 5e-4}


class ConvReLU(nn.Conv2d):
    """A convolution with its normalisation folded in, and ReLU."""

    def __init__(self, conv: table.Conv):
        height, width = conv.kernel
        padding = (height // 2, width // 2) if conv.same else (0, 0)
        super().__init__(conv.width_in, conv.width, conv.kernel, conv.stride, padding)

    def fold(self, layer: Layer) -> None:
        """Load the weights of a layer, with its normalisation folded in."""
        kernel, bias = layer.folded()  # (height, width, in, out), (out,)
        assert self.bias is not None
        with torch.no_grad():
            self.weight.copy_(torch.from_numpy(kernel).permute(3, 2, 0, 1))
            self.bias.copy_(torch.from_numpy(bias))

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu_(super().forward(x))  # (N, out, H / stride, W / stride)


class Pool(nn.Module):
    """Pooling over a square window; averages do not include the padding."""

    def __init__(self, pool: table.Pool):
        super().__init__()
        padding = pool.kernel // 2 if pool.same else 0
        self.average, self.window = pool.average, (pool.kernel, pool.stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        if self.average:
            return functional.avg_pool2d(x, *self.window, count_include_pad=False)  # (N, C, H, W)
        return functional.max_pool2d(x, *self.window)  # (N, C, H / stride, W / stride)


class Join(nn.Module):
    """Branches side by side, concatenated along the channels."""

    def __init__(self, join: table.Join):
        super().__init__()
        self.branches = nn.ModuleList(_sequence(branch) for branch in join.branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)  # (N, sum of C, H, W)


def _build(layer: table.Layer) -> nn.Module:
    if isinstance(layer, table.Conv):
        return ConvReLU(layer)
    return Pool(layer) if isinstance(layer, table.Pool) else Join(layer)


def _sequence(layers: Sequence[table.Layer]) -> nn.Sequential:
    return nn.Sequential(*(_build(layer) for layer in layers))


class InceptionV3(nn.Module):
    """From normalised images float32 (N, 3, 299, 299) to pooled (N, 2048), spatial (N, 2023) and logits (N, 1008)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _sequence(table.STEM)
        self.blocks = nn.ModuleDict({scope: Join(join) for scope, join in table.BLOCKS.items()})
        self.classifier = nn.Linear(table.POOLED, table.CLASSES, bias=False)

    def load(self, weights: InceptionWeights) -> "InceptionV3":
        """Load all weights; returns self, ready for inference."""
        # in the order of `table.convolutions()`, as weights.layers
        convolutions = [module for module in self.modules() if isinstance(module, ConvReLU)]
        for module, layer in zip(convolutions, weights.layers.values(), strict=True):
            module.fold(layer)
        with torch.no_grad():
            self.classifier.weight.copy_(torch.from_numpy(np.array(weights.classifier.T)))
        return self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.stem(x)  # (N, 192, 35, 35)
        for scope in ("mixed", "mixed_1", "mixed_2"):
            h = self.blocks[scope](h)  # (N, 256, 35, 35), then 288 channels
        for scope in ("mixed_3", "mixed_4", "mixed_5", "mixed_6"):
            h = self.blocks[scope](h)  # (N, 768, 17, 17)
        # mixed_6/conv is the block's first branch; flattened with the channel as the last axis, as in public statistics
        spatial = h[:, : table.SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # (N, 17 * 17 * 7)
        h = self.blocks["mixed_7"](h)  # (N, 768, 17, 17)
        h = self.blocks["mixed_8"](h)  # (N, 1280, 8, 8)
        for scope in ("mixed_9", "mixed_10"):
            h = self.blocks[scope](h)  # (N, 2048, 8, 8)
        pooled = h.mean(dim=(2, 3))  # (N, 2048)
        return pooled, spatial, self.classifier(pooled)  # (N, 2048), (N, 2023), (N, 1008)


def preprocess(images: Tensor) -> Tensor:
    """uint8 (N, H, W, C), C 1 or 3 -> float32 (N, 3, 299, 299), channels last in memory, (x - 128) / 128."""
    x = resize_torch(images)  # (N, 299, 299, C)
    x = x.sub_(128.0).mul_(0.0078125)  # 1 / 128, exact in float32
    return x.expand(-1, -1, -1, 3).contiguous().permute(0, 3, 1, 2)  # (N, 3, 299, 299)


class InceptionFeatures:
    """The extractor; see `evaluators.features.FeatureExtractor` for the contract.

    found, known: as in `InceptionWeights`.
    """

    def __init__(
        self, spec: FeatureSpec, weights: InceptionWeights, device: str = "cpu", batch_size: int | None = None
    ):
        self.name, self.dim = spec.name, spec.dim
        self.sha256, self.found, self.known = weights.sha256, weights.found, weights.known
        self.description = f"{spec.description}; {weights.found}"
        self.device = torch.device(device)
        # On a CPU, batches of 16 keep more of the activations in the cache than 32, with less overhead than 4 or 8.
        self.batch_size = batch_size or (16 if self.device.type == "cpu" else 128)
        self.net: InceptionV3 = (
            InceptionV3()
            .load(weights)
            .to(
                self.device,
                memory_format=torch.channels_last,  # type: ignore[call-overload]  # torch's stub of Module.to omits it
            )
        )

    def prepare(self, batch: np.ndarray) -> Tensor:
        """The network's input, float32 (N, 3, 299, 299) on its device, for images uint8 (N, H, W, 1 or 3)."""
        return preprocess(torch.from_numpy(batch).to(self.device))

    def _forward(self, batch: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pooled, spatial and logits of a batch uint8 (n, H, W, C)."""
        pooled, spatial, logits = self.net(self.prepare(batch))
        return pooled.cpu().numpy(), spatial.cpu().numpy(), logits.cpu().numpy()

    def __call__(self, images: np.ndarray) -> Features:
        with torch.inference_mode(), exact_float32(self.device.type):
            return extract_in_batches(self.name, images, self.batch_size, self._forward)


def load(
    spec: FeatureSpec, device: str = "cpu", weights: Path | None = None, entry: str | None = None
) -> InceptionFeatures:
    """The loader of the FeatureSpec. weights: the frozen graph or its torch port; entry: of the port."""
    if weights is None:
        raise missing_weights(spec.name)
    return InceptionFeatures(spec, read_weights(weights, entry), device)
