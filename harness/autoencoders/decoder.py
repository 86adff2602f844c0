"""Autoencoders of latent diffusion in memory: what all of them do, whoever made their network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from harness.autoencoders.files import identity
from harness.errors import RunError, UserError
from harness.registry import unknown
from harness.spec import Compute

if TYPE_CHECKING:
    import torch
    from torch import nn

BATCH = 8  # batch size on an accelerator; a CPU is as fast with 1


@dataclass(frozen=True, kw_only=True)
class Decoder(ABC):
    """A loaded autoencoder, float32, without gradients.

    name: in records. kind: "kl" (diffusers' AutoencoderKL), "vq" (with a codebook) or "tokenizer" (of a package).
    scale_factor, shift_factor: a sampler's latents are (z - shift) x scale of the autoencoder's z. channels: of a latent.
    factor: pixels per latent cell, along a side. sha256: of the weights. config: arguments of the network. source: file, or
    repository and revision. notes: what was left out or assumed when it was loaded. batch: batch size of `decode` and
    `posterior`.
    """

    name: str
    kind: str
    scale_factor: float
    channels: int
    factor: int
    sha256: str
    config: Mapping[str, Any]
    source: str
    notes: tuple[str, ...]
    net: nn.Module
    batch: int
    shift_factor: float = 0.0
    entry: str = ""  # of the weight file, where another one than the usual was asked for

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the decoded images, for records; the path of the weights is no part of it."""
        return identity(self.name, self.sha256, self.scale_factor, self.shift_factor, self._settings(), self.entry)

    def _settings(self) -> Mapping[str, Any]:
        """The part of `config` that is hashed into the identity."""
        return self.config

    @property
    @abstractmethod
    def image_channels(self) -> int:
        """Channels of the images that it encodes and decodes."""

    @abstractmethod
    def compute(self, image_size: int = 256, direction: str = "decode") -> Compute:
        """Compute of one image of `image_size` pixels per side; its params are those of encoder and decoder."""

    @abstractmethod
    def _decode(self, z: torch.Tensor) -> torch.Tensor:
        """Latents z (n, C, h, w), unscaled, to images (n, image channels, H, W)."""

    @abstractmethod
    def _encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (n, image channels, H, W) to the mean and the standard deviation of z, (n, C, h, w) each, unscaled."""

    def gmacs(self, image_size: int = 256) -> float:
        """Billions of multiply-adds of decoding one image."""
        return self.compute(image_size).gmacs

    def decode(self, latents: object) -> torch.Tensor:
        """Latents of a sampler to images, float32 (N, image channels, factor h, factor w), clamped to [-1, 1].

        latents: floats (N, C, h, w), a tensor or an array. The images are inference tensors on the decoder's device.
        Autocast and TF32 are off. `batch` latents are decoded at a time. The default on a CPU is 1, so that the bits of
        an image do not depend on the others. RunError where an image is not finite.
        """
        import torch

        from harness.frameworks.torch_float32 import exact_float32

        z = torch.as_tensor(latents)
        if z.dim() != 4 or z.shape[1] != self.channels or not z.is_floating_point():
            raise UserError(
                f"decoder {self.name}: latents are {z.dtype} {tuple(z.shape)}; it takes float (N, {self.channels}, h, w)"
            )
        device = _device_of(self.net)
        images: list[torch.Tensor] = []
        with torch.inference_mode(), exact_float32(device.type):
            for part in z.split(self.batch) if len(z) else ():  # split gives one part of 0 latents for an empty z
                latent = part.to(device, torch.float32) / self.scale_factor + self.shift_factor  # (n, C, h, w)
                x = self._decode(latent)  # (n, image channels, H, W)
                finite = torch.isfinite(x).flatten(1).all(dim=1)  # (n,)
                if not finite.all():
                    at = sum(map(len, images)) + int(finite.int().argmin())  # index of the first one
                    raise RunError(
                        f"decoder {self.name}: image {at} of {len(z)} is not finite; check its latent and the weights"
                    )
                images.append(x.clamp(-1, 1))
            size = [side * self.factor for side in z.shape[2:]]
            none = torch.empty(0, self.image_channels, *size, device=device)
            return torch.cat(images) if images else none  # (N, image channels, H, W)

    def posterior(self, images: torch.Tensor) -> torch.Tensor:
        """Mean and standard deviation of the latents z of images, float32 (N, 2, C, h, w), neither shifted nor scaled.

        images: float32 (N, image channels, H, W) in [-1, 1], or uint8, which reach a GPU as such. Not for the kind "vq".
        diffusers clamps the log-variance to [-30, 20]. `batch` images are encoded at a time. RunError where a value is not
        finite.
        """
        import torch

        from harness.frameworks.torch_float32 import exact_float32
        from harness.frameworks.torch_transfer import to_device

        device = _device_of(self.net)
        moments = []
        with torch.inference_mode(), exact_float32(device.type):
            for part in images.split(self.batch):
                x = to_device(part, device).float()  # (n, image channels, H, W)
                if part.dtype == torch.uint8:
                    x = (x / 127.5 - 1).contiguous()
                mean, std = self._encode(x)
                mean_std = torch.stack([mean, std], dim=1)  # (n, 2, C, h, w)
                if not torch.isfinite(mean_std).all():
                    raise RunError(f"autoencoder {self.name}: a latent is not finite; check the weights")
                moments.append(mean_std)
        return torch.cat(moments)  # (N, 2, C, h, w)


def default_batch(device: str) -> int:
    """Batch size of an autoencoder where none is given: 1 on a CPU, else BATCH."""
    return 1 if device.startswith("cpu") else BATCH


def _device_of(net: nn.Module) -> torch.device:
    """The device of the weights; of a network without any, the CPU."""
    import torch

    tensor = next(chain(net.parameters(), net.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def check_compute_arguments(factor_: int, image_size: int, direction: str) -> None:
    """Raise UserError for a size that the factor does not divide, and for an unknown direction."""
    if image_size < 1 or image_size % factor_:
        raise UserError(f"image size {image_size} is not a multiple of the autoencoder's factor {factor_}")
    if direction not in ("decode", "encode"):
        raise UserError(unknown("direction", direction, ("decode", "encode")))


def count(name: str, net: nn.Module, call: Callable[[], object]) -> Compute:
    """Compute of a call of `net`, which is on the meta device. name: of the autoencoder, for messages."""
    import torch

    from harness.compute.meta_torch import FusedAttention, neutral_state
    from harness.compute.trace_torch import OperatorCounter, follow_modules

    counter = OperatorCounter(f"autoencoder {name}", uncounted_norms=())
    with neutral_state(), follow_modules(net, counter.modules), counter, FusedAttention(), torch.no_grad():
        call()
    params = sum(each.numel() for each in net.parameters())
    return Compute(params=params, rows=tuple(counter.rows), source="traced")
