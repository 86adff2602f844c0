"""`harness new`: a package with a backbone of one's own."""

from __future__ import annotations

from pathlib import Path

import click

from harness.errors import UserError
from harness.spec import FRAMEWORKS


@click.command("new")
@click.argument("name")
@click.option("--framework", metavar="NAME,...", default="torch", show_default=True, help="torch, jax, or torch,jax.")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="[default: a folder with that name]")
def command(name: str, framework: str, out: Path | None) -> None:
    """Write a package with a backbone that trains at once, to be changed into your own.

    It holds a small MLP-Mixer with time and label, its spec, its entry point and a test. Install it with pip; `harness check
    NAME` says what is wrong with what you make of it.
    """
    from harness.registry import backbones, unknown
    from harness.templates import write_package

    frameworks = tuple(part.strip() for part in framework.split(","))
    for each in frameworks:
        if each not in FRAMEWORKS:
            raise UserError(f"--framework: {unknown('framework', each, FRAMEWORKS)}")
    if name in backbones:
        raise UserError(f"the backbone name {name!r} is taken by {backbones.owner(name)}; choose another")
    folder = out or Path(name)
    for path in write_package(name, frameworks, folder):
        click.echo(f"wrote {path}")
    run = f"harness run --backbone {name}{'' if 'torch' in frameworks else f' --framework {frameworks[0]}'}"
    click.echo(f"next: pip install -e {folder} && harness check {name} && {run}")
