"""Caches of latents: what an auto-encoder makes of a data set, mapped by training and never read as a whole.

    DIR/latents.npy   float32 (N, 2, 2, C, h, w): of each image, as it is and mirrored, mean and standard deviation of the
                      posterior, as the auto-encoder gives them: neither shifted nor scaled
    DIR/labels.npy    int64 (N,)
    DIR/meta.json     `Meta`: of which images, by which auto-encoder, and a hash of every chunk

The mirrored half is the encoding of the mirrored image, which is not the mirrored latent. Float32, because float16 would
be as coarse as what it has to hold: the means of Stable Diffusion's auto-encoder reach 8 and more, where neighbours in
float16 are 1/128 apart, and the standard deviations of its posterior are about as small. ImageNet's latents at 256 pixels
are 84 GB, at 512 pixels 336 GB.

`harness data latents` makes the folder; latents.npy and meta.json have other names until they are whole. Chunks and their
hashes are those of prepared data sets (`harness.data.prepared`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

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


@dataclass(frozen=True, kw_only=True)
class Meta:
    """What meta.json holds of a cache of latents.

    images: name, sha256, resolution and crop of the data set. vae: the auto-encoder's `Decoder.identity`. shape: of
    latents.npy. chunks: the hash of each CHUNK_IMAGES images, hexadecimal. places: what images and auto-encoder were named by, for
    finding them again; no part of what the cache is. environment: what made it.
    """

    images: dict[str, Any]
    vae: dict[str, Any]
    shape: tuple[int, int, int, int, int, int]
    chunks: tuple[str, ...]
    places: dict[str, str] = dataclasses.field(default_factory=dict)
    environment: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """Content hash of latents and labels."""
        return files.sha256_json({"shape": self.shape, "chunk_images": CHUNK_IMAGES, "chunks": self.chunks})

    @property
    def identity(self) -> dict[str, Any]:
        """What makes a run on these latents another experiment, beside the images; hashes, and no names."""
        vae = {"vae_sha256": self.vae["weights_sha256"], "vae_config_sha256": self.vae["config_sha256"]}
        return {**vae, "scale_factor": self.scale, "shift_factor": self.shift, "sha256": self.sha256}

    @property
    def scale(self) -> float:
        """The network learns (z - shift) x scale."""
        return float(self.vae["scale_factor"])

    @property
    def shift(self) -> float:
        return float(self.vae.get("shift_factor", 0.0))

    @property
    def latent(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        return self.shape[3:]

    def write(self, folder: Path) -> None:
        """Write meta.json, atomically."""
        document = {"schema": SCHEMA, "sha256": self.sha256, "dtype": "float32", "chunk_images": CHUNK_IMAGES}
        files.write_json(folder / META, {**document, **dataclasses.asdict(self)})


@dataclass(frozen=True, kw_only=True)
class LatentSet:
    """A cache, opened: `latents` float32 (N, 2, 2, C, h, w), mapped; `labels` int64 (N,). Implements `Examples`."""

    meta: Meta
    latents: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def name(self) -> str:
        return self.meta.images["name"]

    @property
    def identity(self) -> dict[str, Any]:
        return {"dataset_sha256": self.meta.images["sha256"], "latents": self.meta.identity}

    @property
    def places(self) -> dict[str, str]:
        return self.meta.places

    def check(self, task: Protocol) -> None:
        """Latents of another size than the protocol's network takes, or of other images, are refused."""
        if (lack := _unfit(self.meta, task)) is not None:
            raise UserError(lack)

    def gather(self, rows: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
        """float32 (n, 2, C, h, w): mean and standard deviation of the image or of its mirror image, a copy."""
        views = self.latents.reshape(-1, *self.latents.shape[2:])  # (2N, 2, C, h, w), the same map
        wanted, size = 2 * rows + mirrored, views[0].nbytes
        prefetch(self.latents, wanted * size, size)  # three times as fast from the disk
        return np.asarray(views[wanted])

    def to_model_input(self, stored: Any, normal: Normal) -> Any:
        """float32 (n, 2, C, h, w) -> float32 (n, C, h, w): a draw from each posterior, shifted and scaled."""
        mean, std = stored[:, 0], stored[:, 1]
        return (mean + std * normal(tuple(mean.shape[1:])) - self.meta.shift) * self.meta.scale


def is_cache(folder: Path) -> bool:
    """Whether `folder` looks like a cache of latents, perhaps one that is not whole yet."""
    return any((folder / name).exists() for name in (LATENTS, f"{LATENTS}{files.PARTIAL}"))


def read_meta(folder: Path) -> Meta:
    """The meta.json of a cache; UserError for another folder, an unfinished cache and a document that contradicts itself."""
    path = folder / META
    if is_cache(folder) and not path.exists():
        raise UserError(f"{folder} is not whole: give the `harness data latents` command that began it once more")
    if not (is_cache(folder) and (folder / LABELS).is_file()):
        raise UserError(
            f"{folder} is no cache of latents; `harness data latents IMAGES --vae NAME --out DIR` makes one"
        )
    data = files.read_json(path, "latents file")
    try:
        if data["schema"] > SCHEMA:
            raise UserError(f"{path} was written by a newer harness (schema {data['schema']}); update this one")
        meta = Meta(
            images=dict(data["images"]), vae=dict(data["vae"]), shape=tuple(int(each) for each in data["shape"]),
            chunks=tuple(str(each) for each in data["chunks"]), places=dict(data["places"]),
            environment=dict(data["environment"]),
        )  # fmt: skip
        sound = (
            len(meta.shape) == 6
            and min(meta.shape) > 0
            and meta.shape[1:3] == (2, 2)
            and data["chunk_images"] == CHUNK_IMAGES
            and len(meta.chunks) == chunk_count(meta.shape[0])
            and data["sha256"] == meta.sha256
            and bool(meta.identity)
            and {"name", "sha256", "resolution"} <= set(meta.images)
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not a latents file of this harness ({type(error).__name__}: {error})") from error
    if not sound:
        raise UserError(f"{path} contradicts its own hash: edited or damaged; make the latents again")
    return meta


def load(folder: Path) -> LatentSet:
    """The cache in `folder`, mapped: nothing but labels and meta.json is read."""
    meta = read_meta(folder)
    latents, labels = (
        _opened(folder / name, dtype, shape)
        for name, dtype, shape in (
            (LATENTS, DTYPE, meta.shape),
            (LABELS, np.dtype("<i8"), meta.shape[:1]),
        )
    )
    return LatentSet(meta=meta, latents=latents, labels=np.array(labels))


def _opened(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    with readable(path):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(array, np.memmap) or array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
        raise UserError(
            f"{path} is {array.dtype} {array.shape} where {META} says {dtype} {shape}; make the latents again"
        )
    return array


def missing(folder: Path | None, task: Protocol) -> str | None:
    """What keeps `folder` from being trained on under `task`, with the commands that mend it; None: nothing."""
    name = "NAME" if task.dataset == "prepared" else task.dataset
    images, prepare = f"{name}-{task.resolution}", ""
    out = f"{images}-latents"
    if registry.datasets.get(task.dataset).needs_folder and name != "npz":
        prepare = f"`harness data prepare {name} --from PATH --out {images} --resolution {task.resolution}`, then "
    else:
        images = "FILE.npz" if name == "npz" else name
    vae, which = _auto_encoder(task)
    encode = f"`harness data latents {{}} --vae {vae} --out {{}}`{which}"
    all_of_it = f"make it by {prepare}{encode.format(images, out)}, and give --data {out}"
    if folder is None:
        return f"name its cache of latents with --data; without one, {all_of_it}"
    if is_prepared(folder):
        if (lack := registry.datasets.get(task.dataset).missing(folder, task.resolution)) is not None:
            return lack
        mine = f"{folder}-latents"
        return f"{folder} holds images; encode them once by {encode.format(folder, mine)}, and give --data {mine}"
    if not is_cache(folder):
        return f"{folder} {'is no cache of latents' if folder.exists() else 'does not exist'}; {all_of_it}"
    try:
        return _unfit(read_meta(folder), task)
    except UserError as error:
        return str(error)


def _auto_encoder(task: Protocol) -> tuple[str, str]:
    """What to give --vae for latents of the protocol's size, and what that is in words where it is no name."""
    from backbones.autoencoders.spec import KL_CONFIG

    named = (KL_CONFIG["in_channels"], KL_CONFIG["latent_channels"], 2 ** (len(KL_CONFIG["block_out_channels"]) - 1))
    side = task.resolution // task.input_size
    if (task.image_channels, task.in_channels, side) == named:
        return "ft-ema", ""
    made = f"latents of {task.in_channels} channels, a cell for {side}x{side} pixels"
    return "DIR", f" (DIR: an AutoencoderKL of diffusers for images of {task.image_channels} channels, {made})"


def _unfit(meta: Meta, task: Protocol) -> str | None:
    """In what a cache is not of the protocol."""
    found = (*meta.latent, meta.images["resolution"])
    wanted = (task.in_channels, task.input_size, task.input_size, task.resolution)
    if found == wanted:
        return None
    there, here = (f"latents {c}x{h}x{w} of images of {side} pixels" for c, h, w, side in (found, wanted))
    return f"the cache has {there}, protocol {task.name!r} wants {here}; make another, or name another protocol"


def verify(folder: Path) -> str:
    """Compare every chunk with its hash; what the cache is, in one line. UserError: the first chunk that differs."""
    found = load(folder)
    meta, count = found.meta, len(found)
    with Bar("verify", count, "images") as bar:
        for number, expected in enumerate(meta.chunks):
            part = slice(number * CHUNK_IMAGES, min((number + 1) * CHUNK_IMAGES, count))
            if chunk_sha256(found.latents[part], found.labels[part]) != expected:
                raise UserError(
                    f"{folder}: the latents or labels of images {part.start} to {part.stop - 1} differ from their hash:"
                    " damaged; make the latents again"
                )
            bar.advance(part.stop - part.start)
    side, vae = meta.images["resolution"], meta.vae
    size = "x".join(map(str, meta.latent))
    return (
        f"latents {size} of {count:,} images of {found.name} at {side} pixels ({meta.images['sha256'][:12]}) by {vae['name']}"
        f" ({vae['weights_sha256'][:12]}), scale {meta.scale:g}; {len(meta.chunks):,} chunks, every hash holds"
    )
