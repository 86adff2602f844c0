"""`harness sample`: the second stage of run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from harness import runs, stages
from harness.cli.options import FOLDER, Count, sampling_options
from harness.errors import Refusal
from harness.planning import request_of_run


@click.command("sample")
@click.option("--run", "folder", type=FOLDER, required=True, metavar="DIR", help="A trained run.")
@click.option("--step", type=Count(), help="Which snapshot. [default: the last one]")
@sampling_options
@click.option("--batch", type=click.IntRange(1), help="Images a forward pass.")
def command(folder: Path, step: int | None, batch: int | None, sampling_precision: str, **options: Any) -> None:
    """Draw samples from a run: samples.npz in ADM's layout, a sidecar that says how, and a grid to look at."""
    run = runs.open_run(folder)
    step = step or max(run.snapshots(), default=0)
    if not step:
        raise Refusal(f"{folder} has no snapshot yet; train it to the end with `harness train` first")
    drawing = {
        **{name: options[name] for name in ("sampler", "eta", "guidance_scale", "guidance_channels", "label_policy")},
        "steps": options["sampling_steps"],
        "seed": options["sampling_seed"],
    }
    request = request_of_run(run, sampling=drawing, samples=options["samples"])
    with runs.locked(folder):
        for steps in request.sampling.steps:
            path = stages.draw(run, request, step, steps, precision=sampling_precision, batch=batch)
            click.echo(path)
