"""Loading autoencoders of latent diffusion, encoding and decoding with them, and their compute.

An autoencoder is named "ft-ema", "ft-mse" or "original" (Stable Diffusion's, as in DiT; diffusers' AutoencoderKL),
"vq-f4" or "vq-f8" (LDM's, which quantise the latent again when they decode it), by a path, or by the name of a package's
(`harness.autoencoders.tokenizer`).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from backbones.autoencoders.layout import factor, infer_arguments
from backbones.autoencoders.spec import BY_NAME, KL_CONFIG, KNOWN, Known, diffusers_layout, kl_settings, own_tensors
from harness import registry
from harness.autoencoders.files import (
    find,
    identity,
    locate,
    open_autoencoder,
    record_name,
    resolve,
    scale_and_shift,
)
from harness.autoencoders.tokenizer import Tokenizer
from harness.errors import RunError, UserError, one_line
from harness.registry import unknown
from harness.spec import Compute, load_attribute
from harness.weights.files import open_weights, sha256, unchanged, unusual_entry
from harness.weights.folders import is_index
from harness.weights.tensors import all_finite, refuse_not_finite

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

logger = logging.getLogger(__name__)

FLAG = "--weights decoder=PATH"
MAX_SPREAD = 10.0  # of latents of a package's autoencoder, which should have standard deviation 1
BATCH = 8  # batch size on an accelerator; a CPU is as fast with 1


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A loaded autoencoder, float32, without gradients.

    name: in records. kind: "kl" (diffusers' AutoencoderKL), "vq" (with a codebook) or "tokenizer" (of a package). scale_factor, shift_factor: a
    sampler's latents are (z - shift) x scale of the autoencoder's z. channels: of a latent. factor: pixels per latent
    cell, along a side. sha256: of the weight file. config: arguments of the network. source: file, or repository and
    revision. notes: what was left out or assumed when it was loaded. batch: batch size of `decode` and `posterior`.
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
        settings = kl_settings(self.config) if self.kind == "kl" else self.config
        return identity(self.name, self.sha256, self.scale_factor, self.shift_factor, settings, self.entry)

    @property
    def image_channels(self) -> int:
        """Channels of the images that it encodes and decodes."""
        if self.kind == "tokenizer":
            return int(self.config["image_channels"])
        return 3 if self.kind == "vq" else int(self.config.get("in_channels", 3))

    def compute(self, image_size: int = 256, direction: str = "decode") -> Compute:
        """Compute of one image of `image_size` pixels per side; its params are those of encoder and decoder."""
        if self.kind == "tokenizer":
            return tokenizer_compute(registry.autoencoders.get(self.name), image_size=image_size, direction=direction)
        return traced_compute(self.kind, self.config, image_size=image_size, direction=direction)

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
                x = _decode(self.kind, self.net, latent)  # (n, image channels, H, W)
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

        images: float32 (N, image channels, H, W) in [-1, 1]. Not for the kind "vq". diffusers clamps the log-variance to
        [-30, 20]. `batch` images are encoded at a time. RunError where a value is not finite.
        """
        import torch

        from harness.frameworks.torch_float32 import exact_float32

        device = _device_of(self.net)
        moments = []
        with torch.inference_mode(), exact_float32(device.type):
            for part in images.split(self.batch):
                if self.kind == "tokenizer":
                    mean, std = self._checked_posterior(part.to(device, torch.float32))
                else:
                    posterior = _autoencoder(self.net).encode(part.to(device, torch.float32), return_dict=False)[0]
                    mean, std = posterior.mean, posterior.std
                mean_std = torch.stack([mean, std], dim=1)  # (n, 2, C, h, w)
                if not torch.isfinite(mean_std).all():
                    raise RunError(f"autoencoder {self.name}: a latent is not finite; check the weights")
                moments.append(mean_std)
        return torch.cat(moments)  # (N, 2, C, h, w)

    def _checked_posterior(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean, standard deviation) of a package's encoder, (n, C, h, w) each; UserError for anything else."""
        import torch

        out = _autoencoder(self.net).encode(x)
        mean, std = out if isinstance(out, tuple) and len(out) == 2 else (out, None)
        shape = (len(x), self.channels, x.shape[2] // self.factor, x.shape[3] // self.factor)
        for value in (mean,) if std is None else (mean, std):
            if not isinstance(value, torch.Tensor) or tuple(value.shape) != shape or not value.is_floating_point():
                came = tuple(value.shape) if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
                raise UserError(f"autoencoder {self.name}: expected latents {shape} from encode, came {came}")
        return mean.float(), torch.zeros_like(mean, dtype=torch.float32) if std is None else std.float()

    def check_round_trip(self, images: np.ndarray) -> None:
        """Encode and decode images, uint8 (n, H, W, C), by a package's autoencoder; nothing for other kinds.

        Raises UserError where they do not come back within the `round_trip` that it states, and where latents are not of
        standard deviation 1 within a factor of MAX_SPREAD.
        """
        if self.kind != "tokenizer":
            return
        import torch

        x = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
        mean, std = self.posterior(x.contiguous()).unbind(1)
        back = self.decode(mean).cpu()
        if back.shape != x.shape:
            raise UserError(f"autoencoder {self.name}: images {tuple(x.shape)} come back as {tuple(back.shape)}")
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


def load_autoencoder(
    name: str,
    *,
    weights: str | Path | None = None,
    device: str = "cpu",
    flag: str = FLAG,
    entry: str | None = None,
) -> Decoder:
    """Load the autoencoder `name` from `weights` (a folder or file); None: from the path `name`, or from the hub.

    With `weights`, `name` still gives the name in records, beside the file's hash. The batch size is 1
    on a CPU, else BATCH. flag: the option that messages recommend for naming a path. entry: of the weight file, where it has several
    that fit; None: as in `harness.weights.files.open_weights`. Nothing in the file is executed. UserError
    for what is missing, cannot be read or does not fit.
    """
    if isinstance(found := resolve(name), Tokenizer):
        if weights is not None or entry is not None:
            raise UserError(f"decoder {name} is a package's and brings its own weights; leave out {flag}")
        return _load_tokenizer(found, device)
    known, path, source = find(name, weights, flag)
    config, file = locate(path, flag)
    tensors, notes, digest = read_tensors(file, entry)
    kind = "vq" if "quantize.embedding.weight" in tensors else "kl"
    if known is not None and kind != known.spec[:2]:  # names of specs begin with the kind: kl-f8, vq-f4
        words = {"vq": "a VQ autoencoder", "kl": "an autoencoder without a codebook"}
        raise UserError(f"{file} holds {words[kind]}, which {name} is not; choose the decoder that the latents are for")
    if kind == "vq":
        config = _vq_config(name, known, tensors, file)
        scale, shift, channels, factor_ = 1.0, 0.0, config["code_channels"], factor(config["multipliers"])
    else:
        if config is None:
            config = KL_CONFIG
            notes = (*notes, "no config.json: the sizes of Stable Diffusion's autoencoder were assumed")
        for key in ("block_out_channels", "layers_per_block", "latent_channels") if known is not None else ():
            if config.get(key) != KL_CONFIG[key]:
                raise UserError(
                    f"{file} is not {name}: its config.json has {key} {config.get(key)} instead of {KL_CONFIG[key]};"
                    " give it as a path, without a name"
                )
        scale, shift = scale_and_shift(config)
        # each level but the last halves the image's sides
        channels, factor_ = config.get("latent_channels", 4), 2 ** (len(config["block_out_channels"]) - 1)
        tensors = diffusers_layout(tensors, len(config["block_out_channels"]))
    for note in notes:
        logger.info("%s: %s", file.name, note)
    net = _build(kind, config, file)
    _fill(net, tensors, device, file)
    return Decoder(
        name=record_name(known, kind, digest),
        kind=kind,
        scale_factor=scale,
        shift_factor=shift,
        channels=channels,
        factor=factor_,
        sha256=digest,
        config=config,
        source=source,
        notes=notes,
        net=net,
        batch=1 if device.startswith("cpu") else BATCH,
        entry=unusual_entry(entry, partial(open_autoencoder, file)),
    )


def _load_tokenizer(tokenizer: Tokenizer, device: str) -> Decoder:
    """The autoencoder of a package. Its weights are hashed as they are in memory."""
    import torch

    net = _build_tokenizer(tokenizer)
    code = registry.autoencoders.code(tokenizer.name)
    digest = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        array = value.detach().cpu().contiguous()
        digest.update(f"{name} {array.dtype} {tuple(array.shape)}\0".encode())
        digest.update(array.flatten().view(torch.uint8).numpy().tobytes() if array.numel() else b"")
    return Decoder(
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
        batch=1 if device.startswith("cpu") else BATCH,
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
        raise UserError(f"autoencoder {tokenizer.name!r}: its builder failed: {one_line(error)}") from error
    if not isinstance(net, torch.nn.Module):
        raise UserError(
            f"autoencoder {tokenizer.name!r}: its builder gave a {type(net).__name__}, not a torch.nn.Module"
        )
    return net.eval().requires_grad_(False)


def tokenizer_compute(tokenizer: Tokenizer, *, image_size: int = 256, direction: str = "decode") -> Compute:
    """As `traced_compute`, of a package's autoencoder."""
    import torch

    check_compute_arguments(tokenizer.factor, image_size, direction)
    side, channels = image_size, tokenizer.image_channels
    if direction == "decode":
        side, channels = image_size // tokenizer.factor, tokenizer.channels
    net = _build_tokenizer(tokenizer).to("meta")
    method = _autoencoder(net).decode if direction == "decode" else _autoencoder(net).encode
    return _count(tokenizer.name, net, lambda: method(torch.zeros(1, channels, side, side, device="meta")))


def _device_of(net: nn.Module) -> torch.device:
    """The device of the weights; of a network without any, the CPU."""
    import torch

    tensor = next(chain(net.parameters(), net.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def read_identity(name: str, flag: str, entry: str | None = None) -> dict[str, Any]:
    """`Decoder.identity` of the AutoencoderKL `name`, computed from its files without loading it; of a package's
    autoencoder, which is built for it.

    entry: of the weight file, as for `load_autoencoder`. The kind is not checked: for an autoencoder with a codebook, the
    result is different from all decoders' identities.
    """
    if isinstance(resolve(name), Tokenizer):
        return load_autoencoder(name, entry=entry).identity
    known, path, _ = find(name, None, flag)
    config, file = locate(path, flag)
    config = KL_CONFIG if config is None else config
    digest = sha256(file) if not is_index(file) else open_weights(file).sha256()
    recorded, found = record_name(known, "kl", digest), unusual_entry(entry, partial(open_autoencoder, file))
    return identity(recorded, digest, *scale_and_shift(config), kl_settings(config), found)


def decoder_compute(name: str, image_size: int = 256, direction: str = "decode") -> Compute:
    """Compute of a known decoder in closed form, without its weights and without a framework.

    direction: "decode" or "encode". UserError for a path: such a decoder is counted after loading (`Decoder.compute`).
    """
    found = resolve(name)
    if isinstance(found, Tokenizer):
        return tokenizer_compute(found, image_size=image_size, direction=direction)
    if isinstance(found, Path):
        raise UserError(f"decoder {name} is a path; only {', '.join(KNOWN)} are counted without loading them")
    return BY_NAME[found.spec].count(direction, image_size)


def traced_compute(
    kind: str, config: Mapping[str, Any], *, image_size: int = 256, direction: str = "decode"
) -> Compute:
    """Compute of one image, counted operator by operator on the meta device; its parts are paths of modules.

    kind, config: as of `Decoder`. image_size: pixels per side. direction: "decode" or "encode".
    """
    import torch

    from harness.compute.meta_torch import neutral_state

    if kind == "vq":
        factor_ = factor(config["multipliers"])
        latent_channels, image_channels = config["code_channels"], config["image_channels"]
    else:
        factor_ = 2 ** (len(config["block_out_channels"]) - 1)
        latent_channels, image_channels = config.get("latent_channels", 4), config.get("in_channels", 3)
    check_compute_arguments(factor_, image_size, direction)

    def call() -> None:
        if direction == "decode":
            latent_side = image_size // factor_
            _decode(kind, net, torch.zeros(1, latent_channels, latent_side, latent_side, device="meta"))
        else:
            _encode(kind, net, torch.zeros(1, image_channels, image_size, image_size, device="meta"))

    with neutral_state():
        net = _build(kind, config, Path("config"))  # there is no such file: the path is only for messages
        return _count(kind, net, call)


def check_compute_arguments(factor_: int, image_size: int, direction: str) -> None:
    """Raise UserError for a size that the factor does not divide, and for an unknown direction."""
    if image_size < 1 or image_size % factor_:
        raise UserError(f"image size {image_size} is not a multiple of the autoencoder's factor {factor_}")
    if direction not in ("decode", "encode"):
        raise UserError(unknown("direction", direction, ("decode", "encode")))


def _count(name: str, net: nn.Module, call: Callable[[], object]) -> Compute:
    """Compute of a call of `net`, which is on the meta device. name: of the autoencoder, for messages."""
    import torch

    from harness.compute.meta_torch import FusedAttention, neutral_state
    from harness.compute.trace_torch import OperatorCounter, follow_modules

    counter = OperatorCounter(f"autoencoder {name}", uncounted_norms=())
    with neutral_state(), follow_modules(net, counter.modules), counter, FusedAttention(), torch.no_grad():
        call()
    params = sum(each.numel() for each in net.parameters())
    return Compute(params=params, rows=tuple(counter.rows), source="traced")


class _Autoencoder(Protocol):
    """Methods that both kinds of networks have; their arguments and results differ (see `_decode` and `_encode`)."""

    def encode(self, x: torch.Tensor, **options: bool) -> Any: ...
    def decode(self, z: torch.Tensor, **options: bool) -> Any: ...


def _autoencoder(net: nn.Module) -> _Autoencoder:
    """`net` itself, with the types of its methods, which nn.Module does not declare."""
    return cast("_Autoencoder", net)


def _decode(kind: str, net: nn.Module, z: torch.Tensor) -> torch.Tensor:
    """Latents z (n, C, h, w), unscaled, to images (n, image channels, H, W)."""
    autoencoder = _autoencoder(net)
    return autoencoder.decode(z, return_dict=False)[0] if kind == "kl" else autoencoder.decode(z)


def _encode(kind: str, net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Images (n, image channels, H, W) to latents z (n, C, h, w), unscaled; of the kind "kl" the mode of the posterior."""
    autoencoder = _autoencoder(net)
    return autoencoder.encode(x) if kind == "vq" else autoencoder.encode(x, return_dict=False)[0].mode()


def read_tensors(path: Path, entry: str | None = None) -> tuple[dict[str, torch.Tensor], tuple[str, ...], str]:
    """(the autoencoder's tensors by name; notes on what was left out; SHA-256 of the file).

    Of an LDM's checkpoint only the first stage is read. entry: of the file, as for `load_autoencoder`. Nothing in the file
    is executed. UserError for values that are not finite.
    """
    from harness.weights.load import as_torch

    weights = open_autoencoder(path, entry)
    weights.refuse_code()
    stored, notes = own_tensors(weights.tensors, path)
    with unchanged(weights):
        arrays = {name: tensor.read() for name, tensor in stored.items()}
        digest = weights.sha256()
    for name, array in arrays.items():
        if not all_finite(array, stored[name].dtype):
            refuse_not_finite(path, name)
    return (
        {name: as_torch(array, stored[name].dtype) for name, array in arrays.items()},
        (
            *weights.notes,
            *notes,
        ),
        digest,
    )


def _vq_config(name: str, known: Known | None, tensors: Mapping[str, torch.Tensor], path: Path) -> dict[str, Any]:
    """The arguments of a VQ network, inferred from shapes; UserError where they are not those of `known`."""
    try:
        config = infer_arguments({key: tuple(value.shape) for key, value in tensors.items()})
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} is not a complete VQ autoencoder: {error} is missing or of another shape") from error
    if known is not None and (wanted := BY_NAME[known.spec].defaults) != config:
        key = next(key for key in wanted if wanted[key] != config[key])
        fits = [each.name for each in BY_NAME.values() if each.defaults == config]
        hint = f"it is {fits[0]}" if fits else "give it as a path, without a name"
        raise UserError(f"{path} is not {name}: {key} is {config[key]} instead of {wanted[key]}; {hint}")
    return config


def _build(kind: str, config: Mapping[str, Any], path: Path) -> nn.Module:
    """The network on the meta device. path: the weight file; messages name the config.json beside it."""
    import torch

    with torch.device("meta"):
        if kind == "vq":
            from backbones.autoencoders.vq_torch import VQAutoencoder

            return VQAutoencoder(**config).eval()
        from harness.frameworks.torchvision import make_importable

        make_importable()  # before diffusers imports torchvision, which fails beside a torch that it was not built for
        try:
            from diffusers import AutoencoderKL
        except ImportError as error:
            raise UserError(
                "Stable Diffusion's autoencoder needs: pip install 'backbone-harness[diffusers]'"
            ) from error
        except RuntimeError as error:  # of an optional package that diffusers imports, such as torchvision
            reason = str(error).splitlines()[-1]
            raise UserError(
                f"diffusers is installed, but cannot be imported ({reason}); fix or remove the package that fails"
            ) from error
        try:
            net: nn.Module = AutoencoderKL.from_config(dict(config)).eval()
            return net
        except Exception as error:  # of any kind: the config came from a file
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(f"{path.parent / 'config.json'} gives no network ({reason}); get it again") from error


def _fill(net: nn.Module, tensors: Mapping[str, torch.Tensor], device: str, path: Path) -> None:
    """Move `net` from the meta device to `device`, in place, and load the tensors as float32, without gradients.

    UserError unless names and shapes are those of the network. path: used in messages.
    """
    wanted = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    for problem, names in (
        ("is missing", [name for name in wanted if name not in tensors]),
        ("is unexpected", [name for name in tensors if name not in wanted]),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise UserError(
                f"{path}: {names[0]}{more} {problem}; these are not the weights of this autoencoder, or the file was cut"
            )
    for name, shape in wanted.items():
        if tuple(tensors[name].shape) != shape:
            raise UserError(f"{path}: {name} is {tuple(tensors[name].shape)} where the network has {shape}")
    net.to_empty(device=device)
    net.load_state_dict(tensors, strict=True)
    net.requires_grad_(False)
