"""What the harness says on its way: the handler that the command line gives to the logger "harness".

A line goes to stderr, above the progress bars where there are any: information as it is, warnings with "warning: " in
front. As a library the harness only logs; a program installs the handlers that it wants.
"""

from __future__ import annotations

import contextlib
import logging

from harness.io import progress

LOGGER = "harness"


class LineHandler(logging.Handler):
    """Writes records as lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno >= logging.WARNING:
            text = f"warning: {text}"
        with contextlib.suppress(OSError, ValueError):  # stderr is closed: there is nobody to tell
            progress.write_line(text)


def log_to_stderr() -> None:
    """Let the harness write what it logs to stderr. Calling it again changes nothing."""
    logger = logging.getLogger(LOGGER)
    if not any(isinstance(handler, LineHandler) for handler in logger.handlers):
        logger.addHandler(LineHandler())
    logger.setLevel(logging.INFO)
