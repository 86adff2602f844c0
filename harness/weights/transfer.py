"""Inspecting weight files, importing them as safetensors with our names, and exporting them in public layouts."""

from __future__ import annotations

import json
import os
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from harness import registry
from harness.errors import UserError
from harness.io import files
from harness.spec import BackboneSpec
from harness.weights.files import METADATA, WeightFile, open_weights, unchanged, with_progress
from harness.weights.identify import Match, choose_layout, identify, markings_of, misfit, recognised, weight_map
from harness.weights.known import KNOWN
from harness.weights.maps import Layout, Mismatch, Read, Recipes, Same, WithNullRow
from harness.weights.tensors import all_finite, raw_dtype, refuse_not_finite

SCHEMA = 1
Entries = Mapping[str, tuple[str, tuple[int, ...]]]  # safetensors' dtype and shape of each tensor, by name


@dataclass(frozen=True, kw_only=True)
class IdentifiedWeights:
    """The weights of a file under our names, made by the recipes of the match that `identify` found for it."""

    file: WeightFile
    match: Match

    def read(self, name: str) -> np.ndarray:
        """The values of our tensor `name`; UserError where it belongs to the network and is not finite."""
        array = self.match.recipes[name].evaluate(lambda source: self.file.tensors[source].read())
        if not (self.match.layout.beside(name) or all_finite(array, self.dtype(name))):
            refuse_not_finite(self.file.path, name)
        return array

    def dtype(self, name: str) -> str:
        """The dtype of our tensor `name`, as safetensors names it."""
        sources = self.match.recipes[name].sources
        return self.file.tensors[sources[0]].dtype if sources else "F32"  # `maps.Made` has no sources

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = self.file.shapes
        return {name: recipe.shape(shapes) for name, recipe in self.match.recipes.items()}


def candidates(backbone: str | None) -> list[BackboneSpec]:
    """The backbones to choose from when a file is identified: the one of that name; None: all."""
    return [registry.backbones.get(backbone)] if backbone else list(registry.backbones)


def inspect_file(path: Path, backbone: str | None = None, entry: str | None = None) -> dict[str, Any]:
    """What a weight file is, as JSON data (`harness weights inspect --json`).

    "fits" says whether it can be loaded, "problem" why not. A file that fits is read completely, one tensor at a time.
    """
    weights = open_weights(path, entry=entry, markings=markings_of(candidates(backbone)))
    document: dict[str, Any] = {"file": str(weights.path), "bytes": weights.nbytes, "sha256": weights.sha256()}
    known = KNOWN.get(document["sha256"])
    document["known"] = known._asdict() if known else None
    document |= {
        "container": weights.container, "wrapping": weights.wrapping, "entry": weights.entry,
        "other_entries": list(weights.other_entries), "layout": None, "backbone": None, "arguments": {},
        "fits": False, "problem": None, "missing": [], "unexpected": [], "wrong_shape": [], "beside": {},
    }  # fmt: skip
    notes = weights.notes
    try:
        match = identify(weights, candidates(backbone))
        notes = match.notes
        ours = IdentifiedWeights(file=weights, match=match)
        shapes = ours.shapes
        # Tensors of the file that are no part of the network are "beside" it, such as LDM's autoencoder.
        beside = [name for name in match.recipes if match.layout.beside(name)]
        network = [name for name in match.recipes if name not in set(beside)]
        document["values"] = sum(prod(shapes[name]) for name in network)
        document["layout"] = match.layout.title if match.spec and recognised(weights, match.layout) else None
        for name in beside:
            part = name.partition(".")[0]
            document["beside"][part] = document["beside"].get(part, 0) + 1
        if match.spec is not None:
            differences = match.differences
            document |= {
                "backbone": match.spec.name,
                "arguments": match.arguments,
                "fits": match.exact,
                "problem": differences.first() if differences else None,
                "missing": list(differences.missing),
                "unexpected": list(differences.unexpected),
                "wrong_shape": [
                    {"name": name, "found": list(found), "expected": list(expected)}
                    for name, found, expected in differences.wrong_shapes
                ],
            }
        else:
            document["problem"] = f"no backbone has such names; the first is {network[0]}"
        # Only the values show damage, copies that differ, and infinities: read them for these errors. In a file that does
        # not fit, only copies are read: if they differ, that is the problem to report.
        for name in network:
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
        "also_holds": list(weights.other_names),
        "not_loaded": list(weights.symbols),
        "code": list(weights.code),
        "imported_from": weights.imported,
        "notes": list(notes),
    }
    return document


