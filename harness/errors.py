"""The two errors of the harness.

Each message is one line that states what is wrong, where, and how to fix it.
"""


class UserError(ValueError):
    """The request cannot be carried out: wrong usage, wrong input, or something is missing. Exit code 2."""


class RunError(RuntimeError):
    """The request was valid, but it failed while it was carried out (a check, the disk, a number). Exit code 1."""


LONGEST_SHOWN = 120  # characters of a value quoted in a message


def shown(value: object) -> str:
    """The value as it is quoted in a message: its repr, shortened if it is long."""
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 3]}..."
