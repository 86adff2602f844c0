"""The setting of all commands that look up names: files whose items are added to the registries."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.plugins.files import read_plugins
from harness.settings.setting import Options, setting

PLUGIN_HELP = (
    "Python file with a backbone, a metric, ... of your own; it is executed (repeatable; see harness.plugins.files)."
)


def plugin_setting() -> Any:
    """The setting, for commands with positional arguments, which come before it."""
    return setting(PLUGIN_HELP, read_plugins, (), metavar="FILE.py", repeat=True, type_name="path")


@dataclass(frozen=True, kw_only=True)
class PluginFiles(Options):
    # The first field of every class of options: the files are loaded before other settings name what is in them.
    plugin: tuple[Path, ...] = plugin_setting()
