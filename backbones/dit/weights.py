"""Public weight files of the Diffusion Transformer.

Layout `dit`: the state dict of the release, with our names (facebookresearch/DiT ed81ce2, models.py). Layout `diffusers`:
that of DiTTransformer2DModel (huggingface/diffusers 58eb52c080, scripts/convert_dit_to_diffusers.py), which splits the
qkv layer into three and repeats the timestep and label embedders in every block.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from backbones.dit.position import sincos_table
from harness.errors import UserError
from harness.spec import BackboneSpec
from harness.weights.maps import Join, Layout, Made, Mismatch, Part, Recipes, Same, Shapes, Take, WeightMap, take_all

# fmt: off
SHARED = {  # ours: diffusers'
    "x_embedder.proj":                  "pos_embed.proj",
    "final_layer.adaLN_modulation.1":   "proj_out_1",
    "final_layer.linear":               "proj_out_2",
}
IN_BLOCK = {  # ours in blocks.N: diffusers' in transformer_blocks.N
    "attn.proj":            "attn1.to_out.0",
    "mlp.fc1":              "ff.net.0.proj",
    "mlp.fc2":              "ff.net.2",
    "adaLN_modulation.1":   "norm1.linear",
}
COPIED = {  # ours: diffusers' in every transformer_blocks.N
    "t_embedder.mlp.0.weight":              "norm1.emb.timestep_embedder.linear_1.weight",
    "t_embedder.mlp.0.bias":                "norm1.emb.timestep_embedder.linear_1.bias",
    "t_embedder.mlp.2.weight":              "norm1.emb.timestep_embedder.linear_2.weight",
    "t_embedder.mlp.2.bias":                "norm1.emb.timestep_embedder.linear_2.bias",
    "y_embedder.embedding_table.weight":    "norm1.emb.class_embedder.embedding_table.weight",
}
# fmt: on
LABEL_TABLE = "y_embedder.embedding_table.weight"
QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
KINDS = ("weight", "bias")
STORED_POSITIONS = ("pos_embed.pos_embed", "pos_embed")  # names of the position table in files that hold it

MAX_SAMPLE_SIZE = 1024  # side of a latent: 8192 pixels
MAX_TOKENS = 1 << 16  # side of 4096 pixels at patch size 2; the position table of DiT-XL is then 300 MB
EXPECTED_CONFIG: dict[str, tuple[object, ...]] = {  # items of diffusers' config that the weights do not determine
    "_class_name": ("DiTTransformer2DModel", "Transformer2DModel"),  # its name before diffusers 0.29
    "activation_fn": ("gelu-approximate",),
    "attention_bias": (True,),
    "norm_elementwise_affine": (False,),
    "norm_eps": (1e-5, 1e-6),
    "norm_type": ("ada_norm_zero",),
}

DIFFERENCES = (
    "diffusers' own network gives other numbers from these weights: its timestep frequencies are spaced by 1/127"
    " instead of 1/128 (embeddings.py, downscale_freq_shift=1)",
    "and, unless its config says norm_eps 1e-06, the layer norm before its MLP has eps 1e-5 instead of 1e-6"
    " (attention.py); the harness computes as facebookresearch/DiT does",
)


def count_blocks(shapes: Shapes, stem: str) -> int:
    """Number of blocks, STEM.0 and on: one more than the largest index in the names.

    Raises Mismatch if the file has fewer tensors than blocks, so that earlier blocks must be missing.
    """
    matches = (re.match(rf"{stem}\.([0-9]{{1,6}})\.", name) for name in shapes)  # longer numbers are not block indices
    count = max((int(match.group(1)) for match in matches if match), default=-1) + 1
    if count > len(shapes):
        raise Mismatch(f"{stem}.{count - 1} is in the file, but not all of the {count - 1} blocks before it")
    return count


def from_diffusers(shapes: Shapes, known: Mapping[str, Any]) -> Recipes:
    """Recipes of our tensors from those of a diffusers transformer. A position table that is not stored is computed.

    known: "config" -> diffusers' config, "expected" -> shapes of the network that is loaded; both may be missing. They are
    used for the size of a position table that is not stored.
    """
    depth = count_blocks(shapes, "transformer_blocks")
    recipes: Recipes = {}
    stored = next((name for name in STORED_POSITIONS if name in shapes), None)
    if stored is not None:
        recipes["pos_embed"] = Take(stored)
    elif "pos_embed.proj.weight" in shapes and len(shapes["pos_embed.proj.weight"]) == 4:
        width, _, _, patch = shapes["pos_embed.proj.weight"]
        grid = _grid(known, patch)
        recipes["pos_embed"] = Made((1, grid * grid, width), lambda: sincos_table(width, grid)[None])
    layers = dict(SHARED)  # ours -> diffusers', of layers that are stored unchanged
    layers |= {
        f"blocks.{n}.{ours}": f"transformer_blocks.{n}.{theirs}"
        for n in range(depth)
        for ours, theirs in IN_BLOCK.items()
    }
    for ours, theirs in layers.items():
        recipes |= {f"{ours}.{kind}": Take(f"{theirs}.{kind}") for kind in KINDS}
    for n in range(depth):
        for kind in KINDS:
            names = tuple(f"transformer_blocks.{n}.{part}.{kind}" for part in QKV)
            recipes[f"blocks.{n}.attn.qkv.{kind}"] = Join(names)
    if depth:  # without a block there is no copy to take
        for ours, theirs in COPIED.items():
            recipes[ours] = Same(tuple(f"transformer_blocks.{n}.{theirs}" for n in range(depth)))
    used = {name for recipe in recipes.values() for name in recipe.sources}
    for name in shapes:  # unknown tensors keep their names, so that they are reported
        if name not in used:
            recipes[name] = Take(name)
    return recipes


def to_diffusers(shapes: Shapes) -> Recipes:
    """Recipes of a diffusers transformer's tensors from ours. UserError for block designs other than adaln-zero.

    The position table is left out: diffusers computes it.
    """
    depth = count_blocks(shapes, "blocks")
    if block_design(shapes) != "adaln-zero":
        raise UserError(f"diffusers has no DiT with {block_design(shapes)} blocks; export this one with --format dit")
    recipes: Recipes = {}
    for ours, theirs in SHARED.items():
        recipes |= {f"{theirs}.{kind}": Take(f"{ours}.{kind}") for kind in KINDS}
    for n in range(depth):
        block = f"transformer_blocks.{n}"
        for ours, theirs in IN_BLOCK.items():
            recipes |= {f"{block}.{theirs}.{kind}": Take(f"blocks.{n}.{ours}.{kind}") for kind in KINDS}
        for kind in KINDS:
            qkv = f"blocks.{n}.attn.qkv.{kind}"
            recipes |= {f"{block}.{part}.{kind}": Part(qkv, i, of=len(QKV)) for i, part in enumerate(QKV)}
        recipes |= {f"{block}.{theirs}": Take(ours) for ours, theirs in COPIED.items()}
    return recipes


def diffusers_config(arguments: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """config.json of the transformer; `shapes` is not used. DiT's norm_eps removes the second of DIFFERENCES."""
    return {
        "_class_name": "DiTTransformer2DModel",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": arguments["width"] // arguments["heads"],
        "in_channels": arguments["in_channels"],
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "norm_type": "ada_norm_zero",
        "num_attention_heads": arguments["heads"],
        "num_embeds_ada_norm": arguments["num_classes"],
        "num_layers": arguments["depth"],
        "out_channels": arguments["out_channels"] or 2 * arguments["in_channels"],
        "patch_size": arguments["patch"],
        "sample_size": arguments["input_size"],
    }


