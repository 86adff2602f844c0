"""Autoencoders of packages (`harness.autoencoders.tokenizer`) in memory. Their code may raise or return anything."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness import registry
from harness.autoencoders.decoder import Decoder, check_compute_arguments, count, default_batch
from harness.autoencoders.tokenizer import Tokenizer
from harness.errors import RunError, UserError, one_line
from harness.spec import Compute, load_attribute

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

logger = logging.getLogger(__name__)

MAX_SPREAD = 10.0  # of latents, which should have standard deviation 1


@dataclass(frozen=True, kw_only=True)
class PackageDecoder(Decoder):
    """The autoencoder of a package, with checks of what its functions return."""

    @property
    def image_channels(self) -> int:
        return int(self.config["image_channels"])

    def compute(self, image_size: int = 256, direction: str = "decode") -> Compute:
        return tokenizer_compute(registry.autoencoders.get(self.name), image_size=image_size, direction=direction)

    def _decode(self, z: torch.Tensor) -> torch.Tensor:
        out = _call_package(self.name, self.net, "decode", z)
        shape = (len(z), self.image_channels, z.shape[2] * self.factor, z.shape[3] * self.factor)
        return _checked(self.name, "decode", out, shape)

    def _encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        out = _call_package(self.name, self.net, "encode", x)
        mean, std = out if isinstance(out, tuple) and len(out) == 2 else (out, None)
        shape = (len(x), self.channels, x.shape[2] // self.factor, x.shape[3] // self.factor)
        mean = _checked(self.name, "encode", mean, shape)
        std = torch.zeros_like(mean) if std is None else _checked(self.name, "encode", std, shape)
        return mean, std

    def check_round_trip(self, images: np.ndarray) -> None:
        """Encode and decode images, uint8 (n, H, W, C).

        Raises UserError where they do not come back within the `round_trip` that it states, and where latents are not of
        standard deviation 1 within a factor of MAX_SPREAD.
        """
        import torch

        x = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
        mean, std = self.posterior(x.contiguous()).unbind(1)
        back = self.decode(mean).cpu()
        error = float((back - x).square().mean().sqrt())
        limit = registry.autoencoders.get(self.name).round_trip
        if error > limit:
            raise UserError(
                f"autoencoder {self.name}: images come back with an error of {error:.3g} (root mean square, of images in [-1, 1]), "
                f"and its round_trip is {limit:g}: does decode undo the normalisation of encode?"
            )
        spread = float((mean.var(correction=0) + std.square().mean()).sqrt())
        if not 1 / MAX_SPREAD < spread < MAX_SPREAD:
            raise UserError(
                f"autoencoder {self.name}: latents have the standard deviation {spread:.3g}, and encode must scale them to "
                "about 1, as diffusion needs"
            )
        logger.info(
            f"autoencoder {self.name}: round trip {error:.3g} (limit {limit:g}), latents of spread {spread:.3g}"
        )


def load_package_decoder(tokenizer: Tokenizer, device: str) -> PackageDecoder:
    """The autoencoder of a package. Its weights are hashed as they are in memory."""
    import torch

    net = _build_tokenizer(tokenizer)
    code = registry.autoencoders.code(tokenizer.name)
    digest = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        array = value.detach().cpu().contiguous()
        digest.update(f"{name} {array.dtype} {tuple(array.shape)}\0".encode())
        digest.update(array.flatten().view(torch.uint8).numpy().tobytes() if array.numel() else b"")
    return PackageDecoder(
        name=tokenizer.name,
        kind="tokenizer",
        scale_factor=1.0,  # its own affair
        channels=tokenizer.channels,
        factor=tokenizer.factor,
        sha256=digest.hexdigest(),
        config={
            "tokenizer": tokenizer.name,
            "image_channels": tokenizer.image_channels,
            "code_sha256": None if code is None else code.sha256,
        },
        source=tokenizer.name,
        notes=(),
        net=net.to(device),
        batch=default_batch(device),
    )


def _build_tokenizer(tokenizer: Tokenizer) -> nn.Module:
    """The network of a package's autoencoder with its weights. Raises UserError in one line for every error of its code."""
    import torch

    builder = load_attribute(tokenizer.builder, f"builder of autoencoder {tokenizer.name!r}")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = builder()
    except (UserError, RunError, MemoryError):
        raise
    except Exception as error:  # other people's code can raise anything
        raise UserError(f"{_named(tokenizer.name)}: its builder failed: {one_line(error)}") from error
    if not isinstance(net, torch.nn.Module):
        raise UserError(f"{_named(tokenizer.name)}: its builder gave a {type(net).__name__}, not a torch.nn.Module")
    return net.eval().requires_grad_(False)


def _named(name: str) -> str:
    """A package's autoencoder with its distribution, for messages."""
    return f"autoencoder {name!r} of {registry.autoencoders.owner(name)}"


def _call_package(name: str, net: nn.Module, function: str, x: torch.Tensor) -> Any:
    """What `function` ("encode" or "decode") of a package's network returns for x.

    Raises UserError in one line, with the distribution and the function, for every error of its code.
    """
    import torch

    try:
        return getattr(net, function)(x)
    except (UserError, RunError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # other people's code can raise anything
        raise UserError(f"{_named(name)}: its {function} failed: {one_line(error)}") from error


def _checked(name: str, function: str, value: object, shape: tuple[int, ...]) -> torch.Tensor:
    """`value`, which `function` of a package returned, in float32; UserError unless it is floats of this shape."""
    import torch

    if not isinstance(value, torch.Tensor) or tuple(value.shape) != shape or not value.is_floating_point():
        came = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
        what = "latents" if function == "encode" else "images"
        raise UserError(f"{_named(name)}: expected {what} {shape} of floats from {function}, came {came}")
    return value.float()


def tokenizer_compute(tokenizer: Tokenizer, *, image_size: int = 256, direction: str = "decode") -> Compute:
    """As `traced_compute`, of a package's autoencoder."""
    import torch

    check_compute_arguments(tokenizer.factor, image_size, direction)
    side, channels = image_size, tokenizer.image_channels
    if direction == "decode":
        side, channels = image_size // tokenizer.factor, tokenizer.channels
    net, name = _build_tokenizer(tokenizer).to("meta"), tokenizer.name
    x = torch.zeros(1, channels, side, side, device="meta")
    return count(name, net, lambda: _call_package(name, net, direction, x))
