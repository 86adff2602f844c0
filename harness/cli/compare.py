"""`harness compare`: win, loss or tie.

Its flags are the fields of `CompareOptions` in `harness/settings/compare_flags.py` and what it imports.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import click

from harness.cli.flags_from_settings import json_option, settings_options
from harness.pipeline.compare import Comparison, compare
from harness.settings import CompareOptions
from results.compare import SAMPLING_RULE, SEEDS_RULE, Verdict
from results.experiments import Group


@click.command("compare")
@settings_options(CompareOptions)
@json_option
def command(as_json: bool, **options: Any) -> None:
    """Compare two results (A and B: runs, folders of runs, or record files): win, loss or tie for A, and the rule.

    Several training seeds, or sampling seeds, of one experiment belong together: put their runs into one folder.
    """
    comparison = compare(**options)
    if comparison.to_target:
        _print_to_target(comparison, as_json)
        return
    verdicts, differing = comparison.verdicts, comparison.differing
    first = verdicts[0]  # its two sides give A and B their names
    if as_json:
        document = {
            "rule": comparison.rule,
            "differing": differing,
            "compute": [{**dataclasses.asdict(each), "ratio": each.ratio} for each in comparison.compute],
            "warnings": list(comparison.warnings),
            "rows": [_row(verdict) for verdict in verdicts],
        }
        click.echo(json.dumps(document, indent=2))
        return
    from rich.markup import escape
    from rich.table import Table

    from harness.cli.tables import print_table

    click.echo(f"A = {_name(first.a)}")
    click.echo(f"B = {_name(first.b)}")
    samplings = sorted({verdict.sampling for verdict in verdicts})
    counts = sorted({verdict.a.n for verdict in verdicts})
    click.echo(f"N = {', '.join(f'{n:,}' for n in counts)}" + (f", {samplings[0]}" if len(samplings) == 1 else ""))
    over_training_seeds = all(verdict.scope == "training seeds" for verdict in verdicts)
    columns = {  # heading: function from a verdict to its cell
        "metric": lambda each: each.metric,
        "sampling": lambda each: escape(each.sampling),
        "A": lambda each: f"{each.a.value:z.4g}",
        "B": lambda each: f"{each.b.value:z.4g}",
        "A - B": lambda each: f"{each.difference:+z.3g}",
        "noise": lambda each: "-" if each.largest_tie is None else f"{each.largest_tie:.3g}",
        "A is a": lambda each: each.verdict,
        "trained again": lambda each: each.if_trained_again or "unknown",
    }
    if len(samplings) == 1:  # printed above
        del columns["sampling"]
    if over_training_seeds:  # the verdicts are about training again already
        del columns["trained again"]
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in columns:
        is_number = heading in ("A", "B", "A - B", "noise")
        table.add_column(heading, justify="right" if is_number else "left", no_wrap=True)
    for each in verdicts:
        table.add_row(*(text(each) for text in columns.values()))
    print_table(table)
    if differing:
        text = "; ".join(f"{name} {values[0]} and {values[1]}" for name, values in differing.items())
        click.echo(f"A and B also differ in: {text}")
    for compute in comparison.compute:
        where = f" ({compute.sampling})" if compute.sampling else ""
        unit = "Gflops of training" if compute.what == "training" else "Gflops an image"
        click.echo(f"{unit}{where}: A {_gflops(compute.a)}, B {_gflops(compute.b)}")
    for warning in comparison.warnings:
        click.echo(f"warning: {warning}")
    click.echo(SEEDS_RULE if over_training_seeds else SAMPLING_RULE)


def _row(verdict: Verdict) -> dict[str, Any]:
    """A verdict as a row of --json. "a_seeds" and "b_seeds" have, for each training seed, the number of its records."""
    degrees = verdict.degrees_of_freedom
    return {
        "metric": verdict.metric,
        "sampling": verdict.sampling,
        "a": verdict.a.value,
        "b": verdict.b.value,
        "difference": verdict.difference,
        "noise": verdict.largest_tie,
        "degrees_of_freedom": None if degrees is None or math.isinf(degrees) else degrees,
        "scope": verdict.scope,
        "verdict": verdict.verdict,
        "trained_again": verdict.if_trained_again,
        "training_noise": verdict.training_noise,
        "a_seeds": [sum(map(len, checkpoints)) for checkpoints in verdict.a.seeds],
        "b_seeds": [sum(map(len, checkpoints)) for checkpoints in verdict.b.seeds],
        "a_ids": [each.id for each in verdict.a.records],
        "b_ids": [each.id for each in verdict.b.records],
    }


def _print_to_target(comparison: Comparison, as_json: bool) -> None:
    """Print the verdicts of --target: a table with a row for each side, and a sentence for each verdict."""
    if as_json:
        rows = [dataclasses.asdict(each) for each in comparison.to_target]
        for row in rows:
            row["target"] = {"metric": row["target"]["metric"], "value": row["target"]["value"]}
            for letter in ("a", "b"):
                for seed in row[letter]["seeds"]:  # JSON has no infinity
                    seed["high"] = None if math.isinf(seed["high"]) else seed["high"]
        click.echo(json.dumps({"rule": comparison.rule, "rows": rows}, indent=2))
        return
    from rich.markup import escape
    from rich.table import Table

    from harness.cli.tables import print_table

    click.echo(f"training until {comparison.to_target[0].target}")
    table = Table(box=None, header_style="bold", pad_edge=False)
    timed = any(side.hours is not None for each in comparison.to_target for side in (each.a, each.b))
    headings = ("", "system", "sampling", "seeds", "Gflops", "95 % interval", *(("hours",) if timed else ()), "")
    for heading in headings:
        table.add_column(
            heading, justify="right" if heading in ("seeds", "Gflops", "hours") else "left", no_wrap=bool(heading)
        )
    for each in comparison.to_target:
        for name, side in (("A", each.a), ("B", each.b)):
            bounds = "-" if side.low is None else f"{side.low:.4g} to {side.high:.4g}"
            hours = ("-" if side.hours is None else f"{side.hours:.3g}",) if timed else ()
            table.add_row(
                name, escape(side.system), escape(each.sampling), str(len(side.seeds)),
                "-" if side.gflops is None else f"{side.gflops:.4g}", bounds, *hours, escape(side.text),
            )  # fmt: skip
    print_table(table)
    for each in comparison.to_target:
        words = (
            f"{each.sampling}: A is a {each.verdict}" if each.verdict != "unknown" else f"{each.sampling}: no verdict"
        )
        if each.ratio is not None:
            bounds = "" if each.ratio_low is None else f", 95 % interval {each.ratio_low:.3g} to {each.ratio_high:.3g}"
            words += f"; A needs {each.ratio:.3g} times the training compute of B{bounds}"
        if each.hours_ratio is not None:
            words += f", and {each.hours_ratio:.3g} times the hours"
        click.echo(words + (f" ({each.reason})" if each.reason else ""))
    for sentence in _timed_on(comparison):
        click.echo(sentence)
    click.echo(comparison.rule)


def _timed_on(comparison: Comparison) -> list[str]:
    """Sentences that name the devices of the hours."""
    sides = {"A": [each.a for each in comparison.to_target], "B": [each.b for each in comparison.to_target]}
    devices = {name: sorted({each.device for each in times if each.device}) for name, times in sides.items()}
    return [f"hours of {name} on {', '.join(found)}" for name, found in devices.items() if found]


def _gflops(value: float | None) -> str:
    return "not stated" if value is None else f"{value:.4g}"


def _name(group: Group) -> str:
    """A side of the comparison in one line: system, training steps, training seeds, number of sampling seeds."""
    record = group.records[0]
    training = record.training
    if training is None or not training.steps:
        return record.system
    seeds = sorted({each.training.seed for each in group.records if each.training and each.training.seed is not None})
    words = f", seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}" if seeds else ""
    sampling_seeds = max(len(each) for each in group.checkpoints)
    words += f", {sampling_seeds} sampling seeds" if sampling_seeds > 1 else ""
    return f"{record.system}, {training.steps} steps{words}"
