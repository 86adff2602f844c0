"""Weights of the Vision Transformers: their location, and the tensor names of public files.

Four layouts are read: facebookresearch/dinov2's, whose names are ours; transformers' Dinov2Model; its CLIPModel or
CLIPVisionModelWithProjection; and openai/CLIP's state dict. Nothing in a file is ever executed.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from evaluators.features.vit_shapes import FLAG, VitShape
from harness.errors import UserError
from harness.weights.files import WeightFile, open_weights, unusual_entry
from harness.weights.load import as_torch
from harness.weights.maps import compare

# owner/name of a repository; not a path with the ending of a weight file
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(?<!\.pth)(?<!\.pt)(?<!\.bin)(?<!\.safetensors)")
HUB_FILES = ("model.safetensors", "pytorch_model.bin")

# Our name, or a part of it -> that in the file, or several names whose tensors are concatenated.
Names = Mapping[str, str | tuple[str, ...]]

# fmt: off
DINOV2: Names = {  # ours: transformers' Dinov2Model's
    "cls_token":            "embeddings.cls_token",
    "pos_embed":            "embeddings.position_embeddings",
    "patch_embed.proj":     "embeddings.patch_embeddings.projection",
    "norm":                 "layernorm",
    "blocks":               "encoder.layer",
    "norm1":                "norm1",
    "attn.qkv":             ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    "attn.proj":            "attention.output.dense",
    "ls1.gamma":            "layer_scale1.lambda1",
    "norm2":                "norm2",
    "mlp.fc1":              "mlp.fc1",
    "mlp.fc2":              "mlp.fc2",
    "ls2.gamma":            "layer_scale2.lambda1",
}
CLIP: Names = {  # ours: transformers' CLIPModel's
    "cls_token":            "vision_model.embeddings.class_embedding",
    "pos_embed":            "vision_model.embeddings.position_embedding.weight",
    "patch_embed.proj":     "vision_model.embeddings.patch_embedding",
    "norm_pre":             "vision_model.pre_layrnorm",
    "norm":                 "vision_model.post_layernorm",
    "proj":                 "visual_projection",
    "blocks":               "vision_model.encoder.layers",
    "norm1":                "layer_norm1",
    "attn.qkv":             ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.proj":            "self_attn.out_proj",
    "norm2":                "layer_norm2",
    "mlp.fc1":              "mlp.fc1",
    "mlp.fc2":              "mlp.fc2",
}
OPENAI: Names = {  # ours: openai/CLIP's
    "cls_token":            "visual.class_embedding",
    "pos_embed":            "visual.positional_embedding",
    "patch_embed.proj":     "visual.conv1",
    "norm_pre":             "visual.ln_pre",
    "norm":                 "visual.ln_post",
    "proj.weight":          "visual.proj",  # stored transposed
    "blocks":               "visual.transformer.resblocks",
    "norm1":                "ln_1",
    "attn.qkv.weight":      "attn.in_proj_weight",
    "attn.qkv.bias":        "attn.in_proj_bias",
    "attn.proj":            "attn.out_proj",
    "norm2":                "ln_2",
    "mlp.fc1":              "mlp.c_fc",
    "mlp.fc2":              "mlp.c_proj",
}
LAYOUTS: tuple[tuple[str, Names, tuple[str, ...]], ...] = (  # title, names, prefixes of tensors that are not used
    ("facebookresearch/dinov2", {},     ("mask_token",)),
    ("transformers' DINOv2",    DINOV2, ("embeddings.mask_token", "classifier.")),
    ("transformers' CLIP",      CLIP,   ("text_model.", "text_projection.", "logit_scale", "vision_model.embeddings.position_ids")),
    ("openai/CLIP",             OPENAI, ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection",
                                         "logit_scale", "input_resolution", "context_length", "vocab_size")),
)
# fmt: on
PREFIX = "dinov2."  # of the backbone in transformers' classifiers
TRANSPOSED = ("visual.proj",)  # result of `sources` for proj.weight in openai/CLIP's files, which store it transposed


@dataclass(frozen=True, kw_only=True)
class ReadState:
    """Weights read from a file.

    state: float32, under our names. sha256: of the file, and of the entry if another than the usual was named. found: one line that describes the file.
    """

    state: dict[str, torch.Tensor]
    sha256: str
    found: str


def sources(ours: str, names: Names) -> tuple[str, ...]:
    """Names in the file of the tensor that we call `ours`: one name, or three whose tensors are concatenated.

    names: of an item of LAYOUTS. A name that is in no file stands for a tensor that the layout does not have.
    """
    if not names:  # facebookresearch/dinov2, whose names are ours
        return (ours,)
    stem, inner = "", ours  # prefix of the block in the file; our name within the block
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", ours):
        number, inner = match.groups()
        stem = f"{names['blocks']}.{number}."
    suffix = ""
    if inner not in names:
        inner, _, parameter = inner.rpartition(".")
        if inner not in names:
            return (f"({ours})",)  # so that `count_present` and `compare` treat it as missing
        suffix = f".{parameter}"  # .weight or .bias
    theirs = names[inner]
    return tuple(f"{stem}{name}{suffix}" for name in ((theirs,) if isinstance(theirs, str) else theirs))


def _layout(weights: WeightFile, expected: Mapping[str, torch.Tensor]) -> tuple[str, Names, tuple[str, ...]]:
    """The item of LAYOUTS under which most of the expected tensors are in the file."""

    def count_present(layout: tuple[str, Names, tuple[str, ...]]) -> int:
        """Number of expected tensors that the file has under the layout's names."""
        return sum(all(name in weights.tensors for name in sources(ours, layout[1])) for ours in expected)

    return max(LAYOUTS, key=count_present)


