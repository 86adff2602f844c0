"""The flags of `harness report`, which are the keyword arguments of `harness.report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from harness.io.text import read_path, read_paths, read_text
from harness.settings.plugin_flags import PluginFiles
from harness.settings.setting import setting


@dataclass(frozen=True, kw_only=True)
class ReportOptions(PluginFiles):
    """Options of `harness report`."""

    results: tuple[Path, ...] = setting(
        "Runs, folders of runs, or record files (repeatable).", read_paths, (), metavar="DIR", repeat=True,
        default_text="runs/", type_name="path",
    )  # fmt: skip
    out: Path | None = setting(
        "Folder of the report.", read_path, metavar="DIR", default_text="runs/report/", type_name="path"
    )
    protocol: str | None = setting(
        "Only the table, the verdicts and the figures of this protocol, beside Tables 1-6.", read_text, metavar="NAME",
        default_text="every protocol",
    )  # fmt: skip
    export: str | None = setting(
        "Also write the measured records in this schema, below the folder of the report; every-eval-ever: that of the PyPI "
        "package every_eval_ever 0.3.0.", read_text, choices=("every-eval-ever",),
    )  # fmt: skip
