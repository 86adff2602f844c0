"""Values from text: counts, seeds, numbers, paths and pairs, as flags, study files and Python calls give them.

Each reader takes text or a Python value and returns the value; a ValueError says what is wrong.
"""

from __future__ import annotations

import errno
import json
import math
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import UserError, shown

MAX_INT = 2**63 - 1  # of seeds
MAX_COUNT = 10**15  # of images and steps: more than anything computes, and little enough for arithmetic in 64 bits
MAX_TILES = 1024  # images of one picture
LONGEST_TOML, LONGEST_JSON = 1 << 18, 1 << 28  # bytes
MAX_DOTS = 300  # of a line of TOML
COUNT_EXAMPLES = "250, 400k or 7M"


def read_count(value: Any) -> int:
    """A whole number of at least 1: a number, or text such as 250, 400k or 7M."""
    try:
        number = value if isinstance(value, int) and not isinstance(value, bool) else count(value)
    except (ValueError, IndexError, TypeError, AttributeError, OverflowError):
        raise ValueError(f"{value!r} is not a count such as {COUNT_EXAMPLES}") from None
    if number < 1:
        raise ValueError("must be at least 1")
    if number > MAX_COUNT:
        raise ValueError(f"must be at most {MAX_COUNT:,}")
    return number


def read_counts(value: Any) -> tuple[int, ...]:
    """Counts in ascending order, without repetition: a number, a sequence of numbers, or text such as 16,32,64."""
    parts = [value] if isinstance(value, int) else value
    if isinstance(value, str):
        parts = value.split(",")
    return tuple(sorted({read_count(part.strip() if isinstance(part, str) else part) for part in parts}))


def read_sampler_steps(value: Any) -> tuple[int, ...]:
    """Counts as `read_counts` reads them; the ValueError for guided-diffusion's ddim25 and 10,10,20 names their flags."""
    text = value if isinstance(value, str) else ""
    if match := re.fullmatch(r"\s*ddim([0-9]+)\s*", text):
        raise ValueError(f"{value!r} is --sampling-steps {match[1]} --spacing whole-stride here")
    parts = [part.strip() for part in text.replace(":", ",").split(",")]
    if (":" in text or len(set(parts)) < len(parts)) and all(part.isdigit() for part in parts):
        total, sections = sum(map(int, parts)), ":".join(parts)
        if ":" in text:
            raise ValueError(f"{value!r} is --sampling-steps {total} --spacing {sections} here")
        raise ValueError(
            f"{value!r} has a count twice, and each number gives one sample set; equal sections with these counts are "
            f"--sampling-steps {total} --spacing {sections}"
        )
    return read_counts(value)


def read_seed(value: Any) -> int:
    """A whole number from 0 to 2**63 - 1."""
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{value!r} is not a valid integer.") from None
    # int() accepts True, and it cuts the float 2.5 to 2.
    was_cut = not isinstance(value, str | int) and number != float(value)
    if isinstance(value, bool) or was_cut:
        raise ValueError(f"{value!r} is not a valid integer.")
    if not 0 <= number <= MAX_INT:
        raise ValueError(f"{number} is not in the range 0<=x<={MAX_INT}.")
    return number


@dataclass(frozen=True, kw_only=True)
class GridSize:
    """Rows and columns of a picture; as text, ROWSxCOLUMNS."""

    rows: int
    columns: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}"


def read_grid(value: Any) -> GridSize:
    """The size of a grid: a `GridSize`, or text such as 4x8, of at most MAX_TILES images."""
    rows, times, columns = str(value).partition("x")
    sides = [text for text in (rows, columns) if re.fullmatch("[1-9][0-9]{0,3}", text)]
    if not times or len(sides) != 2:
        raise ValueError(f"{value!r} is not of the form ROWSxCOLUMNS, as in 4x8")
    grid = GridSize(rows=int(rows), columns=int(columns))
    if grid.rows * grid.columns > MAX_TILES:
        raise ValueError(f"{grid} are more than {MAX_TILES:,} images; a sample set holds more: --samples N")
    return grid


def read_names(value: Any) -> tuple[str, ...]:
    """Names, without repetition, in order: text such as 207,360 or "otter,golden retriever", or a sequence of names."""
    parts = value.split(",") if isinstance(value, str) else [value] if isinstance(value, int) else value
    names = tuple(dict.fromkeys(str(part).strip() for part in parts))
    if not all(names) or not names:
        raise ValueError(f"{value!r} names nothing between two commas, or nothing at all")
    return names


