"""Tables and summaries that are printed by several commands."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from results.records import Record

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from reports.report import ReportSummary

CELL_WIDTH = 19  # characters of one column on the terminal
TITLES_WIDTH = 20  # characters of the column of titles
MAX_ROWS = 50  # records shown in one table
MAX_PROBLEMS = 5  # unusable lines, and conflicts, that are printed
PIPED_WIDTH = 140  # characters of a line where stdout is no terminal; rich's 80 would cut the columns of tables
MAX_WIDTH = 100_000  # more characters than any table has in a line


def table_console() -> Console:
    """The one console for tables on stdout: as wide as the terminal, or PIPED_WIDTH where stdout is no terminal."""
    from rich.console import Console

    return Console(width=None if Console().is_terminal else PIPED_WIDTH, highlight=False)


def print_table(table: Table) -> None:
    """Print a table whose cells are never cut: a line that is longer than the terminal's is broken by the terminal."""
    console = table_console()
    options = console.options.update(width=MAX_WIDTH)
    console.width = max(console.width, console.measure(table, options=options).maximum)
    console.print(table)


def print_report(summary: ReportSummary, out: Path, *, only: Path | None = None) -> None:
    """Print a report: unusable lines, measured rows, files, the page. only: a run; print rows and grids of it alone."""
    from reports.page.writer import NAME as PAGE
    from results.store import find_record_files, load

    _print_problems(summary.problems, "lines of record files that could not be used")
    _print_problems(summary.conflicts, "conflicting measurements, which are left out of all tables")
    print_records(load(find_record_files([only])).records if only else summary.records)
    for path in summary.files:
        # the tables of protocols, table-<protocol>.md, but not those of the paper, table-1.md to table-6.md
        if path.suffix == ".png" or re.fullmatch(r"table-\D.*\.md", path.name):
            click.echo(f"  {path}")
    click.echo(f"{len(summary.files):,} file{'s' if len(summary.files) != 1 else ''} in {out}")
    for note in summary.notes:
        click.echo(note)
    if only is not None:
        for grid in sorted(only.glob("samples/*/grid.png")):
            click.echo(f"  {grid}")
    click.echo(f"page: {out / PAGE}")


def _print_problems(problems: Sequence[object], what: str) -> None:
    """Print the first few problems, and their number if there is more than one. what: names them beside the number."""
    for problem in problems[:MAX_PROBLEMS]:
        click.echo(f"harness: {problem}" + ("; left out" if len(problems) == 1 else ""), err=True)
    if len(problems) > 1:
        more = f", the first {MAX_PROBLEMS} of them above" if len(problems) > MAX_PROBLEMS else ""
        click.echo(f"harness: {what}: {len(problems):,}{more}", err=True)


def print_records(records: Iterable[Record]) -> None:
    """Print the records as tables: the values that all records share above, then one column for each record."""
    from rich.markup import escape
    from rich.table import Table

    from reports.rows import console_table, groups, make_rows
    from reports.texts import DOWN, UP, features_of

    console = table_console()
    tables = groups(records)
    if not tables:
        click.echo("no measured records yet; `harness run --backbone dit-xs-2` makes some")
    for members in tables:  # records that cannot be compared are in different tables
        all_rows = make_rows(members)
        rows = console_table(all_rows[:MAX_ROWS])  # each is a dict: column title -> text
        shared = {  # without metrics, whose titles have an arrow
            title: rows[0][title]
            for title in rows[0]
            if len({row[title] for row in rows}) == 1 and UP not in title and DOWN not in title
        }
        varying = [title for title in rows[0] if title not in shared]
        console.print(
            "  ".join(
                f"[bold]{escape(text)}[/]" if title == "System" else f"{title} {escape(text)}"
                for title, text in shared.items()
            )
        )
        # The printed table is turned: a row for each varying title, a column for each of as many records as fit.
        columns = max(1, (console.width - TITLES_WIDTH) // CELL_WIDTH)
        for start in range(0, len(rows), columns):
            table = Table(show_header=False)
            for _ in range(1 + len(rows[start : start + columns])):
                table.add_column(overflow="fold")  # the default would cut a number that is wider than its column
            for title in varying:
                # An interval is printed below its value, to keep the columns narrow.
                table.add_row(
                    escape(title), *(escape(row[title].replace(" [", "\n[")) for row in rows[start : start + columns])
                )
            console.print(table)
        if left_out := len(all_rows[MAX_ROWS:]):
            console.print(f"{left_out:,} more rows are in the protocol's table.")
        extractors = sorted({features for each in members if (features := features_of(each))})
        console.print(
            f"Features: {escape(', '.join(extractors))}. In brackets: 95 % intervals over the random draw of the samples."
        )
