"""Errors of jax in one line: what happened, in which step, and what to do. Users see no traceback of a traced function."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jax

from harness.errors import RunError, UserError, raised_at

MAX_LENGTH = 200  # characters that are quoted from jax


@contextmanager
def errors_in_one_line(where: str, remedy: str) -> Iterator[None]:
    """Context that turns errors of jax, and of a network that cannot be traced, into a RunError of one line.

    where: the place, as in "training step 3". remedy: what to do when memory runs out.
    """
    try:
        yield
    except (UserError, RunError):  # one line already; a UserError is a ValueError, which is caught below
        raise
    except jax.errors.JaxRuntimeError as error:
        text = _first_line(error)
        if "RESOURCE_EXHAUSTED" in text or "Out of memory" in text or "out of memory" in text:
            raise RunError(f"out of memory in {where}: {text}; {remedy}") from error
        raise RunError(f"jax failed in {where}: {text}") from error
    except MemoryError as error:
        raise RunError(f"out of memory in {where}; {remedy}") from error
    except (TypeError, ValueError, IndexError, AttributeError, KeyError, NotImplementedError) as error:
        # What tracing raises for wrong shapes, wrong types and code that cannot be compiled.
        text = f"{type(error).__name__}: {_first_line(error)}{raised_at(error)}"
        raise RunError(f"the network cannot be run in {where}: {text}") from error


def _first_line(error: BaseException) -> str:
    """The first line of an error's text that is not blank, at most MAX_LENGTH characters; else the name of its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0][:MAX_LENGTH].rstrip(".")
