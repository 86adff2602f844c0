"""Studies: many runs of one protocol, described by a TOML file.

    name = "xs"                                  # of the folder runs/studies/NAME; default: the name of the file
    protocol = "digits"                          # or a file next to this one
    backbones = ["dit-xs-2", "dit-xs-4"]
    seeds = [0, 1]
    budgets = { match = "dit-xs-2@400" }         # or { steps = [...] }, { images = [...] }, { gflops = [...] }

    [sampling]                                   # each combination is one sample set of each run
    steps = [10, 25]
    guidance_scales = [1, 1.5]                   # or "1.5@0.1-0.8", as for --cfg
    seeds = [0, 1, 2]                            # of the samples; or seed = 0
    samples = 1000

    [recipe]                                     # overrides the protocol's recipe
    learning_rate = 1e-3

    [backbone.dit-xs-4]                          # the same for one backbone
    learning_rate = 2e-3

    [variant.flow]                               # each variant is one more way to train and sample every backbone
    recipe = { objective = "sit" }
    sampling = { sampler = "heun", steps = [5, 13] }

    [slurm]                                      # settings for --launcher slurm
    partition = "gpu"

This module reads the file; `expand` makes the runs, `state` reads their progress, `local` and `slurm` launch them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from harness.diffusion.guidance import Guidance, read_guidance
from harness.errors import UserError, shown
from harness.io.text import MAX_INT, count, read_switch, read_toml
from harness.protocols import LONGEST_NAME
from harness.registry import unknown
from harness.settings import RunOptions, settings_of, study_settings

BUDGET_KINDS = ("steps", "images", "gflops", "match")  # the keys of `budgets`


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to train and sample all backbones of a study: overrides of its recipe and its settings."""

    recipe: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)  # fields of `harness.settings.RunOptions`


@dataclass(frozen=True, kw_only=True)
class Study:
    """The content of a study file. The form of each item has been checked; names are resolved by `expand`."""

    name: str
    file: Path
    protocol: str
    backbones: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    budgets: tuple[str, tuple[Any, ...]] | None = None  # kind and values; None: the protocol's steps
    evaluate_at: tuple[int, ...] = ()  # further training steps at which the run is sampled
    guidance_scales: tuple[Guidance, ...] | None = None  # None: the protocol's
    sampling_seeds: tuple[int, ...] | None = None  # None: the one of `settings` or of the protocol
    settings: dict[str, Any] = field(default_factory=dict)  # fields of `harness.settings.RunOptions`, for all runs
    recipe: dict[str, str] = field(default_factory=dict)
    backbone: dict[str, dict[str, str]] = field(default_factory=dict)  # overrides of the recipe by backbone
    variants: dict[str, Variant] = field(default_factory=lambda: {"": Variant()})  # by name; "": the study itself
    processes: int = 1  # processes of one run, started by torchrun
    slurm: dict[str, Any] = field(default_factory=dict)

    def with_plugins(self, paths: tuple[Path, ...]) -> Study:
        """A copy whose runs load these plug-in files. A study file cannot name them, because they are executed."""
        return replace(self, settings={**self.settings, "plugin": paths}) if paths else self

    def recipe_of(self, backbone: str, variant: str) -> dict[str, str]:
        """The overrides of the recipe for that backbone in that variant, as `--set` takes them."""
        return {**self.recipe, **self.variants[variant].recipe, **self.backbone.get(backbone, {})}


def load(path: Path) -> Study:
    """The study in a TOML file.

    Raises `UserError`, which names the item, if an item is unknown, is missing, has another type or is given twice.
    """
    return from_dict(read_toml(path, "study"), path)


