"""`harness diagnose`: which stage a gap in quality comes from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from harness.cli.flags_from_settings import COUNT, PATH, TEXT, entry_option, json_option


@click.command("diagnose")
@click.argument("path", metavar="RUN|SAMPLES", type=PATH)
@click.option(
    "--against", type=PATH, metavar="PATH",
    help="What is expected: a run, a sample set, a record file, or a reference point: a file, or the name of a packaged "
    "one. [default: the protocol]",
)  # fmt: skip
@click.option("--protocol", type=TEXT, metavar="NAME|FILE.toml", help="Of samples without a run.")
@click.option("--data", type=PATH, help="The images of the training, if the protocol's data set needs a path.")
@click.option(
    "--reference", type=PATH, help="The images that samples should be compared with. [default: the protocol's data set]"
)
@click.option("--suite", type=TEXT, metavar="NAME", help="Suite whose distance is weighed. [default: the protocol's]")
@click.option(
    "--features-weights", "--inception", "weights", type=PATH, metavar="FILE",
    help="Weights of the suite's network, if it needs them.",
)  # fmt: skip
@entry_option
@click.option("--cache", type=PATH, metavar="DIR", help="Folder of features that were computed before.")
@click.option("--images", type=COUNT, default=1000, show_default=True, help="Images that are drawn again, at most.")
@json_option
def command(
    path: Path,
    against: Path | None,
    protocol: str | None,
    data: Path | None,
    reference: Path | None,
    suite: str | None,
    weights: Path | None,
    entry: str | None,
    cache: Path | None,
    images: int,
    as_json: bool,
) -> None:
    """Find the stage from which a gap in quality comes. Nothing is written, and nothing is trained.

    Each stage has what was measured, what is expected, and where it can be told its share of the gap: data, labels, loss,
    EMA, sampler, decoder, uint8, evaluator, reference, N. The last line names the stage. Exit code 1 unless all is healthy.
    """
    from harness.diagnose.run import diagnose

    found = diagnose(
        path, against, protocol=protocol, data=data, reference=reference, suite=suite, weights=weights, entry=entry,
        cache=cache, images=images,
    )  # fmt: skip
    if as_json:
        click.echo(json.dumps({**dataclasses.asdict(found), "samples": str(found.samples)}, indent=2))
    else:
        click.echo(f"{found.samples}, against {found.against}")
        for each in found.findings:
            share = "" if each.share is None else f"  [{each.share:.0%} of the gap]"
            follows = f"  (follows from {each.follows})" if each.follows else ""
            click.echo(f"{each.status:>9}  {each.stage}: {each.measured}{share}{follows}")
            if each.expected:
                click.echo(f"{'':>9}  {'':{len(each.stage)}}  expected: {each.expected}")
        click.echo(found.conclusion)
    if not found.healthy:
        raise SystemExit(1)
