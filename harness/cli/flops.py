"""`harness flops`: parameters and theoretical Gflops, with the values that the DiT paper prints."""

from __future__ import annotations

import json
from typing import Any

import click

from harness.cli.flags_from_settings import TEXT, json_option, plugin_option
from harness.compute import CONVENTION
from harness.errors import RunError, UserError
from harness.planning.flops_table import (
    PROTOCOL_ARGUMENTS,
    cascades,
    footnotes,
    input_sizes,
    make_row,
    sampling_row,
    system_row,
)
from harness.registry import backbones, systems
from harness.spec import BackboneSpec
from harness.systems.read import get_system
from harness.systems.spec import CLASSIFIER_PASSES, System


@click.command("flops")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option(
    "--protocol",
    type=TEXT,
    metavar="NAME|FILE.toml",
    help="Count at the input size of this protocol. [default: the native input]",
)
@click.option("--breakdown", is_flag=True, help="Also print the flops of each part of the network.")
@click.option("--check", type=click.Choice(["fvcore"]), help="Also count with another package.")
@click.option("--sampling", is_flag=True, help="Cost of one image of each system, with guidance and decoding.")
@plugin_option
@json_option
def command(
    names: tuple[str, ...], protocol: str | None, breakdown: bool, check: str | None, sampling: bool, as_json: bool
) -> None:
    """Parameters and theoretical Gflops of one forward pass on one image, with the values that the DiT paper prints.

    Without NAME: all backbones (at two input sizes if the paper prints both), and the cascades of the paper.
    """
    if sampling:
        if protocol or breakdown or check:
            raise UserError("--sampling counts systems as they are; leave out --protocol, --breakdown and --check")
        runnable = [each for each in systems if not each.unavailable]
        # of an adaptive sampler each image has its own cost; asked for by name, such a system is refused with that reason
        show_sampling([get_system(name) for name in names] or [s for s in runnable if not s.is_adaptive], as_json)
        return
    # a name that a backbone and a system have in common means the backbone
    system_names = [name for name in names if name in systems and name not in backbones]
    if names:
        wanted_systems = [systems.get(name) for name in system_names]
    else:
        wanted_systems = [] if protocol else cascades()
    others = tuple(name for name in names if name not in system_names)
    # without others, networks_to_count would count all backbones: only right if no name was given
    networks = networks_to_count(others, protocol) if others or not names else []
    rows, refused = [], []
    for spec, overrides in networks:
        try:
            rows.append(make_row(spec, overrides, breakdown=breakdown, check=check))
        except UserError as error:
            if names or check:  # the user asked for this network, or for a check that may be what fails (no fvcore)
                raise
            refused.append({"name": spec.name, "reason": str(error)})
    # a system that is only in the paper has no components
    rows += [system_row(each) for each in wanted_systems if each.components]
    notes = footnotes(rows)
    failed = [row["fvcore_error"] for row in rows if "fvcore_error" in row]
    if as_json:
        document = {"convention": CONVENTION, "rows": rows, "footnotes": notes, "refused": refused}
        click.echo(json.dumps(document, indent=2))
    else:
        _print(rows, notes, refused, check)
    if failed:  # last, so that it hides no row
        raise RunError("; ".join(failed))


def _print(rows: list[dict[str, Any]], notes: list[str], refused: list[dict[str, str]], check: str | None) -> None:
    """Print everything for people."""
    show(rows, check=check)
    for row in rows:
        if "breakdown" in row:
            show_breakdown(row)
    for note in notes:
        click.echo(note)
    for each in refused:
        click.echo(f"{each['name']}: left out; {each['reason']}")
    click.echo(CONVENTION)


