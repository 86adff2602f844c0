"""`harness sample`: the second stage of run, or a system with weights from anywhere.

Its flags are the fields of `SampleOptions` in `harness/settings/sample_flags.py` and what it imports.
"""

from __future__ import annotations

from typing import Any

import click

from harness.cli.flags_from_settings import settings_options
from harness.settings import SampleOptions


@click.command("sample")
@settings_options(SampleOptions)
def command(**options: Any) -> None:
    """Draw samples: samples.npz in ADM's layout, a sidecar that says how, and a grid to look at; or with --classes
    pictures of single classes, to look at alone. Examples:

    \b
        harness sample --run runs/digits-dit-xs-2-seed0 --samples 10k
        harness sample --system adm-g-256 --weights base=256x256_diffusion.pt \\
                       --weights classifier=256x256_classifier.pt
        harness sample --run runs/digits-dit-xs-2-seed0 --classes 3,8 --grid 2x8 --trajectory
    """
    from harness.pipeline.sample import sample

    result = sample(**options)
    for path in (*result.samples, *result.pictures):
        click.echo(path)