def block_design(shapes: Shapes) -> str:
    """The block design that the names and shapes of our tensors imply; "adaln-zero" if the width is missing."""
    if "blocks.0.cross_attn.q.weight" in shapes:
        return "cross-attention"
    modulation = shapes.get("blocks.0.adaLN_modulation.1.bias")
    if modulation is None:
        return "in-context"
    # Without a width, `modulation` itself stands for it: it is not 4 times itself.
    width = shapes.get("blocks.0.attn.proj.bias", modulation)
    return "adaln" if modulation[0] == 4 * width[0] else "adaln-zero"  # 6 * width: with gates


def facts(spec: BackboneSpec, shapes: Shapes) -> dict[str, Any]:
    """Builder arguments that follow from the shapes; heads do not, and are left out.

    An argument whose tensor is missing is left out, too.
    """
    arguments: dict[str, Any] = {"depth": count_blocks(shapes, "blocks"), "block": block_design(shapes)}
    if len(patch_embedding := shapes.get("x_embedder.proj.weight", ())) == 4:
        width, in_channels, patch, _ = patch_embedding
        arguments |= {"width": width, "in_channels": in_channels, "patch": patch}
        if len(shapes.get("pos_embed", ())) == 3:
            arguments["input_size"] = math.isqrt(_check_tokens(shapes["pos_embed"][1])) * patch
        if outputs := shapes.get("final_layer.linear.bias"):
            channels = outputs[0] // max(1, patch * patch)  # max: a broken file may have a side of 0
            arguments["out_channels"] = None if channels == 2 * in_channels else channels  # None: 2 * in_channels
    if labels := shapes.get("y_embedder.embedding_table.weight"):
        # Without the "no class" label; a table of exactly the classes that are usual has none.
        usual = labels[0] == spec.defaults["num_classes"]
        arguments["num_classes"] = labels[0] - (0 if usual else 1)
    return arguments


