"""`harness evaluate`: the third stage of run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click
import numpy as np

from harness import registry, runs, stages
from harness.cli.options import DEFAULT_PROTOCOL, FOLDER, json_option, protocol_option
from harness.data.images import ImageSet
from harness.errors import Refusal
from harness.evaluation import Judge
from harness.protocols import get_protocol
from harness.samples import read_samples, read_sidecar, sidecar_path
from results.records import to_json

WHERE = "classify_image_graph_def.pb of ADM's evaluator, 95,673,916 bytes"


@click.command("evaluate")
@click.argument("samples", type=FOLDER)
@protocol_option
@click.option("--data", type=FOLDER, metavar="PATH", help="Where the protocol's data set is, if it needs one.")
@click.option("--suite", metavar="NAME", help="A name of `harness list suites`. [default: the protocol's]")
@click.option(
    "--reference", type=FOLDER, metavar="FILE.npz", help="Images to judge by, with mu and sigma if it has them."
)
@click.option(
    "--inception", type=FOLDER, metavar="FILE", help="Suite adm: classify_image_graph_def.pb, or its torch port."
)
@click.option("--backend", type=click.Choice(["torch", "tensorflow"]), default="torch", show_default=True)
@click.option("--name", metavar="TEXT", help="Row name of samples that say nothing of themselves.")
@click.option(
    "--out", type=FOLDER, metavar="FILE", help="Record file. [default: the run's, or records.jsonl beside SAMPLES]"
)
@json_option
def command(
    samples: Path,
    protocol: str | None,
    data: Path | None,
    suite: str | None,
    reference: Path | None,
    inception: Path | None,
    backend: str,
    name: str | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Measure a sample set (SAMPLES: an .npz of ADM's layout, or its folder) and keep the records.

    \b
        harness evaluate samples.npz --protocol imagenet-256 --suite adm \\
                --reference VIRTUAL_imagenet256_labeled.npz --inception classify_image_graph_def.pb
    """
    path = samples / "samples.npz" if samples.is_dir() else samples
    if not path.exists():
        raise Refusal(f"no sample set at {path}; `harness sample` makes one")
    home = path.resolve().parent.parent.parent  # RUN/samples/NAME/samples.npz
    run = runs.open_run(home) if (home / "run.json").exists() else None
    if protocol is None and run is None and sidecar_path(path).exists():
        protocol = read_sidecar(path).get("identity", {}).get("protocol")
    task = get_protocol(protocol) if protocol else run.protocol if run else get_protocol(DEFAULT_PROTOCOL)
    records = out or (run.records if run else path.with_name("records.jsonl"))
    cache = (home.parent if run else path.parent) / stages.CACHE
    if reference is not None and data is not None:
        raise Refusal("--data and --reference both name the images to judge by; give one of them")
    images = reference_images(reference) if reference else stages.load_data(task, data)
    by = judge_of(registry.suites.get(suite or task.suite), inception, backend, reference)
    found = stages.judge(path, task, images, records, cache=cache, name=name, by=by)
    if as_json:
        click.echo(json.dumps({"records": [json.loads(to_json(each)) for each in found]}, indent=2))
        return
    from harness.cli.report import print_records

    print_records(found)
    click.echo(f"records: {records}")


def judge_of(suite: Any, inception: Path | None, backend: str, reference: Path | None) -> Judge:
    """The suite on the chosen backend, with what was brought; what has no use is refused."""
    from evaluators.features import INCEPTION_2015, INCEPTION_2015_TF

    if suite.features == INCEPTION_2015:
        if inception is None:
            raise Refusal(f"suite {suite.name!r} needs the weights of its network: give --inception FILE ({WHERE})")
        features = INCEPTION_2015_TF if backend == "tensorflow" else INCEPTION_2015
        suite = dataclasses.replace(suite, features=features)
    elif inception is not None or backend != "torch":
        raise Refusal(f"suite {suite.name!r} takes neither --inception nor --backend; they belong to suite adm")
    return Judge(suite=suite, weights=inception, statistics=reference)


def reference_images(path: Path) -> ImageSet:
    """The images of an .npz of ADM's layout; labels, where there are none, are all 0."""
    samples = read_samples(path)
    labels = np.zeros(len(samples.images), np.int64) if samples.labels is None else samples.labels
    return ImageSet(name=path.stem, images=samples.images, labels=labels)
