"""`harness data`: references that samples are judged by, and the public files that evaluation needs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from harness.cli.options import FOLDER, Count, json_option


@click.group("data")
def command() -> None:
    """References that samples are judged by, and the public files that evaluation needs."""


@command.command("reference", short_help="Make an evaluation reference from images.")
@click.argument("source")
@click.option("--out", type=FOLDER, required=True, metavar="FILE.npz", help="Where to write. Nothing is overwritten.")
@click.option("--suite", default="adm", show_default=True, metavar="NAME", help="A name of `harness list suites`.")
@click.option(
    "--inception",
    "--features-weights",
    "weights",
    type=FOLDER,
    metavar="FILE",
    help="Weights of the suite's network; for suite adm classify_image_graph_def.pb, or its torch port.",
)
@click.option("--backend", type=click.Choice(["torch", "tensorflow"]), default="torch", show_default=True)
@click.option("--device", default="cpu", show_default=True, metavar="NAME", help="Where the network runs: cpu, cuda.")
@click.option("--images", type=Count(), metavar="N", help="Keep N images for precision and recall. [default: all]")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of the choice of N.")
@click.option("--data", type=FOLDER, metavar="PATH", help="Where the data set is, if SOURCE is one that needs a place.")
@json_option
def reference(
    source: str,
    out: Path,
    suite: str,
    weights: Path | None,
    backend: str,
    device: str,
    images: int | None,
    seed: int,
    data: Path | None,
    as_json: bool,
) -> None:
    """Make the file that samples are judged by: statistics of all images of SOURCE, and images for precision and recall.

    SOURCE: a folder of image files, an .npz or .npy, shards (.npz, .tar), a pattern of these, or a name of `harness list
    datasets`. A killed command continues where it was.

    \b
        harness data reference train/ --out train.npz --images 10k --inception classify_image_graph_def.pb
        harness evaluate samples.npz --suite adm --reference train.npz --inception classify_image_graph_def.pb
    """
    from harness import registry, stages
    from harness.cli.evaluate import judge_of
    from harness.references import make_reference, open_source

    judge = judge_of(registry.suites.get(suite), weights, backend, None)
    made = make_reference(
        open_source(source, data),
        out,
        judge.suite,
        weights=judge.weights,
        images=images,
        seed=seed,
        cache=out.parent / stages.CACHE,
        device=device,
    )
    about = made.about
    if as_json:
        facts = {"file": str(out), "written": made.written, "reference_sha256": about.sha256}
        click.echo(json.dumps({**facts, **dataclasses.asdict(about)}, indent=2))
        return
    height, width, channels = about.shape
    click.echo(f"{out}: {'written' if made.written else 'is there already, the same reference'}")
    click.echo(f"  {about.images:,} images {height}x{width}x{channels}, {about.kept:,} kept for precision and recall")
    click.echo(f"  statistics of {about.features} ({about.features_sha256[:12]}), reference {about.sha256[:12]}")
