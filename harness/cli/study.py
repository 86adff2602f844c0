"""`harness study`: many runs of one protocol, described by a file."""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from harness import registry
from harness.cli.flags_from_settings import PATH, Value, json_option, plugin_option
from harness.cli.tables import print_report, print_table, table_console
from harness.errors import RunError, UserError
from harness.io.progress import QUIET_SECONDS, duration
from harness.io.text import read_pair
from harness.studies import load, package, slurm
from harness.studies.expand import Expansion, expand
from harness.studies.local import Launcher
from harness.studies.state import Overview, overview

if TYPE_CHECKING:
    from rich.table import Table

STYLES = {"done": "green", "running": "bold", "failed": "red", "interrupted": "yellow"}


@click.command("study")
@click.argument("file", type=PATH, metavar="FILE.toml")
@plugin_option(expose_value=True)
@click.option(
    "--status", is_flag=True, help="Only show which runs are done, running or failed (and why), and what is left to do."
)
@click.option("--report", "only_report", is_flag=True, help="Only write the report of the records so far.")
@click.option(
    "--launcher",
    metavar="NAME",
    default="local",
    show_default=True,
    help="local: processes on this machine; slurm: one job for each run on a SLURM cluster (extra `slurm`); or a package's.",
)
@click.option("--jobs", type=click.IntRange(1), help="For local: number of runs at the same time. [default: 1]")
@click.option(
    "--slurm",
    "settings",
    type=Value("key=value", partial(read_pair, form="KEY=VALUE", example="partition=gpu")),
    multiple=True,
    metavar="KEY=VALUE",
    help="For slurm: a setting of the jobs that overrides the file's [slurm], as in --slurm time=12:00:00 (repeatable).",
)
@click.option("--retry-failed", is_flag=True, help="Also start the runs again whose last command failed.")
@json_option
def command(
    file: Path,
    plugin: tuple[Path, ...],
    status: bool,
    only_report: bool,
    launcher: str,
    jobs: int | None,
    settings: tuple[tuple[str, str], ...],
    retry_failed: bool,
    as_json: bool,
) -> None:
    """Launch the runs of a study that are not done, and write the report of all runs.

    Each backbone with each seed is one run, and the budgets are training steps of that run. Each number of sampling
    steps with each guidance scale is one sample set of each run. Each run is a `harness run`; `--status --json` lists
    the commands. The study can be stopped or killed at any time, and the same command continues it: work that is done
    is not repeated, and processes that still run are not started twice.
    """
    if status and only_report:
        raise UserError("--status and --report cannot be combined; give one of them")
    if as_json and not status:
        raise UserError("--json needs --status")
    if settings and launcher != "slurm":
        raise UserError("--slurm needs --launcher slurm")
    if jobs and launcher != "local":
        raise UserError("--jobs needs --launcher local; with slurm each run is one job")
    registry.launchers.get(launcher)  # refuses an unknown one
    study = expand(load(file).with_plugins(plugin))
    if status:
        now = overview(study, slurm.queue(study))
        click.echo(json.dumps(now.as_dict(), indent=2)) if as_json else print_overview(now)
        return
    state: Overview | None = None  # None: nothing was launched, because of --report
    stopped = False
    if launcher == "slurm" and not only_report:
        overrides = {name: slurm.parse_setting(text) for name, text in settings}
        state = slurm.submit(study, overrides, retry_failed=retry_failed)
    elif launcher != "local" and not only_report:
        state = package.launch(study, launcher, retry_failed=retry_failed)
    elif not only_report:
        state, stopped = launch(study, jobs=jobs or 1, retry_failed=retry_failed)
    if stopped:
        click.echo("stopped; the same command continues", err=True)
        sys.exit(130)
    report(study)
    if state is None:
        return
    if failed := [row for row in state.rows if row.state == "failed"]:
        reasons = "; ".join(
            f"{row.run.label}: {row.reason}" + (f" (log {row.log})" if row.log else "") for row in failed
        )
        hint = "" if retry_failed else "; --retry-failed tries again"
        raise RunError(f"{len(failed)} of {len(state.rows)} runs failed: {reasons}{hint}")
    if state.count("done") == len(state.rows):
        return
    click.echo(summary(state), err=True)
    # Some runs were interrupted, or belong to another process. With slurm that is no interruption: its jobs still run.
    if launcher == "local":
        click.echo("some runs are not done; the same command continues", err=True)
        sys.exit(130)


