"""`harness flops`: parameters and theoretical Gflops, beside what the DiT paper prints."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

import click

from harness.cli.options import json_option
from harness.compute import CONVENTION
from harness.errors import Refusal
from harness.registry import backbones, systems
from harness.spec import BackboneSpec, Compute
from harness.systems import CLASSIFIER_PASSES, System, get_system

GFLOPS_COLUMNS = ("Flops (G)", "Total Flops (G)", "Base Flops (G)", "Upsampler Flops (G)")  # of Tables 4 and 6
PARAMS_COLUMN = "Params (M)"
PROTOCOL_ARGUMENTS = ("input_size", "in_channels", "num_classes")


class Published(NamedTuple):
    """What the paper prints for a network at one input size, as text: 19.70 stays 19.70. Empty where it does not."""

    gflops: str
    params: str  # millions


def published(spec: BackboneSpec, input_size: int | None) -> Published:
    """The paper's figures for `spec` at an input of `input_size` cells or pixels a side."""
    from results import paper

    cells = [cell for cell in paper.values() if cell.backbone == spec.name and cell.resolution is not None]
    cells = [cell for cell in cells if cell.column in (*GFLOPS_COLUMNS, PARAMS_COLUMN)]
    native = spec.defaults.get("input_size")
    if not cells or not native or not input_size:
        return Published("", "")
    # The paper names image resolutions; the network's default input belongs to the smallest one (256 to 32 cells).
    resolution = input_size * min(cell.resolution for cell in cells) // native
    at_size = {cell.column: cell.value for cell in reversed(cells) if cell.resolution == resolution}
    gflops = next((at_size[column] for column in GFLOPS_COLUMNS if column in at_size), "")
    return Published(gflops, at_size.get(PARAMS_COLUMN, ""))


def input_sizes(spec: BackboneSpec) -> list[int | None]:
    """The native input size, and twice that where the paper prints the Gflops there too (None: no input size)."""
    native = spec.defaults.get("input_size")
    return [native, 2 * native] if native and published(spec, 2 * native).gflops else [native]


def make_row(spec: BackboneSpec, overrides: dict[str, Any], *, breakdown: bool, check: str | None) -> dict[str, Any]:
    """One row of the document; `difference` is ours rounded as the paper's figure is, minus that figure."""
    count = spec.count(**overrides)
    arguments = spec.arguments(**overrides)
    others = {name: value for name, value in arguments.items() if name != "input_size"}
    as_published = all(spec.defaults[name] == value for name, value in others.items())
    figures = published(spec, arguments.get("input_size")) if as_published else Published("", "")
    row: dict[str, Any] = {
        "name": spec.name,
        **{name: arguments.get(name) for name in PROTOCOL_ARGUMENTS},
        "params": count.params,
        "flops": count.flops,
        "gflops": count.gflops,
        "gmacs": count.gmacs,
        "published_gflops": float(figures.gflops) if figures.gflops else None,
        "published_params_m": float(figures.params) if figures.params else None,
        "difference": None,
        "source": count.source,
    }
    if figures.gflops:
        decimals = len(figures.gflops.partition(".")[2])
        row["difference"] = round(round(count.gflops, decimals) - float(figures.gflops), decimals)
        row["published_text"] = figures.gflops
    if check == "fvcore":
        from harness.compute.check_fvcore import count_fvcore

        row["fvcore_gflops"] = count_fvcore(spec, **overrides) / 1e9
    if breakdown:
        row["breakdown"] = grouped(count)
    return row


def system_row(system: System) -> dict[str, Any]:
    """The row of a system of several denoisers: one forward pass of each, as Table 6 counts; no classifier."""
    from results import paper

    computes = [stage.compute() for stage in system.stages]
    total = sum(each.flops for each in computes) / 1e9
    cells = [cell for cell in paper.values() if cell.system == system.name and cell.column == "Total Flops (G)"]
    last = system.stages[-1].spec.arguments(**system.stages[-1].arguments)
    row: dict[str, Any] = {
        "name": system.name,
        **{name: last.get(name) for name in PROTOCOL_ARGUMENTS},
        "params": sum(each.params for each in computes),
        "flops": sum(each.flops for each in computes),
        "gflops": total,
        "gmacs": sum(each.macs for each in computes) / 1e9,
        "published_gflops": float(cells[0].value) if cells else None,
        "published_params_m": None,
        "difference": round(round(total) - float(cells[0].value)) if cells else None,
        "source": "closed form",
        "parts": [
            {"name": stage.backbone, "gflops": each.gflops} for stage, each in zip(system.stages, computes, strict=True)
        ],
    }
    if cells:
        row["published_text"] = cells[0].value
    return row


