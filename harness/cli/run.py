"""`harness run`: the main job, end to end.

Its flags are the fields of `RunOptions` in `harness/settings/run_flags.py` and what it imports.
"""

from __future__ import annotations

from typing import Any

import click

from harness.cli.flags_from_settings import settings_options
from harness.settings import RunOptions


@click.command("run")
@settings_options(RunOptions)
def command(**options: Any) -> None:
    """Train a backbone, sample it, evaluate the samples and write the report.

    Killed at any instant, the same command continues; with more --steps it goes on from where it was. Example:

        harness run --backbone dit-xl-2 --steps 400k
    """
    from harness.pipeline.run import run

    result = run(**options)
    # There are no commands (strict=False) if the samples were evaluated.
    for path, measure in zip(result.samples, result.evaluate_commands, strict=False):
        click.echo(f"samples: {path}; measure them with: {measure}")
    if result.report is not None:
        from harness.cli.tables import print_report

        report_folder = result.report.files[0].parent
        print_report(result.report, report_folder, only=result.folder)
