"""`harness list`: what there is, by name."""

from __future__ import annotations

import json

import click

from harness import registry
from harness.cli.options import json_option

NOUNS = {
    "backbones": registry.backbones,
    "protocols": registry.protocols,
    "datasets": registry.datasets,
    "samplers": registry.samplers,
    "suites": registry.suites,
    "features": registry.features,
}


@click.command("list")
@click.argument("noun", type=click.Choice(list(NOUNS)), required=False)
@json_option
def command(noun: str | None, as_json: bool) -> None:
    """What there is: NOUN, or everything. Plug-ins are marked with their distribution; broken ones are named."""
    chosen = {noun: NOUNS[noun]} if noun else NOUNS
    document = {}
    for name, items in chosen.items():
        document[name] = [
            {
                "name": item.name,
                "summary": getattr(item, "summary", "") or getattr(item, "description", ""),
                "from": items.owner(item.name),
                **({"kind": item.kind, "frameworks": list(item.builders)} if name == "backbones" else {}),
            }
            for item in items
        ]
        document.setdefault("problems", []).extend(problem._asdict() for problem in items.problems)
    if as_json:
        click.echo(json.dumps(document, indent=2))
        return
    for name in chosen:
        click.secho(f"{name} ({len(document[name])})", bold=True)
        width = max((len(row["name"]) for row in document[name]), default=0)
        for row in document[name]:
            origin = "" if row["from"] == registry.OWN_DISTRIBUTION else f"  [{row['from']}]"
            click.echo(f"  {row['name']:<{width}}  {row['summary']}{origin}".rstrip())
    for problem in document["problems"]:
        click.echo(
            f"harness: plug-in {problem['entry_point']} of {problem['distribution']}: {problem['reason']}", err=True
        )
