"""The flags of `harness compare`, which are the keyword arguments of `harness.compare`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from harness.io.text import read_count, read_path
from harness.settings.plugin_flags import plugin_setting
from harness.settings.setting import REQUIRED, Options, setting


@dataclass(frozen=True, kw_only=True)
class CompareOptions(Options):
    """Options of `harness compare`."""

    a: Path = setting(
        "A run, a folder of runs, or a record file.", read_path, REQUIRED, argument=True, type_name="path"
    )
    b: Path = setting("The other side.", read_path, REQUIRED, argument=True, type_name="path")
    plugin: tuple[Path, ...] = plugin_setting()
    step: int | None = setting(
        "Training steps of the records to compare, if a side has several.", read_count, type_name="count"
    )
