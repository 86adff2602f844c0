"""Loading autoencoders of latent diffusion, and those whose weights are in files: their networks and their compute.

An autoencoder is named "ft-ema", "ft-mse" or "original" (Stable Diffusion's, as in DiT; diffusers' AutoencoderKL),
"vq-f4" or "vq-f8" (LDM's, which quantise the latent again when they decode it), by a path, or by the name of a package's
(`harness.autoencoders.tokenizer`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from backbones.autoencoders.layout import factor, infer_arguments
from backbones.autoencoders.spec import BY_NAME, KL_CONFIG, KNOWN, Known, diffusers_layout, kl_settings, own_tensors
from harness.autoencoders.decoder import Decoder, check_compute_arguments, count, default_batch
from harness.autoencoders.files import (
    find,
    identity,
    locate,
    open_autoencoder,
    record_name,
    refuse_files,
    resolve,
    scale_and_shift,
)
from harness.autoencoders.package import load_package_decoder, tokenizer_compute
from harness.autoencoders.tokenizer import Tokenizer
from harness.errors import UserError
from harness.spec import Compute
from harness.weights.files import open_weights, sha256, unchanged, unusual_entry
from harness.weights.folders import is_index
from harness.weights.tensors import all_finite, refuse_not_finite

if TYPE_CHECKING:
    import torch
    from torch import nn

logger = logging.getLogger(__name__)

FLAG = "--weights decoder=PATH"


@dataclass(frozen=True, kw_only=True)
class FileDecoder(Decoder):
    """An autoencoder whose weights are in a file: of the kind "kl" or "vq"."""

    @property
    def image_channels(self) -> int:
        return 3 if self.kind == "vq" else int(self.config.get("in_channels", 3))

    def compute(self, image_size: int = 256, direction: str = "decode") -> Compute:
        return traced_compute(self.kind, self.config, image_size=image_size, direction=direction)

    def _settings(self) -> Mapping[str, Any]:
        return kl_settings(self.config) if self.kind == "kl" else self.config

    def _decode(self, z: torch.Tensor) -> torch.Tensor:
        return _decode(self.kind, self.net, z)

    def _encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        posterior = _autoencoder(self.net).encode(x, return_dict=False)[0]  # of the kind "kl" alone
        return posterior.mean, posterior.std


def load_autoencoder(
    name: str,
    *,
    weights: str | Path | None = None,
    device: str = "cpu",
    flag: str = FLAG,
    entry: str | None = None,
) -> Decoder:
    """Load the autoencoder `name` from `weights` (a folder or file); None: from the path `name`, or from the hub.

    With `weights`, `name` still gives the name in records, beside the file's hash. The batch size is that of
    `default_batch`. flag: the option that messages recommend for naming a path. entry: of the weight file, where it has
    several that fit; None: as in `harness.weights.files.open_weights`. Nothing in the file is executed. UserError
    for what is missing, cannot be read or does not fit.
    """
    if isinstance(found := resolve(name), Tokenizer):
        if weights is not None or entry is not None:
            refuse_files(name, flag)
        return load_package_decoder(found, device)
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
    return FileDecoder(
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
        batch=default_batch(device),
        entry=unusual_entry(entry, partial(open_autoencoder, file)),
    )


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
        return count(kind, net, call)


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
