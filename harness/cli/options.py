"""Command-line options made from the table of settings, and the few that are the command line's alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from harness.io.text import read_count
from harness.settings import Options, Setting, settings_of

Function = TypeVar("Function", bound=Callable[..., Any])

FOLDER = click.Path(path_type=Path)


class Value(click.ParamType):
    """What a reader of the harness makes of the text; its ValueError says what is wrong."""

    def __init__(self, name: str, read: Callable[[Any], Any]):
        self.name, self.read = name, read

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self.read(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


COUNT = Value("count", read_count)

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout, nothing else.")


def settings_options(options: type[Options]) -> Callable[[Function], Function]:
    """Decorator: the command takes every setting of `options`, under the setting's own name."""

    def decorate(function: Function) -> Function:
        defaults = {field.name: field.default for field in dataclasses.fields(options)}  # type: ignore[arg-type]
        for name, known in reversed(settings_of(options).items()):
            function = _parameter(name, known, defaults[name])(function)
        return function

    return decorate


def _parameter(name: str, known: Setting, default: object) -> Callable[[Function], Function]:
    """The click option, or argument, of one setting."""
    if known.argument:
        return click.argument(name, type=_type(known), metavar=known.metavar or name.upper())
    flags = known.flags or (known.flag(name),)
    required = default is dataclasses.MISSING and not known.repeat
    attributes: dict[str, Any] = {"help": _help(known), "required": required}
    if isinstance(default, bool):
        attributes |= {"is_flag": True, "default": default, "required": False}
    elif known.repeat:
        attributes |= {"multiple": True, "type": _type(known)}
    else:
        attributes["type"] = _type(known)
        if not required and default is not None:
            attributes |= {"default": default, "show_default": known.show_default}
    if known.metavar:
        attributes["metavar"] = known.metavar
    return click.option(*flags, name, **attributes)


def _type(known: Setting) -> click.ParamType:
    if known.choices:
        return click.Choice(known.choices)
    if known.type_name == "path":
        return FOLDER
    if known.repeat:  # the whole is read when the options are put together
        return click.STRING
    return Value(known.type_name or "text", known.read)


def _help(known: Setting) -> str:
    return f"{known.help} [default: {known.default_text}]" if known.default_text else known.help
