"""`harness report`: tables and figures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import click

from harness import registry
from harness.cli.options import FOLDER
from harness.io.progress import Stages
from harness.runs.run import RUNS
from results.records import Record

CELL_WIDTH = 19  # of one row's column on the terminal
MAX_ROWS = 50  # of one table there
MAX_NAMED = 5  # lines that could not be read, and conflicts


@click.command("report")
@click.option("--results", type=FOLDER, multiple=True, metavar="DIR", help="Runs, or folders of runs. [default: runs/]")
@click.option("--out", type=FOLDER, metavar="DIR", help="Where to write. [default: runs/report/]")
@click.option("--protocol", metavar="NAME", help="Only this protocol's own table and curve. [default: every one]")
def command(results: tuple[Path, ...], out: Path | None, protocol: str | None) -> None:
    """Write the paper's tables and figures, with your own models in them, from published and measured records.

    report.html has all of them on one page that loads nothing: tables to sort and filter, curves whose points say which
    record they are, sample grids, and for each number its record and the command that measures it again.
    """
    if protocol is not None and protocol not in registry.protocols and not protocol.endswith(".toml"):
        click.echo(f"harness: {registry.unknown('protocol', protocol, registry.protocols.names())}", err=True)
    paths = results or ((RUNS,) if RUNS.exists() else ())
    show(paths, out or RUNS / "report", protocol=protocol)


def show(paths: Sequence[Path], out: Path, *, protocol: str | None = None, only: Path | None = None) -> None:
    """Write the report of `paths` to `out`, name what could not be used, and print the measured rows.

    `only` narrows the printed rows to the records below that folder.
    """
    from reports.page.writer import NAME as PAGE
    from reports.report import TABLES, write_report
    from results.store import find_record_files, load

    with Stages({"records": "files", TABLES: "parts", "figures": "figures"}) as progress:
        summary = write_report(paths, out, protocol=protocol, progress=progress)
    _name(summary.problems, "lines of record files that could not be used")
    _name(summary.conflicts, "disputed measurements, which are in no table")
    print_records(load(find_record_files([only])).records if only else summary.records)
    for path in summary.files:
        if path.suffix == ".png" or re.fullmatch(r"table-\D.*\.md", path.name):  # the paper's tables have numbers
            click.echo(f"  {path}")
    click.echo(f"{len(summary.files):,} file{'s' if len(summary.files) != 1 else ''} in {out}")
    for note in summary.notes:
        click.echo(note)
    if only is not None:
        for grid in sorted(only.glob("samples/*/grid.png")):
            click.echo(f"  {grid}")
    click.echo(f"page: {out / PAGE}")


def _name(problems: Sequence[object], what: str) -> None:
    """The first few, and how many there are where there are more than one."""
    for problem in problems[:MAX_NAMED]:
        click.echo(f"harness: {problem}" + ("; left out" if len(problems) == 1 else ""), err=True)
    if len(problems) > 1:
        more = f", the first {MAX_NAMED} of them above" if len(problems) > MAX_NAMED else ""
        click.echo(f"harness: {what}: {len(problems):,}{more}", err=True)


def print_records(records: Iterable[Record]) -> None:
    """The records as tables on the terminal: what all rows share above, a column for each row below."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from reports.columns import features_of
    from reports.rows import console_table, groups, make_rows

    console = Console()
    tables = groups(records)
    if not tables:
        click.echo("no measured records yet; `harness run --backbone dit-xs-2` makes some")
    for members in tables:  # what may not share a table does not
        made = make_rows(members)
        rows = console_table(made[:MAX_ROWS])
        shared = {
            title: rows[0][title]
            for title in rows[0]
            if len({row[title] for row in rows}) == 1 and "\u2191" not in title and "\u2193" not in title
        }
        varying = [title for title in rows[0] if title not in shared]
        console.print(
            "  ".join(
                f"[bold]{escape(text)}[/]" if title == "System" else f"{title} {escape(text)}"
                for title, text in shared.items()
            )
        )
        columns = max(1, (console.width - 20) // CELL_WIDTH)
        for start in range(0, len(rows), columns):
            table = Table(show_header=False)
            for title in varying:
                # An interval goes under its value, so that the columns stay narrow.
                table.add_row(
                    escape(title), *(escape(row[title].replace(" [", "\n[")) for row in rows[start : start + columns])
                )
            console.print(table)
        if left_out := len(made[MAX_ROWS:]):
            console.print(f"{left_out:,} more rows are in the table of the protocol.")
        judges = sorted({features for each in members if (features := features_of(each))})
        console.print(
            f"Features: {escape(', '.join(judges))}. In brackets: 95 % intervals over the draw of the samples."
        )
