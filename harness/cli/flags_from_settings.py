"""click options made from the table of settings (`harness.settings`), and helpers for the options of single commands."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from harness.io.text import read_count, read_path, read_text
from harness.settings import Options, Setting, settings_of
from harness.settings.plugin_flags import PLUGIN_HELP

Function = TypeVar("Function", bound=Callable[..., Any])


class Value(click.ParamType):
    """The click type of a reader from `harness.io.text`: it parses the text, and its ValueError is the usage message."""

    def __init__(self, name: str, read: Callable[[Any], Any]):
        self.name, self.read = name, read

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self.read(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


COUNT = Value("count", read_count)
TEXT = Value("text", read_text)


class _PathType(click.Path):
    """A path as `read_path` returns it; shells complete it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return read_path(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


PATH = _PathType()


def _load_plugins(ctx: click.Context, param: click.Parameter, value: tuple[Path, ...]) -> tuple[Path, ...]:
    from harness.plugins.files import load_plugins

    load_plugins(value)
    return value


def plugin_option(function: Function | None = None, *, expose_value: bool = False) -> Any:
    """Decorator: the option --plugin of commands whose options are no settings. It loads the files."""
    # Eager: names are looked up while the other options are read.
    option = click.option(
        "--plugin", type=PATH, multiple=True, metavar="FILE.py", is_eager=True, expose_value=expose_value,
        callback=_load_plugins, help=PLUGIN_HELP,
    )  # fmt: skip
    return option if function is None else option(function)


entry_option = click.option(
    "--entry",
    metavar="NAME",
    help="Part of a checkpoint to read, such as model or ema.shadow. [default: the only one that fits, a moving average "
    "before raw weights]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout, nothing else.")


def settings_options(options: type[Options]) -> Callable[[Function], Function]:
    """Decorator: gives the command one option for each setting of `options`, under the name of the setting."""

    def decorate(function: Function) -> Function:
        defaults = {field.name: field.default for field in dataclasses.fields(options)}  # type: ignore[arg-type]
        for name, info in reversed(settings_of(options).items()):  # the decorator applied last comes first in the help
            function = _parameter(name, info, defaults[name])(function)
        return function

    return decorate


def _parameter(name: str, info: Setting, default: object) -> Callable[[Function], Function]:
    """The decorator that adds the click option, or argument, of one setting. default: MISSING if it has none."""
    if info.argument:
        return click.argument(name, type=_type(info), metavar=info.metavar or name.upper())
    flags = info.flags or (info.flag(name),)
    # A setting that holds a dict has a default factory, so its default is MISSING, too; all these are repeatable.
    required = default is dataclasses.MISSING and not info.repeat
    attributes: dict[str, Any] = {"help": _help(info), "required": required}
    if isinstance(default, bool):
        attributes |= {"is_flag": True, "default": default}
    elif info.repeat:
        attributes |= {"multiple": True, "type": _type(info)}
    else:
        attributes["type"] = _type(info)
        if not required and default is not None:
            attributes |= {"default": default, "show_default": info.show_default}
    if info.metavar:
        attributes["metavar"] = info.metavar
    return click.option(*flags, name, **attributes)


def _type(info: Setting) -> click.ParamType:
    """The click type of one value of a setting."""
    if info.choices:
        return click.Choice(info.choices)
    if info.type_name == "path":
        return PATH
    if info.repeat:  # `Options` parses the tuple of all values
        return click.STRING
    return Value(info.type_name or "text", info.read)


def _help(info: Setting) -> str:
    return f"{info.help} [default: {info.default_text}]" if info.default_text else info.help
