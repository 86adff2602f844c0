"""The flags of `harness compare`, which are the keyword arguments of `harness.compare`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from harness.io.text import read_count, read_path
from harness.settings.plugin_flags import plugin_setting
from harness.settings.setting import REQUIRED, Options, setting
from results.time_to_target import Target, read_target


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
    target: Target | None = setting(
        "Compare the training compute until METRIC reaches VALUE, as in fd=60, from the marks of --evaluate-at.",
        read_target, metavar="METRIC=VALUE", type_name="target",
    )  # fmt: skip
