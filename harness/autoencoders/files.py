"""The files of an autoencoder: which name means which file, and what config and weights say without a framework."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from backbones.autoencoders.spec import FIRST_STAGE, KNOWN, WEIGHTS, Known
from harness import registry
from harness.autoencoders.tokenizer import Tokenizer
from harness.errors import UserError
from harness.io import files
from harness.registry import unknown
from harness.weights.files import WeightFile, open_weights
from harness.weights.folders import known_file
from harness.weights.holders import is_average

DIFFUSERS_FILE = re.compile(
    r"diffusion_pytorch_model(\.[A-Za-z0-9_]+)?\.(safetensors|bin)(\.index(\.[A-Za-z0-9_]+)?\.json)?"
)  # with or without a variant, or the index of several parts

# Tensors of all autoencoders, in the public layout and in diffusers'
MARKS = tuple(
    f"{side}coder.{name}.{kind}"
    for side in ("en", "de")
    for name in ("conv_in", "conv_out")
    for kind in ("weight", "bias")
)

# Stable Diffusion's scaling_factor, about 1 / the standard deviation of its latents; used if a config has none
SCALE_KL = 0.18215


def resolve(name: str) -> Known | Tokenizer | Path:
    """The known autoencoder with the short name `name`, else a package's of that name, else the path `name` if it exists,
    else the known autoencoder with the repository `name`; UserError if it is none of these.

    A short name has precedence over a file of that name; write ./NAME for the file. Imports no framework.
    """
    if name in KNOWN:
        return KNOWN[name]
    if name in registry.autoencoders:
        return registry.autoencoders.get(name)
    path = Path(name).expanduser()
    if path.exists():
        return path
    by_repository = {each.repository: each for each in KNOWN.values() if each.repository}
    if name in by_repository:
        return by_repository[name]
    if os.sep in name or path.suffix:
        raise UserError(f"decoder {name}: no such file or folder; give an existing path or one of {', '.join(KNOWN)}")
    raise UserError(
        f"{unknown('decoder', name, [*KNOWN, *registry.autoencoders.names()])} (or give a path; no file or folder has that name)"
    )


def find(name: str, weights: str | Path | None, flag: str) -> tuple[Known | None, Path, str]:
    """(known autoencoder, or None for a path; folder or file of its weights; their source for records).

    name: as for `resolve`, not of a package's autoencoder, which has no files of its own. weights: folder or file with the weights of a known autoencoder; None: they come from the
    hub or its cache. flag: the option that messages recommend for naming a path.
    """
    found = resolve(name)
    assert not isinstance(found, Tokenizer)
    if isinstance(found, Path):
        if weights is not None:
            raise UserError(f"decoder {name} is a path already; leave out {flag} or give one of {', '.join(KNOWN)}")
        return None, found, str(found)
    if weights is not None:
        return found, Path(weights).expanduser(), str(weights)
    if found.repository:
        return found, *_from_hub(name, found, flag)
    raise UserError(f"decoder {name} needs its weights: get {found.place} and name the file with {flag}")


def _from_hub(name: str, known: Known, flag: str) -> tuple[Path, str]:
    """(folder in the hub's cache with config and weights; "repository@revision"). It is fetched if it is not in the cache."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
        from huggingface_hub.utils import logging
    except ImportError as error:
        raise UserError(f"decoder {name} needs diffusers; run: pip install 'backbone-harness[diffusers]'") from error

    def cache_folder(local: bool) -> Path:  # local: only look into the cache
        def fetch(file: str) -> Path:
            subfolder = known.subfolder or None
            return Path(str(hf_hub_download(known.repository, file, subfolder=subfolder, local_files_only=local)))

        config = fetch("config.json")
        try:
            fetch(WEIGHTS[0])
        except EntryNotFoundError as error:  # no such file in the repository, or in the cache if `local`
            # LocalEntryNotFoundError is a subclass; if not `local`, it means that there is no connection.
            if isinstance(error, LocalEntryNotFoundError) and not local:
                raise
            fetch(WEIGHTS[1])
        return config.parent

    verbosity = logging.get_verbosity()
    try:
        found = cache_folder(local=True)  # the cache first: a connection is needed only once
    except LocalEntryNotFoundError:
        try:
            logging.set_verbosity_error()  # the client would print each of five retries
            found = cache_folder(local=False)
        except Exception as error:  # of the client, the network or the disk
            reason = str(error).strip() or type(error).__name__
            raise UserError(
                f"decoder {name}: {known.repository} is not in the cache and was not fetched"
                f" ({reason.splitlines()[0].rstrip('.')}); get {known.place} into a folder and name it with {flag}"
            ) from error
        finally:
            logging.set_verbosity(verbosity)
    parts = found.parts  # (..., "snapshots", revision, ...)
    revision = f"@{parts[parts.index('snapshots') + 1]}" if "snapshots" in parts else ""
    return found, f"{known.repository}{revision}"


def locate(path: Path, flag: str) -> tuple[dict[str, Any] | None, Path]:
    """(config.json of diffusers or None, weight file) of a folder or file; for a pipeline's folder, those in its folder vae.

    The config is checked, without diffusers' private keys. It is None for a file that is not named as diffusers names
    weights, or that has no config.json beside it.
    """
    if path.is_dir():
        folder = path / "vae" if (path / "vae" / "config.json").is_file() else path
        file = known_file(folder)
        if file is None or not DIFFUSERS_FILE.fullmatch(file.name):
            raise UserError(
                f"{path} holds no {' or '.join(WEIGHTS)}; give the folder that save_pretrained wrote, or a file"
            )
        if not (folder / "config.json").is_file():
            raise UserError(
                f"{folder} has no config.json; get the one that belongs to {file.name}, or name the file alone"
            )
    elif path.is_file():
        folder, file = path.parent, path
    else:
        raise UserError(f"{path}: no such file or folder; {flag} takes an autoencoder's folder or weight file")
    if not DIFFUSERS_FILE.fullmatch(file.name) or not (folder / "config.json").is_file():
        return None, file
    config = files.read_json(folder / "config.json", "autoencoder config")
    kind = config.get("_class_name") if isinstance(config, dict) else None
    if kind != "AutoencoderKL":
        raise UserError(f"{folder / 'config.json'} describes {kind or 'no network'}; wanted diffusers' AutoencoderKL")
    for key in ("latents_mean", "latents_std"):
        if config.get(key) is not None:
            raise UserError(f"{folder / 'config.json'} has a {key}, which is not supported; use another autoencoder")
    scale = config.get("scaling_factor", SCALE_KL)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < float("inf"):
        raise UserError(f"{folder / 'config.json'}: scaling_factor is {scale!r}; it must be a number above 0")
    shift = config.get("shift_factor") or 0.0  # diffusers writes null for no shift
    if isinstance(shift, bool) or not isinstance(shift, (int, float)) or not abs(shift) < float("inf"):
        raise UserError(f"{folder / 'config.json'}: shift_factor is {shift!r}; it must be a number")
    if not isinstance(config.get("block_out_channels"), list):
        raise UserError(f"{folder / 'config.json'} has no list of block_out_channels; get it again")
    # the other keys with an underscore are diffusers' book-keeping, which differs between copies of one autoencoder
    return {key: value for key, value in config.items() if key == "_class_name" or not key.startswith("_")}, file


def open_autoencoder(file: Path, entry: str | None = None) -> WeightFile:
    """The weights of an autoencoder in `file`, or the whole checkpoint of an LDM. entry: as for `open_weights`."""
    try:
        weights = open_weights(file, entry=entry)
        if any(name.startswith(FIRST_STAGE) for name in weights.tensors):
            return weights
        beside_averages = any(is_average([name.partition(".")[0]]) for name in weights.tensors)
        if any(name.startswith("decoder.") for name in weights.tensors) and not beside_averages:
            return weights
    except UserError:  # several dictionaries may fit, of which only one is an autoencoder
        pass
    return open_weights(file, entry=entry, markings=[MARKS])


def check_weights(name: str, flag: str, entry: str | None = None) -> None:
    """Raise UserError where the weight file of the autoencoder `name`, a path, cannot be read at `entry`.

    Reads names and shapes alone. A known autoencoder's files are not looked for. flag: the option that messages recommend.
    """
    found = resolve(name)
    if isinstance(found, Path):
        open_autoencoder(locate(found, flag)[1], entry)
    elif isinstance(found, Tokenizer) and entry is not None:
        refuse_files(name, flag)


def refuse_files(name: str, flag: str) -> NoReturn:
    """Raise UserError for files that are given to a package's autoencoder."""
    raise UserError(f"decoder {name} is a package's and brings its own weights; leave out {flag}")


def scale_and_shift(config: Mapping[str, Any]) -> tuple[float, float]:
    """(scale, shift) of an AutoencoderKL: a sampler's latents are (z - shift) x scale of the autoencoder's z."""
    shift = config.get("shift_factor") or 0.0  # diffusers writes null for no shift
    return float(config.get("scaling_factor", SCALE_KL)), float(shift)


def record_name(known: Known | None, kind: str, sha256: str) -> str:
    """Name of the autoencoder in records. kind: "kl" or "vq". sha256: of the weight file."""
    return known.record_name if known is not None else f"{'vae' if kind == 'kl' else 'vq'}-{sha256[:12]}"


def identity(
    name: str, sha256: str, scale: float, shift: float, settings: Mapping[str, Any], entry: str = ""
) -> dict[str, Any]:
    """`Decoder.identity`: what decides the decoded images, for records; the path of the weights is no part of it.

    sha256: of the weight file. settings: the arguments of the network that are hashed. entry: as of `Decoder`.
    """
    config_sha256 = files.sha256_json(dict(settings))  # no weight shows the activation or the number of groups
    return _identity(name, sha256, scale, shift, config_sha256, entry)


def identity_behind_latents(latents: Mapping[str, Any], name: str) -> dict[str, Any]:
    """`Decoder.identity` of the AutoencoderKL that made `latents`, even if its files no longer exist.

    latents: `harness.data.latents.Meta.identity`, from a run's identity. name: the path or name that loads it.
    """
    try:
        found = resolve(name)
    except UserError:  # a path that no longer exists
        found = Path(name)
    sha256 = str(latents["vae_sha256"])
    if isinstance(found, Tokenizer):
        recorded = found.name
    else:
        recorded = record_name(found if isinstance(found, Known) else None, "kl", sha256)
    return _identity(
        recorded, sha256, latents["scale_factor"], latents["shift_factor"], str(latents["vae_config_sha256"]),
        latents.get("vae_entry", ""),
    )  # fmt: skip


def _identity(name: str, sha256: str, scale: float, shift: float, config_sha256: str, entry: str) -> dict[str, Any]:
    """The dictionary that `identity` returns; without a shift_factor of 0, and without an empty entry."""
    return {
        "name": name,
        "weights_sha256": sha256,
        "scale_factor": scale,
        **({"shift_factor": shift} if shift else {}),
        "config_sha256": config_sha256,
        **({"entry": entry} if entry else {}),
    }
