"""Where files that are fetched once for all runs are kept."""

from __future__ import annotations

import os
from pathlib import Path


def downloads(name: str) -> Path:
    """The folder of the data set `name`: below XDG_CACHE_HOME, else below ~/.cache. It need not be there."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    base = (
        Path(cache) if Path(cache).is_absolute() else Path.home() / ".cache"
    )  # the standard: a relative one is ignored
    return base / "backbone-harness" / name
