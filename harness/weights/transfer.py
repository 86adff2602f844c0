"""Inspect, import and export: what a file is, into safetensors under our names, and back to the public layouts."""

from __future__ import annotations

import json
import os
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from harness import registry
from harness.errors import UserError
from harness.io import files
from harness.spec import BackboneSpec
from harness.weights.files import METADATA, WeightFile, open_weights, sha256, unchanged, watched
from harness.weights.identify import Match, choose_layout, identify, misfit, recognised, weight_map
from harness.weights.known import KNOWN
from harness.weights.maps import Layout, Mismatch, Same
from harness.weights.tensors import finite, raw_dtype, refuse_not_finite

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Ours:
    """A file's weights under our names."""

    file: WeightFile
    match: Match

    def read(self, name: str) -> np.ndarray:
        """The tensor of our name, which must be finite where it is a part of the network."""
        array = self.match.recipes[name].evaluate(lambda source: self.file.tensors[source].read())
        if not (self.match.layout.beside(name) or finite(array, self.dtype(name))):
            refuse_not_finite(self.file.path, name)
        return array

    def dtype(self, name: str) -> str:
        sources = self.match.recipes[name].sources
        return self.file.tensors[sources[0]].dtype if sources else "F32"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = self.file.shapes
        return {name: recipe.shape(shapes) for name, recipe in self.match.recipes.items()}


def candidates(backbone: str | None) -> list[BackboneSpec]:
    """The one that is named, or all."""
    return [registry.backbones.get(backbone)] if backbone else list(registry.backbones)


def inspect_file(path: Path, backbone: str | None = None) -> dict[str, Any]:
    """What a weight file is, as plain data. Names what would keep it from being loaded; a file that fits is read once
    through for that, a tensor at a time."""
    weights = open_weights(path)
    document: dict[str, Any] = {
        "file": str(weights.path),
        "bytes": weights.path.stat().st_size,
        "sha256": sha256(weights.path),
    }
    known = KNOWN.get(document["sha256"])
    document["known"] = known._asdict() if known else None
    document |= {
        "container": weights.container, "wrapping": weights.wrapping, "layout": None, "backbone": None, "arguments": {},
        "fits": False, "problem": None, "missing": [], "unexpected": [], "wrong_shape": [], "beside": {},
    }  # fmt: skip
    notes = weights.notes
    network = list(weights.tensors)
    try:
        match = identify(weights, candidates(backbone))
        notes = match.notes
        ours = Ours(file=weights, match=match)
        shapes = ours.shapes
        beside = [name for name in match.recipes if match.layout.beside(name)]
        network = [name for name in match.recipes if name not in set(beside)]
        document["values"] = sum(prod(shapes[name]) for name in network)
        document["layout"] = match.layout.title if match.spec and recognised(weights, match.layout) else None
        for name in beside:
            part = name.partition(".")[0]
            document["beside"][part] = document["beside"].get(part, 0) + 1
        if match.spec is not None:
            found = match.differences
            document |= {
                "backbone": match.spec.name,
                "arguments": match.arguments,
                "fits": match.exact,
                "problem": found.first() if found else None,
                "missing": list(found.missing),
                "unexpected": list(found.unexpected),
                "wrong_shape": [{"name": n, "found": list(a), "expected": list(b)} for n, a, b in found.wrong],
            }
        else:
            document["problem"] = f"no backbone has such names; the first is {network[0]}"
        for name in network:  # damage, copies that differ and values that are no numbers show in the content alone
            if match.exact or isinstance(match.recipes[name], Same):
                ours.read(name)
    except UserError as error:
        document |= {"fits": False, "problem": str(error).removeprefix(str(weights.path)).lstrip(": ")}
        document["layout"] = document["layout"] or _likely_layout(weights, candidates(backbone))
    document.setdefault("values", sum(prod(tensor.shape) for tensor in weights.tensors.values()))
    dtypes = [tensor.dtype for tensor in weights.tensors.values()]
    document |= {
        "tensors": len(weights.tensors),
        "dtypes": {name: dtypes.count(name) for name in sorted(set(dtypes))},
        "also_holds": list(weights.also),
        "not_loaded": list(weights.symbols),
        "code": list(weights.code),
        "imported_from": weights.imported,
        "notes": list(notes),
    }
    return document


def _likely_layout(weights: WeightFile, specs: Iterable[BackboneSpec]) -> str | None:
    """The layout whose names the file has, where it could not be read as one."""
    share, layout = choose_layout([layout for spec in specs for layout in weight_map(spec).layouts], weights.tensors)
    return layout.title if share > 0 else None


def opened(path: Path, backbone: str | None) -> Ours:
    """The file's weights, identified beyond doubt; a file that fits no backbone, or not the named one, is refused."""
    weights = open_weights(path)
    weights.refuse_code()
    match = identify(weights, candidates(backbone))
    if match.spec is None:
        raise UserError(
            f"{weights.path} is of no known backbone (its first tensor is {next(iter(weights.tensors))});"
            " if a plug-in has it, install the plug-in"
        )
    if not match.exact:
        problem = match.differences.first()
        if backbone:
            raise UserError(misfit(weights, match.layout, backbone, problem))
        nearest = f"any backbone; the nearest is {match.spec.name}: {problem}"
        raise UserError(f"{weights.path} ({match.layout.title}) does not fit {nearest}")
    return Ours(file=weights, match=match)


