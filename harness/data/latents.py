"""Caches of latents: a data set encoded by an autoencoder, which training maps and never reads as a whole.

    DIR/latents.npy   float32 (N, 2, 2, C, h, w). Axis 1: the image, its mirror image. Axis 2: mean and standard
                      deviation of the posterior, as the autoencoder gives them: neither shifted nor scaled
    DIR/labels.npy    int64 (N,)
    DIR/meta.json     `Meta`: images, autoencoder, and a hash of every chunk

The encoding of the mirrored image is stored because it is not the mirrored latent. float16 would be too coarse: the
means of Stable Diffusion's autoencoder reach 8 and more, where neighbouring float16 numbers are 1/128 apart, and the
standard deviations of its posterior are about as small. ImageNet's latents at 256 pixels are 84 GB, at 512 pixels 336 GB.

`harness data latents` (`harness.data.encode`) makes the folder; latents.npy and meta.json get their names when they are
complete. Chunks and their hashes are those of prepared data sets (`harness.data.prepared`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from backbones.autoencoders.spec import KL_CONFIG
from harness import registry
from harness.data.examples import Normal
from harness.data.prepared import CHUNK_IMAGES, chunk_count, chunk_sha256, is_prepared
from harness.errors import UserError
from harness.images.source import readable
from harness.io import files
from harness.io.arrays import prefetch
from harness.io.progress import Bar

if TYPE_CHECKING:
    from harness.protocols import Protocol

SCHEMA = 1
LATENTS, LABELS, META = "latents.npy", "labels.npy", "meta.json"
DTYPE = np.dtype("<f4")
EDITED = "contradicts its own hash: edited or damaged; make the latents again"


@dataclass(frozen=True, kw_only=True)
class Meta:
    """The content of meta.json.

    images: name, sha256, resolution and crop of the data set. vae: `Decoder.identity` of the autoencoder. shape: of
    latents.npy. chunks: `chunk_sha256` of each CHUNK_IMAGES images, hexadecimal. source_paths: paths or names of
    "images" and "vae" ("places" in the file); no part of the identity. environment: software and device that made it.
    """

    images: dict[str, Any]
    vae: dict[str, Any]
    shape: tuple[int, int, int, int, int, int]
    chunks: tuple[str, ...]
    source_paths: dict[str, str] = dataclasses.field(default_factory=dict)
    environment: Mapping[str, object] = dataclasses.field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """Content hash of latents and labels."""
        return files.sha256_json({"shape": self.shape, "chunk_images": CHUNK_IMAGES, "chunks": self.chunks})

    @property
    def identity(self) -> dict[str, Any]:
        """The part of a run's identity that the latents add to that of the images: hashes and numbers, no names."""
        vae = {"vae_sha256": self.vae["weights_sha256"], "vae_config_sha256": self.vae["config_sha256"]}
        entry = {"vae_entry": self.vae["entry"]} if "entry" in self.vae else {}
        return {**vae, **entry, "scale_factor": self.scale, "shift_factor": self.shift, "sha256": self.sha256}

    @property
    def scale(self) -> float:
        """The network learns (z - shift) x scale of the autoencoder's latents z."""
        return float(self.vae["scale_factor"])

    @property
    def shift(self) -> float:
        """See `scale`."""
        return float(self.vae.get("shift_factor", 0.0))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape of a latent, (C, h, w)."""
        return self.shape[3:]

    def write(self, folder: Path) -> None:
        """Write meta.json, atomically."""
        document = {
            "schema": SCHEMA,
            "sha256": self.sha256,
            "dtype": "float32",
            "chunk_images": CHUNK_IMAGES,
            "images": self.images,
            "vae": self.vae,
            "shape": self.shape,
            "chunks": self.chunks,
            "places": self.source_paths,
            "environment": self.environment,
        }
        files.write_json(folder / META, document)


@dataclass(frozen=True, kw_only=True)
class LatentSet:
    """An open cache of latents; implements `Examples`.

    latents: float32 (N, 2, 2, C, h, w), mapped read-only; axes as in latents.npy. labels: int64 (N,).
    """

    meta: Meta
    latents: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def name(self) -> str:
        return str(self.meta.images["name"])

    @property
    def identity(self) -> dict[str, Any]:
        return {"dataset_sha256": self.meta.images["sha256"], "latents": self.meta.identity}

    @property
    def source_paths(self) -> dict[str, str]:
        return self.meta.source_paths

    def check(self, protocol: Protocol) -> None:
        """UserError for latents of another size than the protocol's network takes, and for images of another resolution."""
        if (problem := _mismatch(self.meta, protocol)) is not None:
            raise UserError(problem)

    def gather(self, rows: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
        """Mean and standard deviation of the posteriors, float32 (n, 2, C, h, w), a copy.

        rows: images, int64 (n,). mirrored: where to take the mirror image instead, bool (n,).
        """
        # (2N, 2, C, h, w), the same map: image i is row 2i, its mirror image row 2i + 1
        views = self.latents.reshape(-1, *self.latents.shape[2:])
        view_rows, nbytes = 2 * rows + mirrored, views[0].nbytes
        prefetch(self.latents, view_rows * nbytes, nbytes)  # three times as fast from the disk
        return views[view_rows]

    def to_model_input(self, stored: Any, normal: Normal) -> Any:
        """float32 (n, 2, C, h, w) to float32 (n, C, h, w): a sample of each posterior, shifted and scaled."""
        mean, std = stored[:, 0], stored[:, 1]
        return (mean + std * normal(tuple(mean.shape[1:])) - self.meta.shift) * self.meta.scale


def is_cache(folder: Path) -> bool:
    """Whether `folder` looks like a cache of latents, complete or not."""
    return any((folder / name).exists() for name in (LATENTS, f"{LATENTS}{files.PARTIAL}"))


def read_meta(folder: Path) -> Meta:
    """The meta.json of a cache; UserError for another folder, an incomplete cache and a document that contradicts itself."""
    path = folder / META
    if is_cache(folder) and not path.exists():
        raise UserError(f"{folder} is not complete: repeat the `harness data latents` command that began it")
    if not (is_cache(folder) and (folder / LABELS).is_file()):
        raise UserError(
            f"{folder} is no cache of latents; `harness data latents IMAGES --vae NAME --out DIR` makes one"
        )
    data = files.read_json(path, "latents file")
    try:
        if data["schema"] > SCHEMA:
            raise UserError(f"{path} was written by a newer harness (schema {data['schema']}); update this one")
        shape = tuple(int(side) for side in data["shape"])
        if len(shape) != 6:
            raise UserError(f"{path} {EDITED}")
        meta = Meta(
            images=dict(data["images"]),
            vae=dict(data["vae"]),
            shape=shape,
            chunks=tuple(str(sha256) for sha256 in data["chunks"]),
            source_paths=dict(data["places"]),
            environment=dict(data["environment"]),
        )
        sound = (
            min(meta.shape) > 0
            and meta.shape[1:3] == (2, 2)
            and data["chunk_images"] == CHUNK_IMAGES
            and len(meta.chunks) == chunk_count(meta.shape[0])
            and data["sha256"] == meta.sha256
            and bool(meta.identity)  # KeyError where an item of `vae` is missing
            and {"name", "sha256", "resolution"} <= set(meta.images)
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):  # a ValueError, too
            raise
        raise UserError(f"{path} is not a latents file of this harness ({type(error).__name__}: {error})") from error
    if not sound:
        raise UserError(f"{path} {EDITED}")
    return meta


def load(folder: Path) -> LatentSet:
    """The cache in `folder`, mapped: only labels and meta.json are read."""
    meta = read_meta(folder)
    latents = _map_array(folder / LATENTS, DTYPE, meta.shape)
    labels = np.array(_map_array(folder / LABELS, np.dtype("<i8"), meta.shape[:1]))  # copied into memory
    return LatentSet(meta=meta, latents=latents, labels=labels)


def _map_array(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """The npy at `path`, mapped read-only; UserError unless it has this dtype and shape."""
    with readable(path):
        array = np.lib.format.open_memmap(path, mode="r")  # np.load would also open a zip, which is no array
    if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
        raise UserError(
            f"{path} is {array.dtype} {array.shape} where {META} says {dtype} {shape}; make the latents again"
        )
    return array


def missing(folder: Path | None, protocol: Protocol) -> str | None:
    """Why `protocol` cannot be trained on the latents in `folder`, and the commands that make them, in one line; None: it can.

    folder: as --data names it; None: not given.
    """
    dataset = registry.datasets.get(protocol.dataset)
    name = "NAME" if protocol.dataset == "prepared" else protocol.dataset
    vae, explanation = _autoencoder_for(protocol)

    def encode(images: object, out: str) -> str:
        return f"`harness data latents {images} --vae {vae} --out {out}`{explanation}"

    # `images` in the commands: the .npz, the prepared folder that a first command makes, or the data set's name
    images, prepare, out = name, "", f"{name}-{protocol.resolution}-latents"
    if name == "npz":
        images = "FILE.npz"
    elif dataset.needs_folder:
        images = f"{name}-{protocol.resolution}"
        prepare = f"`harness data prepare {name} --from PATH --out {images} --resolution {protocol.resolution}`, then "
    commands = f"make it by {prepare}{encode(images, out)}, and give --data {out}"
    if folder is None:
        return f"name its cache of latents with --data; without one, {commands}"
    if is_prepared(folder):
        if (problem := dataset.missing(folder, protocol.resolution)) is not None:
            return problem
        cache = f"{folder}-latents"
        return f"{folder} holds images; encode them once by {encode(folder, cache)}, and give --data {cache}"
    if not is_cache(folder):
        return f"{folder} {'is no cache of latents' if folder.exists() else 'does not exist'}; {commands}"
    try:
        return _mismatch(read_meta(folder), protocol)
    except UserError as error:
        return str(error)


def _autoencoder_for(protocol: Protocol) -> tuple[str, str]:
    """(what to give --vae for latents of the protocol's size, its explanation); ("ft-ema", "") if that one fits."""
    # image channels, latent channels, pixels per latent cell along a side; KL_CONFIG is the configuration of ft-ema
    ft_ema = (KL_CONFIG["in_channels"], KL_CONFIG["latent_channels"], 2 ** (len(KL_CONFIG["block_out_channels"]) - 1))
    side = protocol.resolution // protocol.input_size
    if (protocol.image_channels, protocol.in_channels, side) == ft_ema:
        return "ft-ema", ""
    of_packages = [
        each.name
        for each in registry.autoencoders
        if (each.image_channels, each.channels, each.factor) == (protocol.image_channels, protocol.in_channels, side)
    ]
    if of_packages:
        return of_packages[0], ""
    latents = f"latents of {protocol.in_channels} channels, a cell for {side}x{side} pixels"
    return "DIR", f" (DIR: an AutoencoderKL of diffusers for images of {protocol.image_channels} channels, {latents})"


def _mismatch(meta: Meta, protocol: Protocol) -> str | None:
    """How a cache differs from what the protocol wants, in one line; None: it does not."""
    found = (*meta.latent_shape, meta.images["resolution"])
    wanted = (protocol.in_channels, protocol.input_size, protocol.input_size, protocol.resolution)
    if found == wanted:
        return None
    there, here = (f"latents {c}x{h}x{w} of images of {side} pixels" for c, h, w, side in (found, wanted))
    return f"the cache has {there}, protocol {protocol.name!r} wants {here}; make another, or name another protocol"


def verify(folder: Path) -> str:
    """Compare every chunk with its hash. Returns a description of the cache, in one line; UserError names a chunk that
    differs.
    """
    cache = load(folder)
    meta, count = cache.meta, len(cache)
    with Bar("verify", count, "images") as bar:
        for number, expected in enumerate(meta.chunks):
            part = slice(number * CHUNK_IMAGES, min((number + 1) * CHUNK_IMAGES, count))
            if chunk_sha256(cache.latents[part], cache.labels[part]) != expected:
                raise UserError(
                    f"{folder}: the latents or labels of images {part.start} to {part.stop - 1} differ from their hash:"
                    " damaged; make the latents again"
                )
            bar.advance(part.stop - part.start)
    side, vae = meta.images["resolution"], meta.vae
    size = "x".join(map(str, meta.latent_shape))
    return (
        f"latents {size} of {count:,} images of {cache.name} at {side} pixels ({meta.images['sha256'][:12]}) by {vae['name']}"
        f" ({vae['weights_sha256'][:12]}), scale {meta.scale:g}; {len(meta.chunks):,} chunks, every hash holds"
    )
