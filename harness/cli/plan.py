"""`harness plan`: what a run would cost.

Its flags are the fields of `PlanOptions` in `harness/settings/plan_flags.py` and what it imports.
"""

from __future__ import annotations

import json
from typing import Any

import click

from harness.cli.flags_from_settings import json_option, settings_options
from harness.errors import UserError
from harness.planning.matching import budget_table, checked_steps, request_from
from harness.planning.plan_text import costs_text, error_text, gflops_text, headline, measured_text, one_is_too_much
from harness.protocols import get_protocol, override
from harness.settings import DEFAULT_PROTOCOL, PlanOptions, settings_of

TABLE_SETTINGS = {"protocol", "match", "budget", "set"}  # the settings that the table of a budget uses


@click.command("plan")
@settings_options(PlanOptions)
@json_option
def command(as_json: bool, **settings: Any) -> None:
    """Say what a run would cost (compute and disk; with --measure memory, and hours at the speed here), and write nothing.

    What would stop the run (data or an autoencoder that is missing on this machine, a weight file that needs an --entry)
    gets a line that begins with "missing", and is in --json's "missing"; the plan is made all the same, with exit code 0. Only what cannot be planned
    (an unknown name, a flag that makes no sense here) is refused, with exit code 2.

    With --measure the network is built and a few training steps are timed, which takes a minute or two for the largest.

    The items of the recipe, which --set can override, are listed with their values.

    Without --backbone, --budget GFLOPS (or --match BACKBONE@STEPS) lists what every backbone would get from it:

        harness plan --budget 1e6
    """
    options = PlanOptions(**settings)
    if options.backbone is None:
        _show_table(options, as_json)
        return
    from harness.pipeline.plan import plan_with_files, with_measurement

    request = request_from(options)
    plan = plan_with_files(request, options)
    if not as_json:  # before the measurement, which takes its time
        click.echo(headline(request, by_default=options.protocol is None))
        click.echo(costs_text(plan))
        click.echo("recipe (override with --set NAME=VALUE)")
        for name, value in plan.recipe.items():
            click.echo(f"  {name:<18} {value}")
        for sentence in plan.missing_evaluator_files:
            click.echo(f"note     {sentence}; without them a run ends with samples")
        for sentence in plan.missing:
            click.echo(f"missing  {sentence}")
    measured_plan = with_measurement(plan, request, options) if options.measure else plan
    if as_json:
        click.echo(json.dumps(measured_plan.as_dict(), indent=2))
        return
    for sentence in measured_plan.missing[len(plan.missing) :]:  # what only the measurement found: too little memory
        click.echo(f"missing  {sentence}")
    if measured_plan.measured is not None:
        click.echo(measured_text(measured_plan.measured))
    elif not options.measure:
        click.echo("memory and hours on this machine: --measure")


def _show_table(options: PlanOptions, as_json: bool) -> None:
    """Print the training steps that every backbone gets from one budget, as a table or as JSON."""
    if options.match is None and options.budget is None:
        raise UserError("name a --backbone, or give --budget GFLOPS for a table of what each backbone would get")
    checked_steps(options)  # for its UserError, if several settings give the training steps
    # Refuse a flag that the table does not use, unless its value is the default.
    given = options.given()
    for name, info in settings_of(options).items():
        if name in given and name not in TABLE_SETTINGS:
            raise UserError(f"{info.flag(name)} has no part in the table of a budget; name a --backbone with it")
    protocol = get_protocol(options.protocol or DEFAULT_PROTOCOL)
    document = budget_table(
        protocol, override(protocol.recipe, options.set), match=options.match, budget=options.budget
    )
    if as_json:
        click.echo(json.dumps(document, indent=2))
        return
    _print_table(document)


def _print_table(document: dict[str, Any]) -> None:
    """Print the document of `budget_table` as a table."""
    from rich.table import Table

    from harness.cli.tables import print_table

    reference = f", those of {document['to']}" if document["to"] else ""
    click.echo(
        f"{document['gflops_target']:.6g} Gflops of training{reference}, on protocol {document['protocol']}"
        f" in batches of {document['batch']} (Gflops x batch x steps x 3)"
    )
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("backbone", no_wrap=True)
    for heading in ("params (M)", f"Gflops at {document['input']}", "steps", "images", "epochs", "rounding"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in document["rows"]:
        epochs = row["epochs"]
        table.add_row(
            row["name"],
            f"{row['params'] / 1e6:.2f}",
            gflops_text(row["gflops"]) + (" traced" if row["gflops_source"] == "traced" else ""),
            f"{row['steps']:,}",
            f"{row['images']:,}",
            "-" if epochs is None else f"{epochs:,.0f}" if epochs >= 100 else f"{epochs:.3g}",
            error_text(row["relative_error"]),
        )
    print_table(table)
    if any(one_is_too_much(row["steps"], row["relative_error"]) for row in document["rows"]):
        click.echo("1 step, and more than 0 % over: a single step costs more than the budget.")
    for each in document["left_out"]:
        click.echo(f"{each['name']}: left out; {each['reason']}")
