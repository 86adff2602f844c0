"""`harness train`: the first stage of run.

Its flags are the fields of `TrainOptions` in `harness/settings/train_flags.py` and what it imports.
"""

from __future__ import annotations

from typing import Any

import click

from harness.cli.flags_from_settings import settings_options
from harness.settings import TrainOptions


@click.command("train")
@settings_options(TrainOptions)
def command(**options: Any) -> None:
    """Train a backbone and keep the EMA weights of the last step. The same command continues a killed run.

    Denoisers, upsamplers (on pairs of resolutions) and classifiers of noised images alike.
    """
    from harness.pipeline.train import train

    result = train(**options)
    # A system calls its classifier and its upsampler by the names of their kinds.
    part = f"--system NAME --weights {result.kind}={result.folder}"
    follow = f"--run {result.folder}" if result.kind == "denoiser" else part
    click.echo(f"trained to step {result.step}; next: harness sample {follow}")
