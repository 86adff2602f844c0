"""The two ways in which the harness says no.

Every message is one line that says what is wrong, where, and what to do about it.
"""


class Refusal(ValueError):
    """The request cannot be carried out as it was made: usage, input, or a missing piece. Exit code 2."""


class Failure(RuntimeError):
    """The request was sound but carrying it out failed (a check, the disk, a number). Exit code 1."""
