"""Errors that come out of the code of a plug-in, told apart from those of the harness itself."""

from __future__ import annotations

import traceback
from importlib import metadata

from harness.errors import one_line
from harness.plugins.files import MODULE_PREFIX
from harness.registry import GROUPS, OWN_DISTRIBUTION


def plugin_fault(error: BaseException) -> str | None:
    """The error in one line that names the plug-in, its file and the line; None if none of its frames is of a plug-in."""
    packages = {
        point.module.partition(".")[0]: point.dist.name
        for registry in GROUPS.values()
        for point in metadata.entry_points(group=registry.group)
        if point.dist is not None and point.dist.name != OWN_DISTRIBUTION
    }
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        module = str(frame.f_globals.get("__name__", ""))
        if module.startswith(MODULE_PREFIX):
            return f"plug-in {frame.f_globals.get('__file__')} failed: {one_line(error)}"
        if (name := packages.get(module.partition(".")[0])) is not None:
            return f"plug-in {name} failed: {one_line(error)}"
    return None