def _grid(known: Mapping[str, Any], patch: int) -> int:
    """Side of the token grid, from config.json beside the file, or else from the network that is loaded.

    Raises Mismatch if neither states it, or if it is out of range.
    """
    size = (known.get("config") or {}).get("sample_size")
    if size is not None:
        if type(size) is not int or not 0 < size <= MAX_SAMPLE_SIZE or patch < 1 or size % patch:
            raise Mismatch(
                f"config.json gives sample_size {_short(size)}, which is not the side of a latent: a multiple of the"
                f" patch size {patch}, at most {MAX_SAMPLE_SIZE}"
            )
        grid = size // patch
        _check_tokens(grid**2)
        return grid
    if len(table := known.get("expected", {}).get("pos_embed", ())) == 3:
        return math.isqrt(table[1])
    raise Mismatch("the size of its latents is not in the file; keep diffusers' config.json (sample_size) beside it")


def _check_tokens(count: int) -> int:
    """`count` itself. Raises Mismatch if it is larger than MAX_TOKENS."""
    if count > MAX_TOKENS:
        raise Mismatch(f"it is for images of {count:,} tokens, but at most {MAX_TOKENS:,} are supported")
    return count


def _short(value: Any) -> str:
    """The JSON text of a value for messages, cut after 60 characters."""
    return json.dumps(value)[:60]


def contradiction(config: Mapping[str, Any], shapes: Shapes, heads: int | None) -> str | None:
    """Text on the first item of diffusers' config that contradicts the weights or the heads; None: no item does.

    shapes: under our names. heads: None if the number of heads is not known.
    """
    for name, allowed in EXPECTED_CONFIG.items():
        # The types are compared, too, because 1 == True.
        if name in config and not any(type(config[name]) is type(value) and config[name] == value for value in allowed):
            return _contradicts(name, config[name], " or ".join(_short(value) for value in allowed))
    width, channels, _, patch = shapes["x_embedder.proj.weight"]
    outputs = shapes["final_layer.linear.bias"][0] // (patch * patch)
    from_weights: dict[str, int] = {
        "in_channels": channels,
        "num_embeds_ada_norm": shapes["y_embedder.embedding_table.weight"][0] - 1,
        "num_layers": count_blocks(shapes, "blocks"),
        "out_channels": outputs,
        "patch_size": patch,
        "sample_size": math.isqrt(shapes["pos_embed"][1]) * patch,
    }
    if heads is not None:
        from_weights |= {"num_attention_heads": heads, "attention_head_dim": width // heads}
    for name, expected in from_weights.items():
        given = config.get(name)  # null means the default
        if given is not None and (type(given) is not int or given != expected):
            return _contradicts(name, given, str(expected))
    given = [config.get("num_attention_heads"), config.get("attention_head_dim")]
    # The product of the two is the width.
    fits = None in given or (all(type(value) is int for value in given) and given[0] * given[1] == width)
    if heads is None and not fits:
        return _contradicts("num_attention_heads x attention_head_dim", given, str(width))
    return None


def _contradicts(name: str, given: Any, expected: str) -> str:
    """The message on an item of the config. expected: the network's value, as text."""
    return f"config.json gives {name} {_short(given)}, but the network has {expected}"


def _diffusers_notes(shapes: Shapes) -> tuple[str, ...]:
    """Lines for the user on a file in diffusers' layout: its position table, and how diffusers' own network differs."""
    stored = any(name in shapes for name in STORED_POSITIONS)
    table = "is in the file" if stored else "is not in the file and was computed, as facebookresearch/DiT does"
    return (f"the position table {table}", *DIFFERENCES)


MAP = WeightMap(
    layouts=(
        Layout(
            name="dit",
            title="DiT state dict",
            marks=("x_embedder.proj.weight", "t_embedder.mlp.0.weight", "final_layer.linear.weight"),
            inward=take_all,
            outward=take_all,
            label_table=LABEL_TABLE,
        ),
        Layout(
            name="diffusers",
            title="diffusers DiTTransformer2DModel",
            marks=("pos_embed.proj.weight", "proj_out_2.weight", "transformer_blocks.0.norm1.linear.weight"),
            store="diffusers",
            suffix="",
            inward=from_diffusers,
            outward=to_diffusers,
            notes=_diffusers_notes,
            config=diffusers_config,
            contradiction=contradiction,
            label_table=LABEL_TABLE,
        ),
    ),
    facts=facts,
)
