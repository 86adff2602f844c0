"""Studies: many runs of one protocol, described by a TOML file.

    name = "xs"                                  # of its folder, runs/studies/NAME; without it the file's own name
    protocol = "digits"                          # or a file, beside this one
    backbones = ["dit-xs-2", "dit-xs-4"]
    seeds = [0, 1]
    budgets = { match = "dit-xs-2@400" }         # or { steps = [...] }, { images = [...] }, { gflops = [...] }

    [sampling]                                   # every combination is a sample set of every run
    steps = [10, 25]
    guidance_scales = [1, 1.5]
    samples = 1000

    [recipe]                                     # laid over the protocol's
    learning_rate = 1e-3

    [backbone.dit-xs-4]                          # the same for one backbone
    learning_rate = 2e-3

    [slurm]                                      # of --launcher slurm
    partition = "gpu"

Nothing here runs anything: `expand` makes runs of a study, `state` finds out how far they are, `local` and `slurm` launch.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.errors import UserError, shown
from harness.io.text import count, read_switch
from harness.protocols import LONGEST_NAME
from harness.registry import unknown
from harness.settings import RunOptions, settings_of, study_settings

WAYS = ("steps", "images", "gflops", "match")  # in which a budget may be given


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study as its file says it, every item checked for its form; names are resolved when it is expanded."""

    name: str
    file: Path
    protocol: str
    backbones: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    budgets: tuple[str, tuple[Any, ...]] | None = None  # way and values; None: the protocol's steps
    evaluate_at: tuple[int, ...] = ()  # further training steps at which samples are drawn
    guidance_scales: tuple[float, ...] | None = None  # None: the protocol's
    settings: dict[str, Any] = field(default_factory=dict)  # of `harness.settings.RunOptions`, the same for every run
    recipe: dict[str, str] = field(default_factory=dict)
    backbone: dict[str, dict[str, str]] = field(default_factory=dict)  # recipes by backbone
    processes: int = 1  # of a run, by torchrun
    slurm: dict[str, Any] = field(default_factory=dict)

    def recipe_of(self, backbone: str) -> dict[str, str]:
        """What of the recipe is overridden for that backbone, as `--set` takes it."""
        return {**self.recipe, **self.backbone.get(backbone, {})}


def load(path: Path) -> Study:
    """Read a study file; what is unknown, missing, mistyped or twice there is refused by name."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"study file {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # of TOML, of its encoding, of numbers too long, of brackets too deep
        raise UserError(f"study file {path} is not valid TOML: {error}") from error
    return from_dict(data, path)


def from_dict(data: dict[str, Any], path: Path) -> Study:
    """A `Study` from plain data; `path` is the file, beside which other files are named."""
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
        raise UserError(f"{path}: name {shown(name)} must be letters, digits, '.', '_' or '-', for it names a folder")
    sampling = items.pop("sampling", {})
    scales = sampling.pop(SCALES, None)
    settings = {RUN_KEYS[key]: items.pop(key) for key in RUN_KEYS if key in items}
    settings |= {SAMPLING_KEYS[key]: value for key, value in sampling.items()}
    for setting, known in settings_of(RunOptions).items():
        if setting in settings and known.type_name == "path":
            settings[setting] = str(path.parent / settings[setting])
    return Study(name=name, file=path, guidance_scales=scales, settings=settings, **items)


def _read(data: Any, known: dict[str, Callable[[Any, str], Any]], where: str) -> dict[str, Any]:
    """The items of a table, each read by what is known of it."""
    if not isinstance(data, dict):
        raise UserError(f"{where} must be a table, not {shown(data)}")
    items = {}
    for name, value in data.items():
        if name not in known:
            raise UserError(f"{where}: {unknown('item', name, known)}")
        try:
            items[name] = known[name](value, f"{where}: [{name}]")
        except UserError:
            raise
        except (ValueError, TypeError, IndexError) as error:
            raise UserError(f"{where}: {name} = {shown(value)}: {error}") from error
    return items


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise ValueError("must be text")
    return value


def _whole(value: Any, where: str, least: int = 0) -> int:
    """A whole number, or a count such as "400k"."""
    number = count(value) if isinstance(value, str) else value
    if not isinstance(number, int) or isinstance(number, bool) or not least <= number < 2**63:
        raise ValueError(f"must be a whole number, {least} or more")
    return number


def _steps(value: Any, where: str) -> int:
    return _whole(value, where, 1)


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError("must be a number")
    return float(value)


def _list(of: Callable[[Any, str], Any]) -> Callable[[Any, str], tuple[Any, ...]]:
    """A list of at least one, each once; a single item stands for a list of it."""

    def read(value: Any, where: str) -> tuple[Any, ...]:
        values = [of(each, where) for each in (value if isinstance(value, list) else [value])]
        if not values:
            raise ValueError("the list is empty")
        for index, each in enumerate(values):
            if each in values[:index]:
                raise ValueError(f"{shown(each)} is named twice")
        return tuple(values)

    return read


def _setting(value: Any) -> str:
    """An item of a recipe as the command line takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float, str)) and str(value).strip():
        return str(value)
    raise ValueError("must be a number, true, false or text")


