"""`harness weights`: inspect, import and export public checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from harness.cli.flags_from_settings import PATH, entry_option, json_option, plugin_option

MAX_LISTED = 5  # names of a list that are printed; --json has all

backbone_option = click.option(
    "--backbone", metavar="NAME", help="Backbone of the weights. [default: recognised by names and shapes]"
)
out_option = click.option("--out", type=PATH, metavar="PATH", help="Where to write. Nothing is overwritten.")


@click.group("weights")
def command() -> None:
    """Inspect, import and export public checkpoints; nothing in them is executed.

    FILE is a .pt, .ckpt or .bin of torch, a .safetensors, or a folder of diffusers or Hugging Face.
    """


@command.command("inspect", short_help="Say what a file is, and whether it fits a backbone.")
@click.argument("file", type=PATH)
@plugin_option
@backbone_option
@entry_option
@json_option
def inspect(file: Path, backbone: str | None, entry: str | None, as_json: bool) -> None:
    """Say what FILE is: format, backbone, size, hash, and which tensors are missing, unexpected or of another shape."""
    from harness.weights.transfer import inspect_file

    document = inspect_file(file, backbone, entry)
    click.echo(json.dumps(document, indent=2) if as_json else "\n".join(description_lines(document)))


@command.command("import", short_help="Convert to safetensors with the harness's names.")
@click.argument("file", type=PATH)
@plugin_option
@backbone_option
@entry_option
@out_option
def import_(file: Path, backbone: str | None, entry: str | None, out: Path | None) -> None:
    """Write FILE as safetensors with the harness's names; the metadata says where it comes from."""
    from harness.weights.transfer import import_file

    written, about = import_file(file, out, backbone, entry)
    settings = "".join(f", {name} {value}" for name, value in about["arguments"].items())
    click.echo(f"{written}: {about['backbone']}{settings}, from {about['source']['name']} ({about['format']})")
    for note in about["notes"]:
        click.echo(f"  {note}")
    if about["not_loaded"]:
        click.echo(f"  not loaded: {_few(about['not_loaded'])}: classes or functions that the file names")


@command.command("export", short_help="Convert to a public layout.")
@click.argument("file", type=PATH)
@click.option(
    "--format",
    "layout",
    required=True,
    metavar="NAME",
    help="Public layout: dit, diffusers, guided-diffusion, ldm, ...",
)
@plugin_option
@backbone_option
@entry_option
@out_option
def export(file: Path, layout: str, backbone: str | None, entry: str | None, out: Path | None) -> None:
    """Write FILE in a public layout: a .pt, a .ckpt, a .bin, or a folder of diffusers."""
    from harness.errors import UserError
    from harness.registry import unknown
    from harness.weights.transfer import export_file, layout_names

    if layout not in (known := layout_names()):
        raise UserError(unknown("format", layout, known))
    click.echo(f"{export_file(file, layout, out, backbone, entry)}: {layout}")


def description_lines(document: dict[str, Any]) -> list[str]:
    """The document of `inspect_file` as lines of text."""
    known = document["known"]
    dtypes = ", ".join(f"{count} {name}" for name, count in document["dtypes"].items())
    layout = document["layout"] or "names of no known family"
    settings = "".join(f", {name} {value}" for name, value in document["arguments"].items())
    rows = [
        ("file", f"{document['file']}, {document['bytes']:,} bytes"),
        ("sha256", document["sha256"]),
        (
            "known as",
            f"{known['name']} of {known['publisher']}" if known else "unknown file: its hash is not on record",
        ),
        ("format", f"{layout}, {document['wrapping']}, {document['container']}"),
        ("backbone", f"{document['backbone'] or 'unknown'}{settings}"),
        ("holds", f"{document['tensors']:,} tensors ({dtypes}); {document['values']:,} values of the network"),
    ]
    if document["entry"]:
        rows.append(("entry", document["entry"]))
    if document["other_entries"]:
        rows.append(("or --entry", _few(document["other_entries"])))
    if document["beside"]:
        rows.append(("beside it", _few([f"{part} ({count})" for part, count in document["beside"].items()])))
    if document["also_holds"]:
        rows.append(("also holds", _few(document["also_holds"])))
    if document["not_loaded"]:
        rows.append(("not loaded", f"{_few(document['not_loaded'])}: classes or functions that the file names"))
    if document["code"]:
        rows.append(("CODE", f"would run {_few(document['code'])}; nothing was run, and it cannot be imported"))
    rows.append(("fits", "yes, every tensor" if document["fits"] else f"no: {document['problem']}"))
    wrong = [f"{each['name']} {each['found']} for {each['expected']}" for each in document["wrong_shape"]]
    for title, names in (
        ("missing", document["missing"]), ("unexpected", document["unexpected"]), ("other shape", wrong)
    ):  # fmt: skip
        if names:
            rows.append((title, f"{len(names)}: {_few(names)}"))
    if source := document["imported_from"]:
        origin = source.get("source")
        name = origin.get("name") if isinstance(origin, dict) else None
        rows.append(("made from", f"{name} ({source.get('format')})"))
    rows += [("note", note) for note in document["notes"]]
    return [f"{title:<12}{text}" for title, text in rows]


def _few(names: list[str]) -> str:
    """The first names, and the number of the others."""
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more