def from_dict(data: dict[str, Any], path: Path) -> Study:
    """A `Study` from plain data; `path` is its file, and relative paths are relative to the folder of that file."""
    items = _read(data, ITEMS, str(path))
    for name in ("protocol", "backbones"):
        if name not in items:
            raise UserError(f"{path}: {name} is missing")
    if items["protocol"].endswith(".toml"):
        items["protocol"] = str(path.parent / items["protocol"])
    for name in items.get("backbone", {}):
        if name not in items["backbones"]:
            raise UserError(f"{path}: [backbone]: {unknown('backbone of this study', name, items['backbones'])}")
    name = items.pop("name", None) or path.stem
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or len(name) > LONGEST_NAME:
        raise UserError(
            f"{path}: name {shown(name)} must be letters, digits, '.', '_' or '-', because it names a folder"
        )
    sampling = items.pop("sampling", {})
    scales = sampling.pop(GUIDANCE_SCALES, None)
    sampling_seeds = sampling.pop(SAMPLING_SEEDS, None)
    if sampling_seeds is not None and "seed" in sampling:
        raise UserError(f"{path}: [sampling]: give seed or seeds, not both")
    settings = {RUN_KEYS[key]: items.pop(key) for key in RUN_KEYS if key in items}
    settings |= {SAMPLING_KEYS[key]: value for key, value in sampling.items()}
    if variants := items.pop("variant", {}):
        items["variants"] = variants
    for setting, info in settings_of(RunOptions).items():
        if setting in settings and info.type_name == "path":
            settings[setting] = str(path.parent / settings[setting])
    # the items that are left have the names of fields of `Study`
    return Study(
        name=name, file=path, guidance_scales=scales, sampling_seeds=sampling_seeds, settings=settings, **items
    )


def _read(data: object, readers: dict[str, Callable[[Any, str], Any]], where: str) -> dict[str, Any]:
    """The items of the table `data`, each parsed by its function in `readers`; `where` names the table in messages."""
    if not isinstance(data, dict):
        raise UserError(f"{where} must be a table, not {shown(data)}")
    items = {}
    for name, value in data.items():
        if name not in readers:
            raise UserError(f"{where}: {unknown('item', name, readers)}")
        try:
            items[name] = readers[name](value, f"{where}: [{name}]")
        except UserError:
            raise
        except (ValueError, TypeError, IndexError) as error:
            raise UserError(f"{where}: {name} = {shown(value)}: {error}") from error
    return items


# The functions below parse one item each, with the parameters that `_read` gives them: the value and the name of the
# table in messages. They raise ValueError, or UserError if they name the table themselves.


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise ValueError("must be text")
    return value


def _integer(value: object, where: str, minimum: int = 0) -> int:
    """A whole number, also from a count such as "400k"."""
    number = count(value) if isinstance(value, str) else value
    if not isinstance(number, int) or isinstance(number, bool) or not minimum <= number < 2**63:
        raise ValueError(f"must be a whole number, {minimum} or more")
    return number


def _positive(value: object, where: str) -> int:
    return _integer(value, where, 1)


