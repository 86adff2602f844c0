"""`harness train`: the first stage of run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from harness.cli.options import run_options
from harness.cli.plan import request_of
from harness.cli.run import begin, prepare

# Training needs no sampling settings; the protocol's stand in for them in the plan.
NO_SAMPLING = dict.fromkeys(
    (
        "sampling_steps",
        "match_sampling",
        "samples",
        "sampler",
        "eta",
        "guidance_scale",
        "guidance_channels",
        "label_policy",
        "sampling_seed",
    )
)


@click.command("train")
@run_options
@click.option("--fork", type=click.Path(path_type=Path), metavar="RUN", help="Begin from that run's newest checkpoint.")
def command(**options: Any) -> None:
    """Train a backbone and keep the EMA weights of the last step. The same command continues a killed run.

    Denoisers, upsamplers (on pairs of resolutions) and classifiers of noised images alike.
    """
    options = {**NO_SAMPLING, **options}
    request = request_of(options)
    workshop = prepare(request, options)
    with workshop.group.locked(workshop.folder):
        run = begin(workshop, options)
        workshop.train(request.recipe.steps)
    part = f"--system NAME --weights {request.spec.kind}={run.folder}"
    follow = f"--run {run.folder}" if request.spec.kind == "denoiser" else part
    click.echo(f"trained to step {request.recipe.steps}; next: harness sample {follow}")
