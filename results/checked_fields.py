"""Dataclasses whose fields are checked by their annotations, and their canonical JSON: the base of records."""

import dataclasses
import functools
import json
import math
import numbers
import types
import typing
from collections.abc import Mapping
from typing import Any

from harness.errors import UserError

INTEGERS = 1 << 1000  # beyond all integers of a record, and within the range of floats, as which tables print them

_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
_UNCHECKED: set[type] = {
    str,
    int,
    bool,
}  # types whose instances _coerce returns as they are; and the dataclasses themselves


class BrokenRecord(UserError):
    """A line or object that is not a record; the message names the field that is missing, unknown, mistyped or out of range."""


class CheckedFields:
    """Base of the dataclasses of a record: checks and converts the fields at construction, by their annotations.

    Numpy scalars become Python numbers, and integers in float fields become floats. Raises BrokenRecord.
    """

    def __init_subclass__(cls) -> None:
        _UNCHECKED.add(cls)

    def __post_init__(self) -> None:
        cls: type = type(self)
        hints, optional = field_types(cls), _optional(cls)
        for name, value in tuple(vars(self).items()):
            if value is None and name in optional:
                continue
            hint = hints[name]
            # Two shortcuts for values that _coerce would return as they are. 0.0 takes the long way, because it may be
            # -0.0, which becomes 0.0.
            if type(value) is hint and hint in _UNCHECKED and not (isinstance(value, int) and abs(value) >= INTEGERS):
                continue
            if hint is float and type(value) is float and value and math.isfinite(value):
                continue
            try:
                checked = _coerce(value, hint)
            except (TypeError, ValueError, OverflowError) as error:
                raise BrokenRecord(f"record field {cls.__name__}.{name}: {error}") from None
            if checked is not value:
                object.__setattr__(self, name, checked)

    @functools.cached_property
    def canonical(self) -> str:
        """Canonical JSON without the fields that are None: equal content gives equal text."""
        return canonical_json(to_dict(self))


def canonical_json(value: object) -> str:
    """JSON in ASCII with sorted keys and no spaces: equal values give equal text. ValueError for NaN and infinity."""
    return _ENCODER.encode(value)


def to_dict(node: CheckedFields) -> dict[str, Any]:
    """The fields of a record or part that are not None, as a dict; parts as dicts too."""
    cls: type = type(node)
    hints = field_types(cls)
    return {
        name: to_dict(value) if isinstance(value, CheckedFields) else value
        for name, value in vars(node).items()
        if value is not None and name in hints  # vars also holds what is cached: hashes and JSON
    }


@functools.cache
def field_types(cls: type) -> dict[str, type]:
    """The type of each field of a record class, without "or None" and type arguments: Mapping for Mapping[str, str]."""
    hints = {}
    for name, hint in typing.get_type_hints(cls).items():
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        (kind,) = (option for option in options if option is not types.NoneType)
        hints[name] = typing.get_origin(kind) or kind
    return hints


@functools.cache
def _optional(cls: type) -> frozenset[str]:
    """The names of the fields of a record class that may be None."""
    hints = typing.get_type_hints(cls)
    return frozenset(name for name, hint in hints.items() if types.NoneType in typing.get_args(hint))


@functools.cache
def required_fields(cls: type) -> frozenset[str]:
    """The names of the fields of a record class that have no default."""
    absent = dataclasses.MISSING
    fields = dataclasses.fields(cls)
    return frozenset(field.name for field in fields if field.default is absent and field.default_factory is absent)


def _coerce(value: object, kind: type) -> Any:
    """`value` converted to `kind`; numpy scalars become Python numbers.

    Raises TypeError, ValueError or OverflowError with a message that quotes the value.
    """
    if kind is float:
        if type(value) is not float:
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise TypeError(f"{value!r} is not a number")
            value = float(value)
        if not math.isfinite(value):
            raise ValueError(f"{value} is not finite")
        return value if value else 0.0  # -0.0 and 0.0 are one value and must have one id
    if kind is int:
        if type(value) is not int:
            if isinstance(value, bool) or not isinstance(value, numbers.Integral):
                raise TypeError(f"{value!r} is not an integer")
            value = int(value)
        if abs(value) >= INTEGERS:
            raise ValueError("an integer beyond the range of floats")
        return value
    if kind is Mapping:
        if not isinstance(value, Mapping) or not all(type(x) is str for pair in value.items() for x in pair):
            raise TypeError(f"{value!r} is not a mapping of texts to texts")
        return dict(sorted(value.items()))
    if not isinstance(value, kind):
        raise TypeError(f"{value!r} is not a {kind.__name__}")
    return value