def import_file(path: Path, out: Path | None = None, backbone: str | None = None) -> tuple[Path, dict[str, Any]]:
    """Write the weights as safetensors under our names.

    Returns the new file and what stands in its metadata, and beside that "not_loaded": the classes and functions that
    `path` names.
    """
    out = out or path.with_name(f"{path.name if path.is_dir() else path.stem}.safetensors")
    refuse_existing(out)
    ours = opened(path, backbone)
    match = ours.match
    about = {
        "schema": SCHEMA,
        "backbone": match.spec.name,
        "arguments": match.arguments,
        "format": match.layout.name,
        "source": {
            "name": ours.file.path.name,
            "sha256": sha256(ours.file.path),
            "wrapping": ours.file.wrapping,
            "container": ours.file.container,
        },
        "notes": list(match.notes),
    }
    if ours.file.imported is not None:
        about["imported_before"] = ours.file.imported
    shapes = ours.shapes
    entries = {name: (ours.dtype(name), shapes[name]) for name in match.recipes}
    with partial(out) as target, unchanged(ours.file):
        write_safetensors(target, entries, ours.read, {METADATA: json.dumps(about)}, f"write {out.name}")
    return out, about | {"not_loaded": list(ours.file.symbols)}


def export_file(path: Path, layout: str, out: Path | None = None, backbone: str | None = None) -> Path:
    """Write the weights in the named public layout; returns the new file, or the folder of diffusers."""
    ours = opened(path, backbone)
    spec = ours.match.spec
    target = _target(spec, layout)
    recipes = target.outward(ours.shapes)
    stem = path.name if path.is_dir() else path.stem
    out = out or path.with_name(f"{stem}-{layout}{target.suffix}")
    refuse_existing(out)
    try:
        shapes = {name: recipe.shape(ours.shapes) for name, recipe in recipes.items()}
    except (Mismatch, KeyError) as error:
        raise UserError(f"{ours.file.path} cannot be written as {layout}: {error}") from error
    entries = {name: (ours.dtype(recipe.sources[0]), shapes[name]) for name, recipe in recipes.items()}

    def read(name: str) -> np.ndarray:
        return recipes[name].evaluate(ours.read)

    title = f"write {out.name}"
    with partial(out) as unfinished, unchanged(ours.file):
        if target.store == "diffusers":
            unfinished.mkdir()
            config = target.config(spec.arguments(**ours.match.arguments), ours.shapes)
            files.write_json(unfinished / "config.json", config)
            weights = unfinished / "diffusion_pytorch_model.safetensors"
            write_safetensors(weights, entries, read, {}, title)
        else:
            _write_torch(unfinished, entries, read, target.store, title)
    return out


def _target(spec: BackboneSpec, layout: str) -> Layout:
    known = {each.name: each for each in weight_map(spec).layouts}
    if layout not in known:
        raise UserError(f"{spec.name} has no public layout {layout!r}; it has {', '.join(known) or 'none'}")
    return known[layout]


def layout_names() -> list[str]:
    """Every layout of every registered family."""
    return list(dict.fromkeys(layout.name for spec in registry.backbones for layout in weight_map(spec).layouts))


def refuse_existing(path: Path) -> None:
    if path.exists():
        raise UserError(f"{path} exists and is not overwritten; choose another name with --out")


@contextmanager
def partial(path: Path) -> Iterator[Path]:
    """A name to write under, which becomes `path` when all went well and is removed otherwise."""
    with files.explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # A folder of its own: nothing of the user's is under that name, and no second process writes to it.
        room = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=files.PARTIAL, dir=path.parent))
        unfinished = room / path.name
        try:
            yield unfinished
            for written in unfinished.iterdir() if unfinished.is_dir() else [unfinished]:
                files.sync_file(written)
            refuse_existing(path)  # made meanwhile
            unfinished.rename(path)
            files.sync_folder(path.parent)
        finally:
            files.remove(room)


def write_safetensors(
    path: Path,
    entries: Mapping[str, tuple[str, tuple[int, ...]]],
    read: Any,
    metadata: Mapping[str, str],
    title: str,
) -> None:
    """Write tensors of known dtype and shape one at a time: `read(name)` is asked for each when its turn comes."""
    names = sorted(entries, key=lambda name: -raw_dtype(entries[name][0]).itemsize)  # so that each is aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name in names:
        dtype, shape = entries[name]
        begin, end = end, end + prod(shape) * raw_dtype(dtype).itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in watched(title, _in_turn(names, entries, read), end):
            file.write(memoryview(array.reshape(-1).view(np.uint8)))
        file.flush()
        os.fsync(file.fileno())


def _in_turn(names: Iterable[str], entries: Mapping[str, tuple[str, tuple[int, ...]]], read: Any) -> Iterator[Any]:
    for name in names:
        array = read(name)
        assert array.shape == entries[name][1] and array.itemsize == raw_dtype(entries[name][0]).itemsize, name
        yield np.ascontiguousarray(array)


def _write_torch(path: Path, entries: Mapping[str, tuple[str, Any]], read: Any, store: str, title: str) -> None:
    """torch.save of the state dict: held once, as torch writes it from memory."""
    import torch

    from harness.weights.load import as_torch

    nbytes = sum(prod(shape) * raw_dtype(dtype).itemsize for dtype, shape in entries.values())
    state = {}
    for name, array in zip(entries, watched(title, _in_turn(entries, entries, read), nbytes), strict=True):
        state[name] = as_torch(array.reshape(entries[name][1]), entries[name][0])
    with path.open("xb") as file:
        torch.save({"state_dict": state} if store == "lightning" else state, file)