def cascades() -> list[System]:
    """The systems of several denoisers that Table 6 has a total of."""
    from results import paper

    printed = {cell.system for cell in paper.values() if cell.column == "Total Flops (G)"}
    return [each for each in systems if each.name in printed and len(each.stages) > 1]


def sampling_row(system: System) -> dict[str, Any]:
    """What one image of a system costs: sampling with and without its guidance, and decoding apart."""
    from harness import decoding

    if system.unavailable:
        raise Refusal(f"system {system.name!r} cannot be counted: {system.unavailable}")
    steps = [1 if stage.spec.kind == "generator" else stage.steps for stage in system.stages]
    plain = sum(stage.compute().gflops * count for stage, count in zip(system.stages, steps, strict=True))
    decode = decoding.decoder_compute(system.decoder, system.task.resolution).gflops if system.decoder else 0.0
    total = system.gflops_image()
    return {
        "name": system.name,
        "backbone": system.backbone,
        "gflops": system.gflops_forward(),
        "steps": steps,
        "evaluations": system.evaluations,
        "gflops_unguided": plain,
        "gflops_guidance": total - plain,
        "gflops_decode": decode,
        "gflops_image": total + decode,
    }


def grouped(count: Compute) -> list[dict[str, Any]]:
    """Flops by part and kind with the blocks of a network taken together: `blocks.*.mlp.fc1`, 28 times."""
    table: dict[tuple[str, str], list[int]] = {}
    for (part, kind), flops in count.breakdown.items():
        stem = re.sub(r"\.\d+(?=\.)", ".*", part)
        table.setdefault((stem, kind), []).append(flops)
    return [{"part": p, "kind": k, "times": len(each), "flops": sum(each)} for (p, k), each in table.items()]


def footnotes(rows: list[dict[str, Any]]) -> list[str]:
    """One line for every row that differs from the paper, and for traced counts."""
    notes = []
    for row in rows:
        if row["difference"]:
            why = "taken for a slip of the paper, as no natural convention gives it with the others"
            why = why if row["name"] == "dit-b-4" else "the paper counts something else"
            notes.append(
                f"{row['name']}: {row['gflops']:.2f} by the convention, {row['published_text']} in the paper; {why}."
            )
    if any(row["source"] == "traced" for row in rows):
        notes.append("traced: counted operator by operator in the torch network, which has no closed form.")
    return notes


@click.command("flops")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--protocol", metavar="NAME|FILE.toml", help="Count at this task's input. [default: the native input]")
@click.option("--breakdown", is_flag=True, help="Flops of every part of the network.")
@click.option("--check", type=click.Choice(["fvcore"]), help="Count once more with another package.")
@click.option("--sampling", is_flag=True, help="What an image of each system costs, with guidance and decoding.")
@json_option
def command(
    names: tuple[str, ...], protocol: str | None, breakdown: bool, check: str | None, sampling: bool, as_json: bool
) -> None:
    """Parameters and theoretical Gflops of one forward pass on one image, beside the values the DiT paper prints.

    Without NAME: every backbone, those that the paper has at two sizes at both, and its cascades.
    """
    if sampling:
        if protocol or breakdown or check:
            raise Refusal("--sampling counts systems as they are; leave out --protocol, --breakdown and --check")
        show_sampling(
            [get_system(name) for name in names] or [each for each in systems if not each.unavailable], as_json
        )
        return
    of_systems = [name for name in names if name in systems and name not in backbones]
    wanted_systems = [systems.get(name) for name in of_systems] if names else [] if protocol else cascades()
    others = tuple(name for name in names if name not in of_systems)
    requests = collect(others, protocol) if others or not names else []
    rows, refused = [], []
    for spec, overrides in requests:
        try:
            rows.append(make_row(spec, overrides, breakdown=breakdown, check=check))
        except Refusal as refusal:
            if names or check:  # asked for by name: the user must hear of it
                raise
            refused.append({"name": spec.name, "reason": str(refusal)})
    rows += [system_row(each) for each in wanted_systems if each.stages]
    notes = footnotes(rows)
    if as_json:
        document = {"convention": CONVENTION, "rows": rows, "footnotes": notes, "refused": refused}
        click.echo(json.dumps(document, indent=2))
        return
    show(rows, check=check)
    for row in rows:
        if "breakdown" in row:
            show_breakdown(row)
    for note in notes:
        click.echo(note)
    for each in refused:
        click.echo(f"{each['name']}: left out; {each['reason']}")
    click.echo(CONVENTION)


