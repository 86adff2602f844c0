"""What a setting is: a field of a frozen dataclass of options, and what is read off its metadata."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from harness.errors import UserError, shown


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The properties of a setting, besides its name, type and default.

    read: the function that parses text or a Python value; it raises ValueError. flags: its flags, if they are not
    `--name`; a switch may have "--x/--no-x". choices: the accepted words. repeat: the flag may be given several times.
    default_text: the default as text, for the help; show_default: the help shows the default itself. study: its key in
    a study file, "key" or "section.key"; empty: none. frozen_unless: None unless the setting is frozen when a run is
    created, because it decides bits; then the value that, like None, means "not given", such as "auto" (empty: only
    None and False do). item: the field or property of `protocols.Sampling` that it overrides. recorded: the field of
    `results.records.Record` that states it, such as "sampling.eta". footnote: its name in footnotes. argument: whether
    it is a positional argument of the command line.
    """

    help: str
    read: Callable[[Any], Any]
    metavar: str | None = None
    flags: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    repeat: bool = False
    default_text: str = ""
    show_default: bool = False
    study: str = ""
    frozen_unless: str | None = None
    item: str = ""
    recorded: str = ""
    footnote: str = ""
    argument: bool = False
    type_name: str = ""  # name of the type, in usage messages and help

    def flag(self, name: str) -> str:
        """The flag of the setting, as used in messages and commands."""
        return self.flags[0].partition("/")[0] if self.flags else f"--{name.replace('_', '-')}"


REQUIRED: Any = dataclasses.MISSING


