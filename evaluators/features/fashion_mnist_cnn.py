"""Features of a small classifier of Fashion-MNIST, shipped with this project: a second opinion beside ImageNet's networks.

Network: six 3x3 convolutions with ReLU on 16x16 pixels, width 32, 64 and 128 with average pooling between them, the mean
over positions, and one linear layer. It was trained on the 60,000 training images by `studies/train_fashion_mnist_cnn.py`,
which also measures its accuracy on the 10,000 test images (in the metadata of the weight file). Batch normalisations are
folded into the convolutions; the weights are stored in float16.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from evaluators.features.batches import in_batches
from evaluators.features.spec import Features, FeatureSpec
from harness.errors import UserError

WEIGHTS_FILE = Path(__file__).with_name("fashion_mnist_cnn.safetensors")
WEIGHTS_SHA256 = "6a42bcd23642c276feda6ded77cbe838223d5b735d1e9b66673c9927ae70eb3f"

SIDE = 16  # pixels of the network's input
WIDTHS = (32, 32, 64, 64, 128, 128)  # of the convolutions; before a wider one, 2x2 pixels are averaged
CLASSES = 10


class FashionMNISTCNN(nn.Module):
    """From normalised images float32 (N, 1, 16, 16) to pooled features (N, 128) and logits (N, 10).

    norms: True: a batch normalisation after each convolution, for training; False: they are folded into the convolutions.
    """

    def __init__(self, *, norms: bool = False):
        super().__init__()
        widths_in = (1, *WIDTHS[:-1])
        self.convs = nn.ModuleList(
            nn.Conv2d(width_in, width, 3, padding=1) for width_in, width in zip(widths_in, WIDTHS, strict=True)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) if norms else nn.Identity() for width in WIDTHS)
        self.classifier = nn.Linear(WIDTHS[-1], CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        width_before = WIDTHS[0]
        for conv, norm, width in zip(self.convs, self.norms, WIDTHS, strict=True):
            if width > width_before:
                x = functional.avg_pool2d(x, 2)  # (N, C, S/2, S/2), S = 16, 8
            x = functional.relu(norm(conv(x)))  # (N, width, S, S), S = 16, 8, 4
            width_before = width
        pooled = x.mean(dim=(2, 3))  # (N, 128)
        return pooled, self.classifier(pooled)  # (N, 128), (N, 10)


def folded(net: FashionMNISTCNN) -> FashionMNISTCNN:
    """A network without batch normalisations that computes what `net`, which has them, computes in evaluation mode."""
    result = FashionMNISTCNN().eval()
    with torch.no_grad():
        result.classifier.load_state_dict(net.classifier.state_dict())
        for conv, norm, target in zip(net.convs, net.norms, result.convs, strict=True):
            assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and isinstance(target, nn.Conv2d)
            assert norm.running_mean is not None and norm.running_var is not None
            assert conv.bias is not None and target.bias is not None
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            target.weight.copy_(conv.weight * scale.reshape(-1, 1, 1, 1))
            target.bias.copy_((conv.bias - norm.running_mean) * scale + norm.bias)
    return result


def preprocess(images: Tensor) -> Tensor:
    """uint8 (N, H, W, C), C 1 or 3 -> float32 (N, 1, 16, 16), (p - 127.5) / 127.5; colours are averaged.

    Images of 16 k pixels are averaged over blocks of k x k, others are resized (bilinear, antialiased).
    """
    x = images.permute(0, 3, 1, 2).float().mean(dim=1, keepdim=True)  # (N, 1, H, W)
    height, width = x.shape[2:]
    if height == width and height % SIDE == 0:
        x = functional.avg_pool2d(x, height // SIDE)  # (N, 1, 16, 16)
    else:
        x = functional.interpolate(x, size=(SIDE, SIDE), mode="bilinear", antialias=True)  # (N, 1, 16, 16)
    return (x - 127.5) / 127.5


def read_weights(path: Path = WEIGHTS_FILE) -> dict[str, Tensor]:
    """The state dict in the shipped file, in float32; its hash is checked. UserError for any other file."""
    from safetensors.torch import load

    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != WEIGHTS_SHA256:
        raise UserError(
            f"{path} has sha256 {digest[:12]}..., expected {WEIGHTS_SHA256[:12]}...: install this project again"
        )
    return {name: tensor.float() for name, tensor in load(data).items()}


class FashionMNISTFeatures:
    """The extractor; see `evaluators.features.FeatureExtractor` for the contract."""

    def __init__(self, spec: FeatureSpec, device: str = "cpu", batch_size: int = 256):
        self.spec = spec
        self.name, self.dim, self.description = spec.name, spec.dim, spec.description
        self.batch_size, self.device = batch_size, torch.device(device)
        # The description states the preprocessing, so it is part of the hash.
        self.sha256 = hashlib.sha256(f"{WEIGHTS_SHA256}\n{spec.description}".encode()).hexdigest()
        net = FashionMNISTCNN()
        net.load_state_dict(read_weights(), strict=True)
        self.net = net.eval().to(self.device)

    def __call__(self, images: np.ndarray) -> Features:
        return in_batches(lambda batch: self.net(preprocess(batch)), images, self.spec, self.batch_size, self.device)


def load(spec: FeatureSpec, device: str = "cpu") -> FashionMNISTFeatures:
    """The loader of the FeatureSpec."""
    return FashionMNISTFeatures(spec, device)
