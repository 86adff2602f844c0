"""The user's cache: files that are downloaded once for all runs, and what is computed once (features, compiled programs).

It may be removed at any time. Nothing of it lies beside the user's own files.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

VARIABLE = "HARNESS_CACHE"


def cache_folder(given: Path | None = None) -> Path:
    """The folder of the cache, which need not exist: `given` (of --cache), else that of the variable HARNESS_CACHE, else
    backbone-harness in XDG_CACHE_HOME or ~/.cache.
    """
    if given is not None:
        return given
    if named := os.environ.get(VARIABLE):
        return Path(named).absolute()
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # the XDG standard says to ignore a relative path; Path(""), of a variable that is not set, is relative too
    if configured.is_absolute():
        return configured / "backbone-harness"
    try:
        return Path.home() / ".cache" / "backbone-harness"
    except RuntimeError:  # a user without a home, as in some containers
        return Path(tempfile.gettempdir()) / "backbone-harness"


def downloads(name: str) -> Path:
    """The folder of the data set `name`. It need not exist."""
    return cache_folder() / name


def features(given: Path | None = None) -> Path:
    """The folder of the features of images by their content. It need not exist. given: as in `cache_folder`."""
    return cache_folder(given) / "features"


def compiled(machine: str) -> Path:
    """The folder of JAX's compiled programs. It need not exist. machine: a name; a processor cannot run another's code."""
    return cache_folder() / "compiled" / machine
