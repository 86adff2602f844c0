"""Reads systems: by name, or from a TOML file (for its form see `spec.py`), in which every item is checked."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, TypeVar

from harness import registry
from harness.errors import UserError, shown
from harness.io.text import read_toml
from harness.protocols import LONGEST_NAME, MAX_INT
from harness.registry import unknown
from harness.systems.spec import Component, GuidanceClassifier, System, WeakNetwork

Item = TypeVar("Item", Component, WeakNetwork, GuidanceClassifier, System)


def system_from_dict(data: dict[str, Any], where: str) -> System:
    """A `System` from plain data. where: names the file in messages.

    Raises `UserError`, which names the item, if one is unknown, is missing or has another type.
    """
    data = dict(data)
    for name in ("row", "unavailable"):
        if name in data:
            raise UserError(f"{where}: {name} is for the built-in systems; leave it out")
    if "base" in data:
        data["base"] = _from_table(Component, data["base"], f"{where}: [base]")
    if "weak" in data:
        data["weak"] = _from_table(WeakNetwork, data["weak"], f"{where}: [weak]")
    if "classifier" in data:
        data["classifier"] = _from_table(GuidanceClassifier, data["classifier"], f"{where}: [classifier]")
    upsamplers = data.get("upsamplers", [])
    if not isinstance(upsamplers, list):
        raise UserError(f"{where}: upsamplers must be tables, written [[upsamplers]]")
    if isinstance(data.get("name"), str) and data["name"] in registry.systems:
        raise UserError(f"{where}: the name {data['name']!r} is that of a built-in system; choose another")
    data["upsamplers"] = tuple(_from_table(Component, each, f"{where}: [[upsamplers]]") for each in upsamplers)
    return _from_table(System, data, where)


def load_system(path: Path) -> System:
    """The system in a TOML file. Raises `UserError` if the file cannot be read or is not valid."""
    return system_from_dict(read_toml(path, "system"), str(path))


def get_system(name: str) -> System:
    """The system of that name, or the one in the file if the name ends in .toml."""
    return load_system(Path(name)) if name.endswith(".toml") else registry.systems.get(name)


def _from_table(cls: type[Item], data: object, where: str) -> Item:
    """An instance of the dataclass `cls` from a table of a file; `where` names the table in messages.

    Raises `UserError` if an item is unknown, is missing or has another type.
    """
    if not isinstance(data, dict):
        raise UserError(f"{where} must be a table, not {type(data).__name__}")
    fields = {each.name: each for each in dataclasses.fields(cls)}
    values = {}
    for name, value in data.items():
        if name not in fields:
            raise UserError(f"{where}: {unknown('item', name, fields)}")
        type_name = str(fields[name].type)  # already text, because `spec.py` postpones annotations
        if type(value) is int and abs(value) > MAX_INT:
            raise UserError(f"{where}: {name} = {shown(value)} is out of range")
        if type_name == "float" and type(value) is int:
            value = float(value)
        types = {"int": int, "float": float, "str": str, "bool": bool, "dict[str, Any]": dict}
        if type_name in types and type(value) is not types[type_name]:
            raise UserError(f"{where}: {name} = {shown(value)} must be of type {type_name.partition('[')[0]}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{where}: {name} must be a finite number, not {value}")
        if type_name.startswith("dict"):  # arguments of a network; TOML has no tuples
            if invalid := [key for key, each in value.items() if not _is_argument(each)]:
                raise UserError(
                    f"{where}: {name}: {invalid[0]} = {shown(value[invalid[0]])} is no argument of a network"
                )
            value = {key: tuple(each) if isinstance(each, list) else each for key, each in value.items()}
        values[name] = value
    for name, each in fields.items():
        if name not in values and each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING:
            raise UserError(f"{where}: {name} is missing")
    return cls(**values)


def _is_argument(value: object, depth: int = 2) -> bool:
    """Whether `value` can be an argument of a network: a finite number, true or false, a name, or a list of such values.

    depth: how many levels of lists are allowed; 2: lists of lists.
    """
    if isinstance(value, list):
        return depth > 0 and all(_is_argument(each, depth - 1) for each in value)
    if isinstance(value, str):
        return value.isprintable() and len(value) <= LONGEST_NAME
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, bool) or (isinstance(value, int) and abs(value) <= MAX_INT)