def _likely_layout(weights: WeightFile, specs: Iterable[BackboneSpec]) -> str | None:
    """Title of the layout that fits the names in a file best; None: no layout has a mark in it."""
    share, layout = choose_layout([layout for spec in specs for layout in weight_map(spec).layouts], weights.tensors)
    return layout.title if share > 0 else None


def open_identified(
    path: Path, backbone: str | None, entry: str | None = None
) -> tuple[IdentifiedWeights, BackboneSpec]:
    """The weights of a file and their backbone; UserError for a file that fits no backbone, or not the one named.

    A label table without a row for the null label stays as it is in the file, so that no copy hides that.
    """
    weights = open_weights(path, entry=entry, markings=markings_of(candidates(backbone)))
    weights.refuse_code()
    match = identify(weights, candidates(backbone))
    if match.spec is None:
        raise UserError(
            f"{weights.path} is of no known backbone (its first tensor is {next(iter(weights.tensors))});"
            " if it is a plug-in's, install the plug-in"
        )
    if not match.exact:
        problem = match.differences.first()
        if backbone:
            raise UserError(misfit(weights, match.layout, backbone, problem))
        nearest = f"any backbone; the nearest is {match.spec.name}: {problem}"
        raise UserError(f"{weights.path} ({match.layout.title}) does not fit {nearest}")
    recipes: Recipes = {
        name: each.table if isinstance(each, WithNullRow) else each for name, each in match.recipes.items()
    }
    return IdentifiedWeights(file=weights, match=replace(match, recipes=recipes)), match.spec


def import_file(
    path: Path, out: Path | None = None, backbone: str | None = None, entry: str | None = None
) -> tuple[Path, dict[str, Any]]:
    """Write the weights of `path` as safetensors with our names.

    out: the new file; None: beside `path`. backbone: its name; None: it is identified. entry: of a checkpoint that has
    several. Returns (the new file, its
    metadata). "not_loaded" is added to the returned metadata: the classes and functions that `path` names. UserError
    where `out` exists.
    """
    out = out or path.with_name(f"{path.name if path.is_dir() else path.stem}.safetensors")
    refuse_existing(out)
    ours, spec = open_identified(path, backbone, entry)
    match = ours.match
    about: dict[str, Any] = {
        "schema": SCHEMA,
        "backbone": spec.name,
        "arguments": match.arguments,
        "format": match.layout.name,
        "source": {
            "name": ours.file.path.name,
            "sha256": ours.file.sha256(),
            "wrapping": ours.file.wrapping,
            "container": ours.file.container,
        },
        "notes": list(match.notes),
    }
    if ours.file.imported is not None:
        about["imported_before"] = ours.file.imported
    shapes = ours.shapes
    entries = {name: (ours.dtype(name), shapes[name]) for name in match.recipes}
    with new_path(out) as target, unchanged(ours.file):
        write_safetensors(target, entries, ours.read, {METADATA: json.dumps(about)}, f"write {out.name}")
    return out, about | {"not_loaded": list(ours.file.symbols)}


