"""The weight files in a folder of diffusers, Hugging Face or a training script: which of them, and files in several parts.

Names follow diffusers 0.39 utils/constants.py and transformers: STEM.safetensors or STEM.bin, a variant as in
STEM.fp16.safetensors, and an index as in STEM.safetensors.index.json, which says the part that holds each tensor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from harness.errors import UserError, shown
from harness.weights.containers import FileContents, open_file
from harness.weights.entries import MAX_NAMED
from harness.weights.holders import entry_words, is_average, is_optimizer
from harness.weights.objects import escaped
from harness.weights.tensors import Stored

STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
SUBFOLDERS = ("transformer", "unet")  # of a pipeline, or of a training's checkpoint
AVERAGE_SUFFIX = "_ema"  # of the folder beside one of SUBFOLDERS that diffusers' training scripts write
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".pkl")
INDEX = re.compile(r".+\.index(\.[A-Za-z0-9_]+)?\.json")
PART = re.compile(r"(.+)-[0-9]{5}-of-(?!00001)[0-9]{5}(\.[a-z]+)")
LONGEST_INDEX = 1 << 24  # characters of an index; 1000 tensors: 100 kB
MAX_PARTS = 1000


def find_file(path: Path, wanted: str | None = None) -> tuple[Path, tuple[str, ...]]:
    """(the weight file or index in the folder `path`, notes for the user); a path that is no folder is returned as it is.

    wanted: the file or folder in `path` to take; None: the one known by its name, a moving average before raw weights.
    UserError if there is none, or if several fit equally.
    """
    if not path.is_dir():
        return path, ()
    if wanted is not None and ".." not in Path(wanted).parts and (path / wanted).exists():
        return find_file(path / wanted)
    if (found := known_file(path)) is not None:
        return found, ()
    folders = [path / f"{name}{suffix}" for name in SUBFOLDERS for suffix in (AVERAGE_SUFFIX, "")]
    files = {folder: file for folder in folders if folder.is_dir() and (file := known_file(folder)) is not None}
    for name in SUBFOLDERS:
        average, raw = path / f"{name}{AVERAGE_SUFFIX}", path / name
        if average in files and raw in files:
            return files[average], (f"the weights are the moving average in {average.name}/, not those in {name}/",)
        if average in files or raw in files:
            return files[average if average in files else raw], ()
    return _only_file(path)


def is_index(path: Path) -> bool:
    """Whether a file is the index of weights in several parts, by its name."""
    return INDEX.fullmatch(path.name) is not None


def open_parts(index: Path) -> tuple[FileContents, tuple[Path, ...]]:
    """(the tensors of all parts that `index` names, as of one file; the files of these parts).

    No part may lie outside the folder of the index. UserError for a part that is missing or damaged, a tensor that is not
    in its part, and a name that two parts have.
    """
    try:
        with index.open(encoding="utf-8") as file:
            text = file.read(LONGEST_INDEX + 1)
        document = json.loads(text) if len(text) <= LONGEST_INDEX else None
    except OSError as error:
        raise UserError(f"{index}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{index} is no valid index of weights: {escaped(str(error))}") from error
    places = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(part, str) for part in places.values()):
        raise UserError(f"{index} is no index of weights: it has no weight_map from tensors to files; fetch it again")
    names = list(dict.fromkeys(places.values()))
    if len(names) > MAX_PARTS:
        raise UserError(f"{index} names {len(names):,} files, more than weights have; it is not read")
    tensors: dict[str, Stored] = {}
    holder: dict[str, str] = {}  # tensor -> part
    opened: list[FileContents] = []
    for name in names:
        part = _inside(index, name)
        if not part.is_file():
            raise UserError(f"{index} names {shown(name)}, which is not there; fetch all parts")
        contents = open_file(part)
        if not isinstance(contents.value, dict):
            raise UserError(f"{part} holds no state dict, so it is no part of {index.name}; fetch it again")
        opened.append(contents)
        for key, tensor in contents.value.items():
            if not isinstance(tensor, Stored):
                continue
            if key in tensors:
                raise UserError(
                    f"{index}: {escaped(str(key))} is in {shown(holder[key])} and in {shown(name)}; fetch them again"
                )
            tensors[key], holder[key] = tensor, name
    for key, name in places.items():
        if holder.get(key) != name:
            raise UserError(
                f"{index}: {escaped(key)} is not in {shown(name)}, where it should be; fetch all parts again"
            )
    symbols = tuple(dict.fromkeys(symbol for contents in opened for symbol in contents.symbols))
    merged = replace(opened[0], path=index, value=tensors, symbols=symbols)
    return merged, tuple(contents.path for contents in opened)


def refuse_single_part(path: Path) -> None:
    """UserError for one part of several, by its name, if the index is beside it."""
    if (match := PART.fullmatch(path.name)) is None:
        return
    index = path.with_name(f"{match[1]}{match[2]}.index.json")
    if index.is_file():
        raise UserError(f"{path} is one part of several; give the index, {index.name}, or the folder")


def _inside(index: Path, name: str) -> Path:
    """The part `name`; UserError for a name that leads out of the folder of the index."""
    parts = re.split(r"[/\\]", name)
    if not name.strip() or ".." in parts or "" in parts or ":" in name or not name.isprintable():
        raise UserError(f"{index} names {shown(name)}, which is not a file in its folder; nothing was read of it")
    return index.parent / name


def known_file(folder: Path) -> Path | None:
    """The file in `folder` with a name that diffusers or transformers give to weights; None if there is none.

    Files without a variant come first, then safetensors before pickles. UserError if only several variants are there.
    """
    names = sorted(each.name for each in folder.iterdir() if each.is_file())
    for stem in STEMS:
        found: dict[str, dict[str, str]] = {}  # variant -> form -> name
        for name in names:
            single = re.fullmatch(rf"{stem}(?:\.([A-Za-z0-9_]+))?\.(safetensors|bin)", name)
            index = re.fullmatch(rf"{stem}\.(safetensors|bin)\.index(?:\.([A-Za-z0-9_]+))?\.json", name)
            if single:
                found.setdefault(single[1] or "", {})[single[2]] = name
            elif index:
                found.setdefault(index[2] or "", {})[f"{index[1]} index"] = name
        if not found:
            continue
        variants = [""] if "" in found else [each for each in found if is_average([each])] or sorted(found)
        if len(variants) > 1:
            listed = ", ".join(next(iter(found[each].values())) for each in variants)
            raise UserError(f"{folder} has several variants of its weights: {listed}; name one of them")
        forms = found[variants[0]]
        for form in ("safetensors", "safetensors index", "bin", "bin index"):
            if form in forms:
                return folder / forms[form]
    return None


def _only_file(folder: Path) -> tuple[Path, tuple[str, ...]]:
    """(the only weight file directly in `folder`, or the only moving average among several; notes); else UserError."""
    files = sorted(each for each in folder.iterdir() if each.suffix in SUFFIXES and each.is_file())
    indices = sorted(each for each in folder.iterdir() if is_index(each) and each.is_file())
    files = [each for each in files if not is_optimizer([each.stem]) and PART.fullmatch(each.name) is None]
    files = [each for each in files if not {"rng", "random", "states"} & set(entry_words(each.stem))] + indices
    averages = [each for each in files if is_average([each.stem])]
    if len(averages) == 1 and len(files) > 1:
        return averages[0], (f"of the {len(files)} weight files in {folder.name}/ it is the moving average",)
    if len(files) == 1:
        return files[0], ()
    if not files:
        names = sorted(f"{each.name}/" if each.is_dir() else each.name for each in folder.iterdir())
        holds = f"it has {_few(names)}" if names else "it is empty"
        raise UserError(
            f"{folder} has no weight file ({holds}); expected {STEMS[0]}.safetensors, {STEMS[2]}.bin, or one file that "
            f"ends in {', '.join(SUFFIXES[:5])}"
        )
    raise UserError(f"{folder} has several weight files: {_few([each.name for each in files])}; name one of them")


def _few(names: Sequence[str]) -> str:
    """The first names, and the number of the others."""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(map(escaped, names[:MAX_NAMED])) + more
