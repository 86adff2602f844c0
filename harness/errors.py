"""The two ways in which the harness says no.

Every message is one line that says what is wrong, where, and what to do about it.
"""


class UserError(ValueError):
    """The request cannot be carried out as it was made: usage, input, or a missing piece. Exit code 2."""


class RunError(RuntimeError):
    """The request was sound but carrying it out failed (a check, the disk, a number). Exit code 1."""


LONGEST_SHOWN = 120  # characters of a value that a message quotes


def shown(value: object) -> str:
    """The value as a message quotes it: cut where it is long."""
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 3]}..."