def networks_to_count(names: tuple[str, ...], protocol: str | None) -> list[tuple[BackboneSpec, dict[str, Any]]]:
    """(spec, builder arguments that replace the spec's defaults) of each network to count.

    names empty: all backbones, each at every size of `input_sizes` if `protocol` is None. protocol: counts each network
    at the protocol's input; None: at the native input.
    """
    specs = [backbones.get(name) for name in names] if names else list(backbones)
    if protocol is not None:
        from harness.protocols import get_protocol
        from harness.runs.run import network_classes

        loaded = get_protocol(protocol)
        sizes_of = {name: getattr(loaded, name) for name in PROTOCOL_ARGUMENTS}
        networks = [(spec, {**sizes_of, "num_classes": network_classes(spec, loaded)}) for spec in specs]
        return [(spec, {name: sizes[name] for name in sizes if name in spec.defaults}) for spec, sizes in networks]
    if names:
        return [(spec, {}) for spec in specs]
    sizes = [(spec, size) for spec in specs for size in input_sizes(spec)]
    return [(spec, {} if size == spec.defaults.get("input_size") else {"input_size": size}) for spec, size in sizes]


def show(rows: list[dict[str, Any]], *, check: str | None) -> None:
    """Print the rows as a table. check: "fvcore" adds a column with that package's count; None: no such column."""
    from rich.table import Table

    from harness.cli.tables import print_table

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("backbone", no_wrap=True)
    headings = ["input", "params (M)", "paper", "Gflops", "paper", "difference", "Gmacs", "count"]
    for heading in headings + (["fvcore"] if check else []):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        size, channels = row["input_size"], row["in_channels"]
        published_params = row["published_params_m"]
        if row["difference"] is None:  # no published value
            difference = "-"
        else:
            difference = f"{row['difference']:+z.2f}" if row["difference"] else "0"
        cells = [
            row["name"],
            "x".join(str(each) for each in (size, size, channels) if each) if size else "-",
            f"{row['params'] / 1e6:.2f}",
            "-" if published_params is None else f"{published_params:g}",
            f"{row['gflops']:.2f}" if row["gflops"] >= 0.1 else f"{row['gflops']:.4f}",
            row.get("published_text", "-"),
            difference,
            f"{row['gmacs']:.4f}",
            row["source"],
        ]
        if check:
            cells.append(f"{row['fvcore_gflops']:.4f}" if "fvcore_gflops" in row else "-")  # "-" for a system
        table.add_row(*cells)
    print_table(table)


def show_sampling(chosen: list[System], as_json: bool) -> None:
    """Print the cost of one image of each system, as a table or as JSON."""
    rows = [sampling_row(each) for each in chosen]
    note = (
        "Gflops an image: one forward pass a step of each network; what classifier-free guidance (a second pass a step), "
        f"autoguidance (a pass a step of a weaker network) or a classifier ({CLASSIFIER_PASSES} of its passes a step) adds; "
        "decoding of latents. The paper's figures leave out the last two."
    )
    if as_json:
        click.echo(json.dumps({"convention": CONVENTION, "note": note, "rows": rows}, indent=2))
        return
    from rich.table import Table

    from harness.cli.tables import print_table

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("system", no_wrap=True)
    for heading in ("steps", "sampling", "guidance", "decoding", "an image"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        costs = [row[name] for name in ("gflops_unguided", "gflops_guidance", "gflops_decode", "gflops_image")]
        cells = [f"{cost:,.0f}" if cost >= 100 else f"{cost:.4g}" if cost else "-" for cost in costs]
        table.add_row(row["name"], " + ".join(map(str, row["steps"])), *cells)
    print_table(table)
    click.echo(note)
    click.echo(CONVENTION)


def show_breakdown(row: dict[str, Any]) -> None:
    """Print the parts of one network with their flops and their share of the total."""
    width = max((len(each["part"]) for each in row["breakdown"]), default=0)
    click.secho(f"\n{row['name']}", bold=True)
    for each in row["breakdown"]:
        share = each["flops"] / row["flops"]
        gflops = f"{each['flops'] / 1e9:>11.6f} Gflops"
        click.echo(f"  {each['part']:<{width}}  {each['kind']:<9} {gflops}  {share:6.1%}  x{each['times']}")
