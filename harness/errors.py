"""The two errors of the harness.

Each message is one line that states what is wrong, where, and how to fix it.
"""

from __future__ import annotations

import os
import traceback
import unicodedata
from pathlib import Path


def escaped(text: str) -> str:
    """The text on one line: line ends and other control characters, of which file names may have some, are escaped."""
    if text.isprintable():
        return text
    kept = ("Cs", "Co", "Zs", "Cn")  # bytes that are no UTF-8, and what a newer Unicode or a font may have
    return "".join(
        each if each.isprintable() or unicodedata.category(each) in kept else each.encode("unicode_escape").decode()
        for each in text
    )


class _OneLine(Exception):
    """An error whose message is one line."""

    def __init__(self, message: object = ""):
        super().__init__(escaped(str(message)))


class UserError(_OneLine, ValueError):
    """The request cannot be carried out: wrong usage, wrong input, or something is missing. Exit code 2."""


class RunError(_OneLine, RuntimeError):
    """The request was valid, but it failed while it was carried out (a check, the disk, a number). Exit code 1."""


LONGEST_SHOWN = 120  # characters of a value quoted in a message


def shown(value: object) -> str:
    """The value as it is quoted in a message: its repr, shortened if it is long."""
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 3]}..."


def one_line(error: BaseException) -> str:
    """An error of other people's code in one line: its type, the first line of its message, and where it was raised."""
    first = (str(error).strip().splitlines() or [""])[0]
    text = f"{type(error).__name__}: {first}" if first else type(error).__name__
    return f"{text}{raised_at(error)}"


def raised_at(error: BaseException) -> str:
    """Where an error was raised, as " (model.py, line 7)"; "" if no frame is of other people's code."""
    frames = traceback.extract_tb(error.__traceback__)
    here = str(Path(__file__).parent) + os.sep
    # The innermost frame that is neither of a framework nor of the harness is the one to look at, if there is one.
    own = [
        frame
        for frame in frames
        if not frame.filename.startswith((here, "<")) and not any(part in frame.filename for part in _LIBRARIES)
    ]
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""


_LIBRARIES = tuple(
    f"{os.sep}{name}{os.sep}" for name in ("torch", "jax", "jaxlib", "flax", "numpy", "importlib", "functorch")
)
