"""`harness study`: many runs of one protocol, from a file."""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from harness.cli.options import Value, json_option
from harness.cli.tables import print_report
from harness.errors import RunError, UserError
from harness.io.progress import QUIET_SECONDS, duration
from harness.io.text import read_pair
from harness.studies import load, slurm
from harness.studies.expand import Expansion, expand
from harness.studies.local import Launcher
from harness.studies.state import Overview, overview

if TYPE_CHECKING:
    from rich.table import Table

STYLES = {"done": "green", "running": "bold", "failed": "red", "interrupted": "yellow"}


@click.command("study")
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE.toml")
@click.option(
    "--status", is_flag=True, help="Only say what is done, running, failed (and why) and left, with its cost."
)
@click.option("--report", "only_report", is_flag=True, help="Only write the report of what has been measured so far.")
@click.option(
    "--launcher",
    type=click.Choice(["local", "slurm"]),
    default="local",
    show_default=True,
    help="Processes of this machine, or a job of a SLURM cluster for each run (extra `slurm`).",
)
@click.option("--jobs", type=click.IntRange(1), help="Of local: runs at work at a time. [default: 1]")
@click.option(
    "--slurm",
    "settings",
    type=Value("key=value", partial(read_pair, form="KEY=VALUE", example="partition=gpu")),
    multiple=True,
    metavar="KEY=VALUE",
    help="Of slurm: a setting of the jobs, laid over the file's [slurm], as in --slurm time=12:00:00 (repeatable).",
)
@click.option("--retry-failed", is_flag=True, help="Also begin runs again whose last command failed.")
@json_option
def command(
    file: Path,
    status: bool,
    only_report: bool,
    launcher: str,
    jobs: int | None,
    settings: tuple[tuple[str, str], ...],
    retry_failed: bool,
    as_json: bool,
) -> None:
    """Launch the runs of a study that are not done, and write the report of them all.

    Backbones x seeds are runs, budgets are steps of them; sampling steps x guidance scales are sample sets of each. Each
    run is a `harness run` of its own; `--status --json` gives the commands. Stopped or killed at any instant, the same
    command goes on: what is done is not repeated, and what still runs is not started twice.
    """
    if status and only_report:
        raise UserError("--status and --report are two questions; ask one of them")
    if as_json and not status:
        raise UserError("--json belongs to --status")
    if settings and launcher != "slurm":
        raise UserError("--slurm belongs to --launcher slurm")
    if jobs and launcher != "local":
        raise UserError("--jobs belongs to --launcher local; of slurm each run is a job")
    study = expand(load(file))
    if status:
        state = overview(study, slurm.queue(study))
        click.echo(json.dumps(state.as_dict(), indent=2)) if as_json else print_overview(state)
        return
    found: Overview | None = None
    stopped = False
    if launcher == "slurm" and not only_report:
        given = {name: slurm.parse_setting(text) for name, text in settings}
        found = slurm.submit(study, given, retry_failed=retry_failed)
    elif not only_report:
        found, stopped = launch(study, jobs=jobs or 1, retry_failed=retry_failed)
    if stopped:
        click.echo("stopped; the same command continues", err=True)
        sys.exit(130)
    report(study)
    if found is None:
        return
    if failed := [row for row in found.rows if row.state == "failed"]:
        named = "; ".join(f"{row.run.name}: {row.reason}" + (f" (log {row.log})" if row.log else "") for row in failed)
        more = "" if retry_failed else "; --retry-failed tries again"
        raise RunError(f"{len(failed)} of {len(found.rows)} runs failed: {named}{more}")
    if found.count("done") == len(found.rows):
        return
    click.echo(summary(found), err=True)
    if launcher == "local":
        click.echo("not all is done; the same command continues", err=True)
        sys.exit(130)


def launch(study: Expansion, *, jobs: int, retry_failed: bool) -> tuple[Overview, bool]:
    """Launch what is left on this machine; returns the state afterwards, and whether it was told to stop."""
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True, highlight=False)
    with Live(console=console, auto_refresh=False, transient=True) as live:
        last = [0.0]

        def draw(found: Overview) -> None:
            if console.is_terminal:
                live.update(table_of(found, console.width), refresh=True)
            elif time.monotonic() - last[0] > QUIET_SECONDS:
                last[0] = time.monotonic()
                click.echo(summary(found), err=True)

        launcher = Launcher(
            study, processes=jobs, retry_failed=retry_failed, draw=draw
        )  # fmt: skip
        found = launcher.launch()
    return found, launcher.stopping > 0


def report(study: Expansion) -> None:
    """Write the report of the study's runs to its folder, and print their rows."""
    from harness.pipeline.report import report as write_report

    measured = tuple(run.folder for run in study.runs if (run.folder / "records.jsonl").exists())
    if not measured:
        click.echo("nothing has been measured yet", err=True)
        return
    out = study.folder / "report"
    print_report(write_report(results=measured, out=out, protocol=study.protocol.name), out)


def print_overview(found: Overview) -> None:
    """The runs as a table, and what is left."""
    from rich.console import Console

    console = Console(width=None if Console().is_terminal else 140, highlight=False)
    console.print(table_of(found, console.width))
    for row in found.rows:
        if row.reason and row.state == "failed":
            where = f"  (log {row.log})" if row.log else ""
            console.print(f"{row.run.name}: {row.reason}{where}", soft_wrap=True, markup=False)
    click.echo(summary(found))


def table_of(found: Overview, width: int) -> Table:
    """A row for each run: state, steps and sample sets done, what is left."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("run", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for heading in ("steps", "sample sets", "Gflops left", "time left"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in found.rows:
        seconds = found.seconds_left(row)
        style = STYLES.get(row.state, "")
        table.add_row(
            row.run.name,
            f"[{style}]{row.state}[/]" if style else row.state,
            f"{row.steps_done:,}/{row.run.steps:,}",
            f"{row.sets_done}/{row.sets}",
            f"{row.gflops_left:.4g}" if row.gflops_left else "-",
            "-" if seconds == 0 else "not yet known" if seconds is None else duration(seconds),
        )
    return table


def summary(found: Overview) -> str:
    """One line: how many runs are in which state, and what is left."""
    data: dict[str, Any] = found.as_dict()
    counts = ", ".join(f"{number} {state}" for state, number in data["counts"].items() if number)
    text = f"{found.study.study.name}: {counts} of {len(found.rows)} runs"
    if not data["gflops_left"]:
        return text
    unknown = data["runs_of_unknown_speed"]
    known = f"{duration(data['seconds_left'])} of work" if unknown < len(found.rows) and data["seconds_left"] else ""
    of_unknown = f"{unknown} runs of a speed not yet known" if unknown else ""
    hours = " and ".join(part for part in (known, of_unknown) if part)
    disk = f"; all of it needs {data['disk_bytes'] / 1e9:.2g} GB of disk"
    return f"{text}; left: {data['gflops_left']:.4g} Gflops" + (f", {hours}" if hours else "") + disk
