"""The folder of files that are downloaded once for all runs."""

from __future__ import annotations

import os
from pathlib import Path


def downloads(name: str) -> Path:
    """The folder of the data set `name`, in XDG_CACHE_HOME or ~/.cache. It need not exist."""
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # the XDG standard says to ignore a relative path; Path(""), of a variable that is not set, is relative too
    cache = configured if configured.is_absolute() else Path.home() / ".cache"
    return cache / "backbone-harness" / name