def setting(help: str, read: Callable[[Any], Any], default: Any = None, **properties: Any) -> Any:
    """A dataclass field for a setting; `properties` are further fields of `Setting`. default: REQUIRED if it has none."""
    metadata = {"setting": Setting(help=help, read=read, **properties)}
    if default is REQUIRED:
        # A positional argument of the command line is positional in a Python call, too.
        return dataclasses.field(metadata=metadata, kw_only=not properties.get("argument", False))
    if isinstance(default, dict):  # always {}; dataclasses refuse a mutable default
        return dataclasses.field(default_factory=dict, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def settings_of(options: type | Options) -> dict[str, Setting]:
    """The settings of an options class by name, in the order of the help."""
    return {field.name: field.metadata["setting"] for field in dataclasses.fields(options)}  # type: ignore[arg-type]


class Options:
    """Base of the options classes. Values are parsed and checked at construction; `UserError` names the setting."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            name, info = field.name, field.metadata["setting"]
            value = getattr(self, name)
            if value is None and field.default is None:  # not given
                continue
            try:
                if value is None:  # None was given, and the setting has another default
                    raise TypeError
                parsed = info.read(value)
            except ValueError as error:
                raise UserError(f"{info.flag(name)}: {error}") from None
            except (TypeError, OverflowError):  # of a type that the reader does not know, or infinite
                raise UserError(f"{info.flag(name)}: {shown(value)} is not a value of this setting") from None
            words = parsed if isinstance(parsed, tuple) else (parsed,)
            for word in words if info.choices else ():
                if word not in info.choices:
                    raise UserError(f"{info.flag(name)} {shown(word)}: choose one of {', '.join(info.choices)}")
            object.__setattr__(self, name, parsed)  # the dataclass is frozen

    def given(self) -> dict[str, Any]:
        """The settings that differ from their defaults, by name; required settings have no default and always differ."""
        changed = {}
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            factory = field.default_factory
            default = factory() if factory is not dataclasses.MISSING else field.default
            if (value := getattr(self, field.name)) != default:
                changed[field.name] = value
        return changed


P = ParamSpec("P")
Chosen = TypeVar("Chosen", bound=Options)
Result = TypeVar("Result")


def keyword_options(options: Callable[P, Chosen]) -> Callable[[Callable[[Chosen], Result]], Callable[P, Result]]:
    """Decorator: turns a function of one options object into a function that takes its fields as keyword arguments.

    The docstring gets one line for each setting.
    """

    def decorate(function: Callable[[Chosen], Result]) -> Callable[P, Result]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> Result:
            return function(options(*args, **kwargs))

        assert isinstance(options, type)  # declared as a Callable, so that P takes its parameters
        parameters = inspect.signature(options).parameters.values()
        returns = inspect.signature(function).return_annotation
        call.__signature__ = inspect.Signature(list(parameters), return_annotation=returns)  # type: ignore[attr-defined]
        lines = [f"    {name}: {_help_text(info)}" for name, info in settings_of(options).items()]
        title = "Keyword arguments (--a-b is a_b; a repeatable flag takes a list, NAME=VALUE a dict):"
        call.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\n{title}\n" + "\n".join(lines) + "\n"
        return call

    return decorate


def _help_text(info: Setting) -> str:
    """The help, the accepted values and the `default_text` of a setting; the signature shows the other defaults."""
    choices = f" One of {', '.join(info.choices)}." if info.choices else ""
    default = f" Default: {info.default_text}." if info.default_text else ""
    return f"{info.help}{choices}{default}"


def command_words(command: str, options: Options, always: Collection[str] = ()) -> tuple[str, ...]:
    """The command line of `options`: the settings that differ from their defaults, in the order of the table.

    Positional arguments come last. always: names of settings that are stated at their defaults too.
    """
    arguments: list[str] = []
    words = ["harness", command]
    changed = options.given()
    for name, info in settings_of(options).items():
        if name not in changed and name not in always:
            continue
        value = getattr(options, name)
        if info.argument:
            arguments.append(str(value))
        else:
            words += flag_words(name, info, value)
    return (*words, *arguments)


def flag_words(name: str, info: Setting, value: Any) -> list[str]:
    """The flag of one setting and its value, as words of a command line."""
    flag = info.flag(name)
    if isinstance(value, bool):
        # [--x, --no-x], or [--x] for a switch that is off without a flag
        on_off = info.flags[0].split("/") if info.flags and "/" in info.flags[0] else [flag]
        return on_off[:1] if value else on_off[1:]
    if isinstance(value, Mapping):
        return [word for item, each in value.items() for word in (flag, f"{item}={value_text(each)}")]
    if info.repeat:
        return [word for each in value for word in (flag, value_text(each))]
    return [flag, ",".join(map(str, value)) if isinstance(value, tuple) else value_text(value)]


def value_text(value: object) -> str:
    """The value as text that a flag or --set parses back to the same value."""
    if isinstance(value, bool):
        return str(value).lower()
    return repr(float(value)) if isinstance(value, float) else str(value)  # numpy's floats have another repr


def command_line(words: Iterable[str]) -> str:
    """The words as one line for a shell."""
    return shlex.join(words)


def frozen_settings(options: Options) -> dict[str, Any]:
    """The values of the settings that are frozen when a run is created, by name; None: not given."""
    values: dict[str, Any] = {}
    for name, info in settings_of(options).items():
        if info.frozen_unless is not None:
            value = getattr(options, name)
            # "Not given" is None, a switch that is off (False), or the setting's own text for it, such as "auto".
            values[name] = None if value in (None, False, info.frozen_unless) else value
    return values


def study_settings(options: type[Options], section: str) -> dict[str, str]:
    """Study-file key -> name of the setting, for one section of a study file ("" for the top level)."""
    names = {}
    for name, info in settings_of(options).items():
        key_section, _, key = info.study.rpartition(".")
        if key and key_section == section:
            names[key] = name
    return names


def only_one(flags: Mapping[str, Any], what: str) -> None:
    """Raise `UserError` if more than one of the flags (name: value), which all set `what`, is given."""
    given = [flag for flag, value in flags.items() if value is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} {'both' if len(given) == 2 else 'all'} set {what}; give one of them")


def recorded_settings(options: type[Options], record: object) -> dict[str, Any]:
    """The values of the settings that a record states, by name; settings that it does not state are left out."""
    values = {name: recorded_value(info, record) for name, info in settings_of(options).items()}
    return {name: value for name, value in values.items() if value is not None}


def recorded_value(info: Setting, record: object) -> Any:
    """The value of one setting in a record; None if the record does not state it, or if no record states the setting."""
    if not info.recorded:
        return None
    value = record
    for part in info.recorded.split("."):  # "sampling.eta": record.sampling.eta, where record.sampling may be None
        value = None if value is None else getattr(value, part)
    return value
