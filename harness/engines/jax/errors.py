"""Errors of jax as one clear line: what happened, in which step, what to do. No page of tracing reaches the user."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jax

from harness.errors import RunError, UserError

LONGEST = 200  # characters of jax's own words


@contextmanager
def one_line(where: str, remedy: str) -> Iterator[None]:
    """Turn what jax raises `where` (as in "training step 3") into a RunError; `remedy` is against lack of memory."""
    try:
        yield
    except (UserError, RunError):
        raise
    except jax.errors.JaxRuntimeError as error:
        text = _first_line(error)
        if "RESOURCE_EXHAUSTED" in text or "Out of memory" in text or "out of memory" in text:
            raise RunError(f"out of memory in {where}: {text}; {remedy}") from error
        raise RunError(f"jax failed in {where}: {text}") from error
    except MemoryError as error:
        raise RunError(f"out of memory in {where}; {remedy}") from error
    except (TypeError, ValueError, IndexError, AttributeError, KeyError, NotImplementedError) as error:
        # Of tracing: shapes, types, what cannot be compiled.
        raise RunError(f"the network cannot be run in {where}: {type(error).__name__}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0][:LONGEST].rstrip(".")