def _recipe(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ValueError("must be a table")
    if "steps" in value:
        raise UserError(f"{where}: steps are set by budgets = {{ steps = [...] }}")
    return {name: _setting(each) for name, each in value.items()}


def _recipes(value: Any, where: str) -> dict[str, dict[str, str]]:
    if not isinstance(value, dict):
        raise ValueError('must hold tables, as in [backbone."dit-xs-2"]')
    return {name: _recipe(each, f"{where[:-1]}.{name}]") for name, each in value.items()}


def _budgets(value: Any, where: str) -> tuple[str, tuple[Any, ...]]:
    from harness.planning.reference import parse_budget, parse_reference

    def gflops(each: Any, where: str) -> float:
        return parse_budget(str(each))

    def reference(each: Any, where: str) -> Any:
        return parse_reference(_text(each, where))

    ways = {"steps": _list(_steps), "images": _list(_steps), "gflops": _list(gflops), "match": _list(reference)}
    items = _read(value, ways, where)
    if len(items) != 1:
        raise UserError(f"{where}: one of {', '.join(WAYS)} says how long to train, not {len(items)}")
    return next(iter(items.items()))


def _sampling(value: Any, where: str) -> dict[str, Any]:
    known = {key: _reader(name) for key, name in SAMPLING_KEYS.items()}
    return _read(value, {**known, SCALES: _list(_number)}, where)


def _reader(name: str) -> Callable[[Any, str], Any]:
    """What reads a setting of a run from TOML, stricter than a flag: a number is no text."""
    known = settings_of(RunOptions)[name]

    def word(value: Any, where: str) -> str:
        text = _text(value, where)
        if known.choices and text not in known.choices:
            raise ValueError(f"choose one of {', '.join(known.choices)}")
        return text

    readers: dict[str, Callable[[Any, str], Any]] = {
        "count": _steps,
        "counts": lambda value, where: tuple(sorted(_list(_steps)(value, where))),
        "seed": _whole,
        "float": _number,
    }
    if known.read is read_switch:
        return _switch
    return _list(word) if known.repeat else readers.get(known.type_name, word)


def _switch(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _table(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("must be a table")
    return value


SCALES = "guidance_scales"  # of [sampling]: a list, of which each scale has sample sets of its own
RUN_KEYS = study_settings(RunOptions, "")  # keys of the top level -> settings of a run
SAMPLING_KEYS = {key: name for key, name in study_settings(RunOptions, "sampling").items() if key != SCALES}
ITEMS: dict[str, Callable[[Any, str], Any]] = {
    "name": _text,
    "protocol": _text,
    "backbones": _list(_text),
    "seeds": _list(_whole),
    "budgets": _budgets,
    "evaluate_at": _list(_steps),
    "sampling": _sampling,
    "recipe": _recipe,
    "backbone": _recipes,
    "processes": _steps,
    "slurm": _table,
    **{key: _reader(name) for key, name in RUN_KEYS.items()},
}