def read_number(value: Any) -> float:
    """A number; NaN and infinity are accepted here, so a setting that excludes them checks that itself."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{value!r} is not a valid float.") from None


def read_seconds(value: Any) -> float:
    """A duration in seconds, more than 0."""
    if (number := read_number(value)) <= 0:
        raise ValueError("must be more than 0")
    return number


def read_fraction(value: Any) -> float:
    """A number from 0 to 1."""
    number = read_number(value)
    if not 0 <= number <= 1:
        raise ValueError(f"{number} is not in the range 0<=x<=1.")
    return number


def read_path(value: Any) -> Path:
    """A path. The working folder and a parent (., .., a/..) get their names, because files are named after a path."""
    path = Path(value)
    if not str(value):  # a variable of the shell that is not set; Path makes the working folder of it
        raise ValueError("the path is empty; name a file or a folder")
    if "\0" in str(path):
        raise ValueError(f"{shown(value)} is no path: it holds a zero byte")
    try:
        path.stat()
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):  # it can neither be read nor be made
            raise ValueError(f"{shown(value)} is no path: {error.strerror}") from None
    except ValueError as error:  # characters that the system cannot encode
        raise ValueError(f"{shown(value)} is no path: {error}") from None
    return path.resolve() if path.name in ("", "..") else path


def check_plain(path: Path, what: str, longest: int | None = None) -> None:
    """UserError where `path` is a pipe, a device or a socket: reading one may wait for ever. what: names it.

    longest: bytes; a longer file is refused, because it is read as a whole. None: it is not.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"{what} {path} is a pipe, a device or a socket and no file")
    if longest is not None and path.is_file() and path.stat().st_size > longest:
        raise UserError(f"{what} {path} is larger than {longest:,} bytes; it is no {what}")


def read_text(value: object) -> str:
    """Text as it is. An empty one is no value: it would be taken for a setting that is not given."""
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not text")
    if not value:  # a variable of the shell that is not set
        raise ValueError("the text is empty; name one, or leave the setting out")
    return value


def read_switch(value: object) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is neither True nor False")
    return value


def read_pairs(form: str, example: str) -> Callable[[Any], dict[str, Any]]:
    """Returns a reader, which turns a mapping, or a sequence of pairs as `read_pair` takes them, into a dictionary.

    form, example: as in `read_pair`. The reader raises ValueError if a name occurs twice.
    """

    def read(value: Any) -> dict[str, Any]:
        pairs = (
            list(value.items()) if isinstance(value, Mapping) else [read_pair(each, form, example) for each in value]
        )
        if len(dict(pairs)) != len(pairs):
            raise ValueError("names the same item twice; give each once")
        return {str(name): each for name, each in pairs}

    return read


def read_pair(value: Any, form: str, example: str) -> tuple[str, Any]:
    """(name, text) of "NAME=VALUE"; a tuple counts as a parsed pair and is returned unchanged.

    form, example: what the message of the ValueError gives as the form of a pair, and as an example.
    """
    if isinstance(value, tuple):
        return value
    name, equals, text = str(value).partition("=")
    if not equals or not name or not text:
        raise ValueError(f"{value!r} is not of the form {form}, as in {example}")
    return name, text


def read_texts(value: Any) -> tuple[str, ...]:
    """The texts, without repetition, in order: one text, or a sequence of them."""
    return tuple(dict.fromkeys([value] if isinstance(value, str) else map(read_text, value)))


def read_paths(value: Any) -> tuple[Path, ...]:
    """Paths: one, or a sequence of them."""
    return tuple(read_path(each) for each in ([value] if isinstance(value, str | Path) else value))


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """The TOML document in a file, which may begin with a byte order mark. UserError: it cannot be read, or is no TOML.

    what: names the kind of file in the message.
    """
    try:
        check_plain(path, f"{what} file", LONGEST_TOML)
        text = path.read_text(encoding="utf-8-sig")
        # tomllib's time grows with the square of the parts of a dotted key
        if max((line.count(".") for line in text.splitlines()), default=0) > MAX_DOTS:
            raise ValueError(f"a line has more than {MAX_DOTS} dots")
        return tomllib.loads(text)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{what} file {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # syntax, encoding, a number too long, brackets too deep
        raise UserError(f"{what} file {path} is not valid TOML: {error}") from error


def parse_json(text: str | bytes, *, finite: bool = False) -> Any:
    """The JSON document in a text; ValueError where it is none, also where its brackets are too deep for Python.

    finite: NaN, Infinity and numbers beyond the range of floats are a ValueError, too; else they are floats.
    """
    try:
        return json.loads(text, parse_float=_finite, parse_constant=_finite) if finite else json.loads(text)
    except RecursionError:
        raise ValueError("its brackets are nested too deep") from None


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is no finite number")
    return value


def count(text: str) -> int:
    """The whole number that text such as 250, 400k or 7M means, 0 included; ValueError for anything else."""
    factor = {"k": 1_000, "m": 1_000_000}.get(text[-1:].lower(), 1)
    # without a suffix underscores may be anywhere; float() itself takes them only between digits
    digits = text[:-1] if factor > 1 else text.replace("_", "")
    try:
        number: float = int(digits)  # not by float(), which rounds above 2**53
    except ValueError:
        number = float(digits)
    if not math.isfinite(number * factor):
        raise ValueError(f"{text!r} is not a whole number")
    if not number * factor == int(number * factor) or number < 0:
        raise ValueError(f"{text!r} is not a whole number")
    return int(number * factor)