def launch(study: Expansion, *, jobs: int, retry_failed: bool) -> tuple[Overview, bool]:
    """Launch the remaining runs on this machine; returns (progress at the end, whether a signal stopped the launcher)."""
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True, highlight=False)
    with Live(console=console, auto_refresh=False, transient=True) as live:
        last_summary = 0.0

        def draw(state: Overview) -> None:
            """Show the progress: on a terminal as a table, elsewhere as a line every QUIET_SECONDS."""
            nonlocal last_summary
            if console.is_terminal:
                live.update(table_of(state, console.width), refresh=True)
            elif time.monotonic() - last_summary > QUIET_SECONDS:
                last_summary = time.monotonic()
                click.echo(summary(state), err=True)

        launcher = Launcher(study, processes=jobs, retry_failed=retry_failed, draw=draw)
        state = launcher.launch()
    return state, launcher.stopping > 0


def report(study: Expansion) -> None:
    """Write the report of the study's runs to the study's folder, and print their rows."""
    from harness.pipeline.report import report as write_report

    measured = tuple(run.folder for run in study.runs if (run.folder / "records.jsonl").exists())
    if not measured:
        click.echo("nothing has been measured yet", err=True)
        return
    out = study.folder / "report"
    print_report(write_report(results=measured, out=out, protocol=study.protocol.name), out)


def print_overview(state: Overview) -> None:
    """Print the runs as a table, the failures, and the remaining work."""
    console = table_console()
    print_table(table_of(state, console.width))
    for row in state.rows:
        if row.reason and row.state == "failed":
            where = f"  (log {row.log})" if row.log else ""
            console.print(f"{row.run.label}: {row.reason}{where}", soft_wrap=True, markup=False)
    click.echo(summary(state))


def table_of(state: Overview, width: int) -> Table:
    """A table with one row for each run: its variant if the study has any, state, steps, sample sets, remaining work."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("run", no_wrap=True)
    if state.has_variants:
        table.add_column("variant", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for heading in ("steps", "sample sets", "Gflops left", "time left"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in state.rows:
        seconds = state.seconds_left(row)
        style = STYLES.get(row.state, "")
        table.add_row(
            row.run.name,
            *([escape(row.run.variant)] if state.has_variants else []),
            f"[{style}]{row.state}[/]" if style else row.state,
            f"{row.steps_done:,}/{row.run.steps:,}",
            f"{row.sets_done}/{row.sets}",
            f"{row.gflops_left:.4g}" if row.gflops_left else "-",
            "-" if seconds == 0 else "not known yet" if seconds is None else duration(seconds),
        )
    return table


def summary(state: Overview) -> str:
    """One line: the number of runs in each state, and the remaining work."""
    data: dict[str, Any] = state.as_dict()
    counts = ", ".join(f"{number} {name}" for name, number in data["counts"].items() if number)
    text = f"{state.study.study.name}: {counts} of {len(state.rows)} runs"
    if not data["gflops_left"]:
        return text
    known_time = f"{duration(data['seconds_left'])} of work" if data["seconds_left"] else ""
    unknown_runs = data["runs_of_unknown_speed"]
    unknown_time = f"{unknown_runs} runs whose speed is not known yet" if unknown_runs else ""
    time_left = " and ".join(part for part in (known_time, unknown_time) if part)
    disk = f"; the whole study needs {data['disk_bytes'] / 1e9:.2g} GB of disk"
    return f"{text}; left: {data['gflops_left']:.4g} Gflops" + (f", {time_left}" if time_left else "") + disk
