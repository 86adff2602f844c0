"""`harness compare`: win, loss or tie."""

from __future__ import annotations

import json
from pathlib import Path

import click

from harness.cli.options import FOLDER, Count, json_option
from harness.errors import Refusal
from results.compare import RULE, compare
from results.records import Record
from results.store import find_record_files, load


@click.command("compare")
@click.argument("a", type=FOLDER)
@click.argument("b", type=FOLDER)
@click.option("--step", type=Count(), help="Training steps of the records to compare, where a side has several.")
@json_option
def command(a: Path, b: Path, step: int | None, as_json: bool) -> None:
    """Compare two results (A and B: runs, folders of runs, or record files): win, loss or tie for A, and the rule."""
    verdicts = compare(_records(a, step), _records(b, step))
    if as_json:
        rows = [
            {
                "metric": each.metric, "sampling": each.sampling, "a": each.a.value, "b": each.b.value,
                "difference": each.difference, "noise": each.noise, "verdict": each.verdict,
                "a_id": each.a.id, "b_id": each.b.id,
            }
            for each in verdicts
        ]  # fmt: skip
        click.echo(json.dumps({"rule": RULE, "rows": rows}, indent=2))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from reports.columns import measured_text

    table = Table(title=f"A = {escape(_name(verdicts[0].a))}   B = {escape(_name(verdicts[0].b))}")
    for heading in ("metric", "samples", "A", "B", "A - B", "noise", "A is a"):
        table.add_column(heading, justify="left" if heading in ("metric", "samples", "A is a") else "right")
    for each in verdicts:
        table.add_row(
            each.metric,
            f"{each.sampling}, N={each.a.n}",
            measured_text(each.a.value, each.a.low, each.a.high).replace(" [", "\n["),
            measured_text(each.b.value, each.b.low, each.b.high).replace(" [", "\n["),
            f"{each.difference:+.4g}",
            "-" if each.noise is None else f"{each.noise:.3g}",
            each.verdict,
        )
    Console().print(table)
    click.echo(RULE)


def _records(path: Path, step: int | None) -> list[Record]:
    loaded = load(find_record_files([path]))
    for problem in loaded.problems:
        click.echo(f"harness: {problem}", err=True)
    for conflict in loaded.conflicts:
        click.echo(f"harness: {conflict}", err=True)
    found = [each for each in loaded.records if step is None or (each.training and each.training.steps == step)]
    if not found:
        raise Refusal(f"{path} has no records{f' of step {step}' if step else ''}; `harness evaluate` makes them")
    return found


def _name(record: Record) -> str:
    training = record.training
    return record.system + (f", {training.steps} steps, seed {training.seed}" if training and training.steps else "")
