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
from harness.loggers import LOGGERS
from harness.protocols import LONGEST_NAME, count
from harness.registry import unknown

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
    evaluate_at: tuple[int, ...] = ()  # steps after which samples are drawn, too
    sampling: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, str] = field(default_factory=dict)
    backbone: dict[str, dict[str, str]] = field(default_factory=dict)  # recipes by backbone
    processes: int = 1  # of a run, by torchrun
    options: dict[str, Any] = field(default_factory=dict)  # of `harness run`, passed on; a tuple: repeated
    slurm: dict[str, Any] = field(default_factory=dict)

    def settings(self, backbone: str) -> dict[str, str]:
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
    for name in ("protocol", "data"):
        text = items.get(name)
        if text and (name == "data" or text.endswith(".toml")):
            items[name] = str(path.parent / text)
    for name in items.get("backbone", {}):
        if name not in items["backbones"]:
            raise UserError(f"{path}: [backbone]: {unknown('backbone of this study', name, items['backbones'])}")
    name = items.pop("name", None) or path.stem
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or len(name) > LONGEST_NAME:
        raise UserError(f"{path}: name {shown(name)} must be letters, digits, '.', '_' or '-', for it names a folder")
    options = {option: items.pop(option) for option in OPTIONS if option in items}
    return Study(name=name, file=path, options=options, **items)


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


def _logger(value: Any, where: str) -> str:
    if (text := _text(value, where)) not in LOGGERS:
        raise ValueError(f"no logger has that name; there are {' and '.join(LOGGERS)}")
    return text


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
    from harness.planning.matching import parse_budget, parse_reference

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
    known = {
        "steps": _list(_steps),
        "guidance_scales": _list(_number),
        "samples": _steps,
        "sampler": _text,
        "eta": _number,
        "guidance_channels": _text,
        "label_policy": _text,
        "seed": _whole,
    }
    items = _read(value, known, where)
    if "steps" in items:
        items["steps"] = tuple(sorted(items["steps"]))
    return items


def _table(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("must be a table")
    return value


OPTIONS: dict[str, Callable[[Any, str], Any]] = {  # passed on to `harness run` under the same names
    "data": _text,
    "framework": _text,
    "precision": _text,
    "micro_batch": _steps,
    "device": _text,
    "mesh": _text,
    "logger": _list(_logger),
}
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
    **OPTIONS,
}