def export_file(
    path: Path, layout: str, out: Path | None = None, backbone: str | None = None, entry: str | None = None
) -> Path:
    """Write the weights of `path` in the public layout of that name; returns the new file, or the folder of diffusers.

    out: the new file or folder; None: beside `path`. entry: of a checkpoint that has several. UserError where it exists.
    """
    ours, spec = open_identified(path, backbone, entry)
    target = _find_layout(spec, layout)
    stem = path.name if path.is_dir() else path.stem
    out = out or path.with_name(f"{stem}-{layout}{target.suffix}")
    refuse_existing(out)
    labels = ours.shapes.get(target.label_table, ())
    if target.store == "diffusers" and labels and labels[0] == spec.arguments(**ours.match.arguments)["num_classes"]:
        raise UserError(
            f"{ours.file.path} has no row for the null label, which diffusers' network has; export it as dit"
        )
    try:
        recipes = target.outward(ours.shapes)
        shapes = {name: recipe.shape(ours.shapes) for name, recipe in recipes.items()}
    except Mismatch as error:
        raise UserError(f"{ours.file.path} cannot be written as {layout}: {error}") from error
    except KeyError as error:  # the layout's map names a tensor that the network does not have
        raise UserError(f"{ours.file.path} cannot be written as {layout}: {error.args[0]} is missing") from error
    entries = {name: (ours.dtype(recipe.sources[0]), shapes[name]) for name, recipe in recipes.items()}

    def read(name: str) -> np.ndarray:
        return recipes[name].evaluate(ours.read)

    title = f"write {out.name}"
    with new_path(out) as unfinished, unchanged(ours.file):
        if target.store == "diffusers":
            unfinished.mkdir()
            assert target.config is not None, target.name
            config = target.config(spec.arguments(**ours.match.arguments), ours.shapes)
            files.write_json(unfinished / "config.json", config)
            weights = unfinished / "diffusion_pytorch_model.safetensors"
            write_safetensors(weights, entries, read, {}, title)
        else:
            _write_torch(unfinished, entries, read, target.store, title)
    return out


def _find_layout(spec: BackboneSpec, layout: str) -> Layout:
    """The layout of that name of the spec's family; UserError if it has none."""
    known = {each.name: each for each in weight_map(spec).layouts}
    if layout not in known:
        raise UserError(f"{spec.name} has no public layout {layout!r}; it has {', '.join(known) or 'none'}")
    return known[layout]


def layout_names() -> list[str]:
    """Names of the layouts of all registered families."""
    return list(dict.fromkeys(layout.name for spec in registry.backbones for layout in weight_map(spec).layouts))


def refuse_existing(path: Path) -> None:
    """UserError where `path` exists."""
    if path.exists() or path.is_symlink():  # also a link to nothing
        raise UserError(f"{path} exists and is not overwritten; choose another name with --out")


@contextmanager
def new_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write a file or folder to; it is renamed to `path` at the end, or removed after an error.

    Unlike `files.replacing` this never replaces an existing file, and it also works for folders.
    """
    with files.explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # a new folder: no file of the user has that name, and no other process writes to it
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=files.PARTIAL, dir=path.parent))
        unfinished = temporary / path.name
        try:
            yield unfinished
            for written in unfinished.iterdir() if unfinished.is_dir() else [unfinished]:
                files.sync_file(written)
            refuse_existing(path)  # it may have been made meanwhile
            unfinished.rename(path)
            files.sync_folder(path.parent)
        finally:
            files.remove(temporary)


def write_safetensors(
    path: Path,
    entries: Entries,
    read: Read,
    metadata: Mapping[str, str],
    title: str,
) -> None:
    """Write a safetensors file one tensor at a time; read(name) is called just before a tensor is written.

    title: of the progress bar. The file must not exist.
    """
    # widest elements first: then every tensor is aligned
    names = sorted(entries, key=lambda name: -raw_dtype(entries[name][0]).itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name in names:
        dtype, shape = entries[name]
        begin, end = end, end + prod(shape) * raw_dtype(dtype).itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in with_progress(title, _read_all(names, entries, read), end):
            file.write(array.reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def _read_all(names: Iterable[str], entries: Entries, read: Read) -> Iterator[np.ndarray]:
    """Yields the values of the tensors `names`, C-contiguous."""
    for name in names:
        array = read(name)
        assert array.shape == entries[name][1] and array.itemsize == raw_dtype(entries[name][0]).itemsize, name
        yield np.ascontiguousarray(array)


def _write_torch(path: Path, entries: Entries, read: Read, store: str, title: str) -> None:
    """Write the state dict with torch.save; it is in memory as a whole, once. store: as in `Layout`."""
    import torch

    from harness.weights.load import as_torch

    nbytes = sum(prod(shape) * raw_dtype(dtype).itemsize for dtype, shape in entries.values())
    state = {}
    for name, array in zip(entries, with_progress(title, _read_all(entries, entries, read), nbytes), strict=True):
        dtype, shape = entries[name]
        state[name] = as_torch(array.reshape(shape), dtype)  # np.ascontiguousarray gives a scalar one axis
    with path.open("xb") as file:
        torch.save({"state_dict": state} if store == "lightning" else state, file)
