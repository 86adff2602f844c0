"""`harness report`: tables and figures.

Its flags are the fields of `ReportOptions` in `harness/settings/report_flags.py` and what it imports.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from harness.cli.flags_from_settings import settings_options
from harness.cli.tables import print_report
from harness.runs.run import RUNS_FOLDER
from harness.settings import ReportOptions


@click.command("report")
@settings_options(ReportOptions)
def command(out: Path | None, **options: Any) -> None:
    """Write the paper's tables and figures, with your own models in them, from published and measured records.

    report.html has all of them on one page that loads nothing: tables to sort and filter, curves whose points say which
    record they are, sample grids, and for each number its record and the command that measures it again.
    """
    from harness.pipeline.report import report

    out = out or RUNS_FOLDER / "report"
    print_report(report(out=out, **options), out)
