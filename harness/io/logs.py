"""The handler that the command line installs for the loggers of this project's packages.

It writes lines to stderr, above the progress bars if there are any; warnings begin with "warning: ". As a library the
harness only logs, and the program that uses it installs its own handlers.
"""

from __future__ import annotations

import contextlib
import logging

from harness.io import progress


class LineHandler(logging.Handler):
    """Writes records as lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno >= logging.WARNING:
            text = f"warning: {text}"
        with contextlib.suppress(OSError, ValueError):  # stderr is closed
            progress.write_line(text)


def log_to_stderr() -> None:
    """Write the log messages of all packages to stderr. Calling it again has no effect."""
    for package in progress.PACKAGES:
        logger = logging.getLogger(package)
        if not any(isinstance(handler, LineHandler) for handler in logger.handlers):
            logger.addHandler(LineHandler())
        logger.setLevel(logging.INFO)