def read_state(path: Path, expected: Mapping[str, torch.Tensor], name: str, entry: str | None = None) -> ReadState:
    """The weights at `path` under our names, exactly those of `expected`, whose tensors may be on the meta device.

    entry: of a checkpoint where several networks fit. Raises UserError if the file has other tensors or shapes.
    """
    markings = [[theirs for ours in expected for theirs in sources(ours, names)] for _, names, _ in LAYOUTS]

    def open_entry(name: str | None) -> WeightFile:
        return open_weights(path, entry=name, markings=markings)

    weights = open_entry(entry)
    weights.refuse_code()
    # transformers' classifiers: a prefix before all names except those of the last layer
    if all(key.startswith((PREFIX, "classifier.")) for key in weights.tensors):
        unprefixed = {key.removeprefix(PREFIX): tensor for key, tensor in weights.tensors.items()}
        weights = replace(weights, tensors=unprefixed)
    title, names, unused = _layout(weights, expected)
    stored_shapes = {key: tensor.shape for key, tensor in weights.tensors.items() if not key.startswith(unused)}
    wanted_shapes: dict[str, tuple[int, ...]] = {}
    for ours, meta in expected.items():
        theirs = sources(ours, names)
        shape = _stored_shape(tuple(meta.shape), theirs, stored_shapes)
        wanted_shapes |= dict.fromkeys(theirs, shape)
    problems = compare(stored_shapes, wanted_shapes)
    if problems:
        raise UserError(f"{weights.path} does not hold the weights of {name} (read as {title}): {problems.first()}")
    digest, unusual = weights.sha256(), unusual_entry(entry, open_entry)
    state = {ours: _read(weights, sources(ours, names), tuple(meta.shape)) for ours, meta in expected.items()}
    found = f"{title} {weights.path.name}, sha256 {digest[:12]}"
    if unusual:  # the hash of the file alone would give two networks one cache of features
        digest, found = hashlib.sha256(f"{digest}\n{unusual}".encode()).hexdigest(), f"{found}, entry {unusual}"
    return ReadState(state=state, sha256=digest, found=found)


def _stored_shape(
    shape: tuple[int, ...], theirs: tuple[str, ...], stored_shapes: Mapping[str, tuple[int, ...]]
) -> tuple[int, ...]:
    """Shape that each of the file's tensors `theirs` must have, so that `_read` gives `shape`.

    stored_shapes: of all tensors in the file, by name.
    """
    if len(theirs) > 1:
        return (shape[0] // len(theirs), *shape[1:])
    if theirs == TRANSPOSED:
        return shape[::-1]
    stored = stored_shapes.get(theirs[0])
    if stored is not None and len(stored) < len(shape) and (1,) * (len(shape) - len(stored)) + tuple(stored) == shape:
        return stored  # class token and positions without the batch axis of size 1
    return shape


def _read(weights: WeightFile, theirs: tuple[str, ...], shape: tuple[int, ...]) -> torch.Tensor:
    """One of our tensors, float32 of `shape`, from those of the file."""
    parts = []
    for name in theirs:
        stored = weights.tensors[name]
        parts.append(as_torch(np.ascontiguousarray(stored.read()), stored.dtype).float())
    tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
    if theirs == TRANSPOSED:
        tensor = tensor.T.contiguous()
    return tensor.reshape(shape)


def find_weights(name: str, shape: VitShape, weights: Path | None) -> Path:
    """The file or folder with the weights. A repository on the hub is downloaded unless it is in the hub's cache.

    weights: as the user named them; None: the file in torch.hub's cache, UserError if it is not there. A path that does
    not exist is returned as it is: `open_weights` refuses it.
    """
    options = f"{FLAG} FILE or {FLAG} {shape.repository}"
    if weights is None:
        cached = Path(torch.hub.get_dir()) / "checkpoints" / shape.file
        if shape.file and cached.is_file():
            return cached
        where = f", for instance from {shape.url}" if shape.url else ""
        raise UserError(f"features {name} need weights that are not shipped: name them with {options}{where}")
    weights = Path(weights)
    if weights.exists() or not HUB_NAME.fullmatch(weights.as_posix()):
        return weights
    return _from_hub(name, weights.as_posix(), options)


def _from_hub(name: str, repository: str, options: str) -> Path:
    """The weight file of a hub repository, downloaded unless it is cached. options: those that messages advise."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError as error:
        raise UserError(
            f"features {name}: {repository} is not a file; to fetch it from the hub: pip install huggingface_hub"
        ) from error

    reason: Exception | None = None
    for local in (True, False):  # the local cache first, so that a connection is needed only once
        for file in HUB_FILES:
            try:
                return Path(hf_hub_download(repository, file, local_files_only=local))
            except (EntryNotFoundError, LocalEntryNotFoundError) as error:
                reason = error
            except Exception as error:  # of the hub's client, the network or the disk: no use to ask for the other file
                reason = error
                break
    text = (str(reason).strip() or type(reason).__name__).splitlines()[0].rstrip(".")
    raise UserError(
        f"features {name}: {repository} is not a file and was not fetched from the hub ({text}); name {options}"
    )