def _number(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -MAX_INT <= value <= MAX_INT:
        raise ValueError("must be a number")
    return float(value)


def _guidance(value: object, where: str) -> Guidance:
    """A scale, or text such as "1.5@0.1-0.8" or "1.5:NAME"."""
    is_text = isinstance(value, str) and any(mark in value for mark in "@:")
    return read_guidance(value) if is_text else Guidance(_number(value, where))


def _list(read_item: Callable[[Any, str], Any]) -> Callable[[Any, str], tuple[Any, ...]]:
    """Returns the parser of a list of items, which must not be empty or have duplicates. A single item is a list of one."""

    def read(value: object, where: str) -> tuple[Any, ...]:
        values = [read_item(each, where) for each in (value if isinstance(value, list) else [value])]
        if not values:
            raise ValueError("the list is empty")
        for index, each in enumerate(values):
            if each in values[:index]:
                raise ValueError(f"{shown(each)} is named twice")
        return tuple(values)

    return read


def _recipe_value(value: object) -> str:
    """The value of a recipe's item as text for `--set`."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float, str)) and str(value).strip():
        return str(value)
    raise ValueError("must be a number, true, false or text")


def _recipe(value: object, where: str) -> dict[str, str]:
    """Overrides of the recipe: name -> text."""
    if not isinstance(value, dict):
        raise ValueError("must be a table")
    if "steps" in value:
        raise UserError(f"{where}: steps are set by budgets = {{ steps = [...] }}")
    return {name: _recipe_value(each) for name, each in value.items()}


def _recipes(value: object, where: str) -> dict[str, dict[str, str]]:
    """Overrides of the recipe by backbone."""
    if not isinstance(value, dict):
        raise ValueError('must hold tables, as in [backbone."dit-xs-2"]')
    # `where` ends with "[backbone]"; in messages on one backbone it becomes "[backbone.NAME]"
    return {name: _recipe(each, f"{where[:-1]}.{name}]") for name, each in value.items()}


def _variants(value: object, where: str) -> dict[str, Variant]:
    """The variants by name."""
    if not isinstance(value, dict):
        raise ValueError("must hold tables, as in [variant.flow]")
    readers: dict[str, Callable[[Any, str], Any]] = {"recipe": _recipe, "sampling": _read_sampling_settings}
    variants = {}
    for name, table in value.items():
        items = _read(table, readers, f"{where[:-1]}.{name}]")
        variants[name] = Variant(recipe=items.get("recipe", {}), settings=items.get("sampling", {}))
    return variants


def _read_sampling_settings(value: object, where: str) -> dict[str, Any]:
    """The table `sampling` of a variant: setting -> parsed value."""
    items = _read(value, {key: _reader(name) for key, name in SAMPLING_KEYS.items()}, where)
    return {SAMPLING_KEYS[key]: each for key, each in items.items()}


def _budgets(value: object, where: str) -> tuple[str, tuple[Any, ...]]:
    """(one of BUDGET_KINDS, its values)."""
    from harness.planning.reference import parse_budget, parse_reference

    def gflops(each: object, where: str) -> float:
        return parse_budget(str(each))

    def reference(each: object, where: str) -> Any:
        return parse_reference(_text(each, where))

    kinds = {"steps": _list(_positive), "images": _list(_positive), "gflops": _list(gflops), "match": _list(reference)}
    items = _read(value, kinds, where)
    if len(items) != 1:
        raise UserError(f"{where}: give one of {', '.join(BUDGET_KINDS)}, not {len(items)}")
    return next(iter(items.items()))


def _sampling(value: object, where: str) -> dict[str, Any]:
    """The table [sampling]: key -> parsed value."""
    readers = {key: _reader(name) for key, name in SAMPLING_KEYS.items()}
    return _read(value, {**readers, GUIDANCE_SCALES: _list(_guidance), SAMPLING_SEEDS: _list(_integer)}, where)


def _reader(name: str) -> Callable[[Any, str], Any]:
    """Returns the parser of a run's setting from TOML. Text must be TOML text and a number a TOML number.

    A whole number may also be text such as "400k".
    """
    info = settings_of(RunOptions)[name]

    def word(value: object, where: str) -> str:  # any text, or one of the setting's choices
        text = _text(value, where)
        if info.choices and text not in info.choices:
            raise ValueError(f"choose one of {', '.join(info.choices)}")
        return text

    readers: dict[str, Callable[[Any, str], Any]] = {
        "count": _positive,
        "counts": lambda value, where: tuple(sorted(_list(_positive)(value, where))),
        "seed": _integer,
        "float": _number,
    }
    if info.read is read_switch:
        return _switch
    return _list(word) if info.repeat else readers.get(info.type_name, word)


def _switch(value: object, where: str) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _table(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("must be a table")
    return value


GUIDANCE_SCALES = "guidance_scales"  # key of [sampling]: a list; each scale has its own sample sets
SAMPLING_SEEDS = "seeds"  # key of [sampling]: a list; each seed has its own sample sets
RUN_KEYS = study_settings(RunOptions, "")  # top-level key -> setting of a run
SAMPLING_KEYS = {key: name for key, name in study_settings(RunOptions, "sampling").items() if key != GUIDANCE_SCALES}
ITEMS: dict[str, Callable[[Any, str], Any]] = {
    # top-level key: its parser, a function of (value, name of the table in messages)
    "name": _text,
    "protocol": _text,
    "backbones": _list(_text),
    "seeds": _list(_integer),
    "budgets": _budgets,
    "evaluate_at": _list(_positive),
    "sampling": _sampling,
    "recipe": _recipe,
    "backbone": _recipes,
    "variant": _variants,
    "processes": _positive,
    "slurm": _table,
    **{key: _reader(name) for key, name in RUN_KEYS.items()},
}
