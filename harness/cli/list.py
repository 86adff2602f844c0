"""`harness list`: all registered names."""

from __future__ import annotations

import json
from typing import Any

import click

from harness import registry
from harness.cli.flags_from_settings import json_option, plugin_option
from harness.diffusion.samplers import option_text

NOUNS = {
    "backbones": registry.backbones,
    "systems": registry.systems,
    "protocols": registry.protocols,
    "datasets": registry.datasets,
    "samplers": registry.samplers,
    "objectives": registry.objectives,
    "guidance": registry.guidance_rules,
    "auxiliary-losses": registry.auxiliary_losses,
    "autoencoders": registry.autoencoders,
    "suites": registry.suites,
    "features": registry.features,
    "metrics": registry.metrics,
    "loggers": registry.loggers,
    "launchers": registry.launchers,
    "figures": registry.figures,
}


def system_metadata(item: Any) -> dict[str, Any]:
    """A system's parts, its published row and the FID printed there, and whether the harness can run it."""
    from results import paper

    fids = [cell.value for cell in paper.values() if cell.metric == "fid" and f"{cell.table}: {cell.row}" == item.row]
    return {
        "backbone": item.backbone,
        "protocol": item.protocol,
        "decoder": item.decoder or None,
        "published": item.row or None,
        "published_fid": float(fids[0]) if fids else None,
        "runs": not item.unavailable,
        "unavailable": item.unavailable or None,
        "weights": [*item.parts, *(["decoder"] if item.decoder else [])],
    }


def metric_metadata(item: Any) -> dict[str, Any]:
    """A metric's direction, smallest number of samples and paper."""
    return {"direction": item.direction, "minimum": item.minimum, "paper": item.paper}


def suite_metadata(item: Any) -> dict[str, Any]:
    """A suite's version, features, mode, note and metrics."""
    return {
        "version": item.version,
        "features": item.features.name,
        "mode": item.mode,
        "note": item.note or None,
        "metrics": [{"name": each.key, **metric_metadata(each)} for each in item.metrics],
    }


def sampler_metadata(item: Any) -> dict[str, Any]:
    """A sampler's form, and its options with their defaults and the words that they take; nothing if it has none."""
    options = getattr(item, "options", ())  # plug-ins may register another class
    if not options:
        return {}
    return {
        "form": item.form,
        "options": [
            {"name": each.name, "default": each.default, **({"choices": list(each.choices)} if each.choices else {})}
            for each in options
        ],
    }


def sampler_form(row: dict[str, Any]) -> str:
    """The form of a sampler with options, its defaults and the words that they take, in one line."""
    defaults = ":".join(option_text(each["default"]) for each in row["options"])
    choices = [f"{each['name'].upper()}: {', '.join(each['choices'])}" for each in row["options"] if "choices" in each]
    return "; ".join([f"{row['form']}, by default {defaults}", *choices])


METADATA = {
    # kind of item: function from an item to its further columns in --json
    "backbones": lambda item: {"kind": item.kind, "frameworks": list(item.builders)},
    "systems": system_metadata,
    "samplers": sampler_metadata,
    "suites": suite_metadata,
    "metrics": metric_metadata,
}


@click.command("list")
@click.argument("noun", type=click.Choice(list(NOUNS)), required=False)
@plugin_option
@json_option
def command(noun: str | None, as_json: bool) -> None:
    """List the names of NOUN, or all names. Plug-ins are marked with their distribution; broken ones are reported."""
    chosen = {noun: NOUNS[noun]} if noun else NOUNS
    document = {}
    for name, items in chosen.items():
        document[name] = [
            {
                "name": item.name,
                "summary": getattr(item, "summary", "") or getattr(item, "description", ""),
                "from": items.owner(item.name),
                **(METADATA[name](item) if name in METADATA else {}),
            }
            for item in items
        ]
        document.setdefault("problems", []).extend(problem._asdict() for problem in items.problems)
    if as_json:
        click.echo(json.dumps(document, indent=2))
        return
    for name in chosen:  # not document, which also has "problems"
        click.secho(f"{name} ({len(document[name])})", bold=True)
        width = max((len(row["name"]) for row in document[name]), default=0)
        for row in document[name]:
            origin = "" if row["from"] == registry.OWN_DISTRIBUTION else f"  [{row['from']}]"
            click.echo(f"  {row['name']:<{width}}  {row['summary']}{origin}".rstrip())
            if row.get("note"):
                click.echo(f"  {'':<{width}}  {row['note']}")
            if row.get("form"):
                click.echo(f"  {'':<{width}}  {sampler_form(row)}")
            if row.get("unavailable"):
                click.echo(f"  {'':<{width}}  cannot be run: {row['unavailable']}")
            elif "weights" in row:
                published = f"{row['published']}  " if row["published"] else ""
                click.echo(f"  {'':<{width}}  {published}--weights {' '.join(f'{part}=' for part in row['weights'])}")
    for problem in document["problems"]:
        click.echo(
            f"harness: plug-in {problem['entry_point']} of {problem['distribution']}: {problem['reason']}", err=True
        )
