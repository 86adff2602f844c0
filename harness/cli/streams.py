"""stdout and stderr of the command line, whatever their encoding and the device behind them."""

from __future__ import annotations

import codecs
import contextlib
import os
import sys

ERRORS = "harness-ascii"  # name of the rule for characters that an encoding does not have
ASCII = {
    "\u2190": "<-", "\u2191": "^", "\u2192": "->", "\u2193": "v", "\u2013": "-", "\u2014": "-", "\u2020": "+", "\u2026": "...",
    "\u00b1": "+-", "\u00d7": "x",
}  # fmt: skip


def print_anything() -> None:
    """Let stdout and stderr print every text: what their encoding does not have becomes ASCII, or a question mark."""
    codecs.register_error(ERRORS, _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=ERRORS)


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(ASCII.get(each, "?") for each in error.object[error.start : error.end]), error.end


def give_up_stdout() -> None:
    """Throw away what stdout still holds, so that Python does not fail once more when it exits."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