def collect(names: tuple[str, ...], protocol: str | None) -> list[tuple[BackboneSpec, dict[str, Any]]]:
    """The networks to count: a spec and the arguments that differ from its own."""
    specs = [backbones.get(name) for name in names] if names else list(backbones)
    if protocol is not None:
        from harness.protocols import get_protocol

        task = get_protocol(protocol)
        wanted = {name: getattr(task, name) for name in PROTOCOL_ARGUMENTS}
        return [(spec, {name: wanted[name] for name in wanted if name in spec.defaults}) for spec in specs]
    if names:
        return [(spec, {}) for spec in specs]
    sizes = [(spec, size) for spec in specs for size in input_sizes(spec)]
    return [(spec, {} if size == spec.defaults.get("input_size") else {"input_size": size}) for spec, size in sizes]


def show(rows: list[dict[str, Any]], *, check: str | None) -> None:
    """The rows as a table on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("backbone", no_wrap=True)
    headings = ["input", "params (M)", "paper", "Gflops", "paper", "difference", "Gmacs", "count"]
    for heading in headings + (["fvcore"] if check else []):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        size, channels = row["input_size"], row["in_channels"]
        known = row["published_params_m"]
        cells = [
            row["name"],
            "x".join(str(each) for each in (size, size, channels) if each) if size else "-",
            f"{row['params'] / 1e6:.2f}",
            "-" if known is None else f"{known:g}",
            f"{row['gflops']:.2f}" if row["gflops"] >= 0.1 else f"{row['gflops']:.4f}",
            row.get("published_text", "-"),
            "-" if row["difference"] is None else f"{row['difference']:+.2f}" if row["difference"] else "0",
            f"{row['gmacs']:.4f}",
            row["source"],
        ]
        table.add_row(
            *cells, *([f"{row.get('fvcore_gflops', 0):.4f}" if "fvcore_gflops" in row else "-"] if check else [])
        )
    Console(width=None if Console().is_terminal else 140, highlight=False).print(table)


def show_sampling(chosen: list[System], as_json: bool) -> None:
    """The cost of an image, as a table or as JSON."""
    rows = [sampling_row(each) for each in chosen]
    note = (
        "Gflops an image: one forward pass a step of each network; what classifier-free guidance (a second pass a step) or a "
        f"classifier ({CLASSIFIER_PASSES} of its passes a step) adds; decoding of latents. The paper's figures leave "
        "out the last two."
    )
    if as_json:
        click.echo(json.dumps({"convention": CONVENTION, "note": note, "rows": rows}, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("system", no_wrap=True)
    for heading in ("steps", "sampling", "guidance", "decoding", "an image"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        costs = [row[name] for name in ("gflops_unguided", "gflops_guidance", "gflops_decode", "gflops_image")]
        cells = [f"{cost:,.0f}" if cost >= 100 else f"{cost:.4g}" if cost else "-" for cost in costs]
        table.add_row(row["name"], " + ".join(map(str, row["steps"])), *cells)
    Console(width=None if Console().is_terminal else 140, highlight=False).print(table)
    click.echo(note)
    click.echo(CONVENTION)


def show_breakdown(row: dict[str, Any]) -> None:
    """The parts of one network, with their share of its flops."""
    width = max((len(each["part"]) for each in row["breakdown"]), default=0)
    click.secho(f"\n{row['name']}", bold=True)
    for each in row["breakdown"]:
        share = each["flops"] / row["flops"]
        gflops = f"{each['flops'] / 1e9:>11.6f} Gflops"
        click.echo(f"  {each['part']:<{width}}  {each['kind']:<9} {gflops}  {share:6.1%}  x{each['times']}")
