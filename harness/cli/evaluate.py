"""`harness evaluate`: the third stage of run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click
import numpy as np

from evaluators.features import INCEPTION_BACKENDS
from harness import runs, stages
from harness.cli.options import DEFAULT_PROTOCOL, FOLDER, json_option, protocol_option
from harness.data.images import ImageSet
from harness.engines import join
from harness.errors import Refusal
from harness.evaluation import Judge
from harness.image_sources import ImageSource, open_images
from harness.protocols import Protocol, get_protocol
from harness.samples import read_sidecar, sidecar_path
from results.records import to_json

SUITE_HELP = (
    "A name of `harness list suites`, or metrics on features of your choice, as in dinov2-vit-b-14:fd,kid (see `harness "
    "list features` and `metrics`). [default: the protocol's]"
)
WHERE = "classify_image_graph_def.pb of ADM's evaluator, 95,673,916 bytes"


@click.command("evaluate")
@click.argument("samples", type=FOLDER)
@protocol_option
@click.option("--data", type=FOLDER, metavar="PATH", help="Where the protocol's data set is, if it needs one.")
@click.option("--suite", metavar="NAME|FEATURES:METRIC,..", help=SUITE_HELP)
@click.option("--reference", type=FOLDER, metavar="PATH", help="Images to judge by, with mu and sigma if it has them.")
@click.option(
    "--inception",
    "--features-weights",
    "weights",
    type=FOLDER,
    metavar="FILE",
    help="Weights of the suite's network; for suite adm classify_image_graph_def.pb, or its torch port.",
)
@click.option("--backend", type=click.Choice(list(INCEPTION_BACKENDS)), default="torch", show_default=True)
@click.option("--device", metavar="NAME", default="cpu", show_default=True, help="cpu, cuda, cuda:1; of JAX also tpu.")
@click.option("--name", metavar="TEXT", help="Row name of samples that say nothing of themselves.")
@click.option(
    "--out", type=FOLDER, metavar="FILE", help="Record file. [default: the run's, or records.jsonl beside SAMPLES]"
)
@click.option("--neighbours", type=FOLDER, metavar="FILE.png", help="Draw the samples nearest to training images.")
@click.option("--allow", multiple=True, metavar="GUARD", help="Warn where this guard refuses. May be repeated.")
@json_option
def command(
    samples: Path,
    protocol: str | None,
    data: Path | None,
    suite: str | None,
    reference: Path | None,
    weights: Path | None,
    backend: str,
    device: str,
    name: str | None,
    out: Path | None,
    neighbours: Path | None,
    allow: tuple[str, ...],
    as_json: bool,
) -> None:
    """Measure a sample set and keep the records. SAMPLES: an .npz of ADM's layout or the folder that holds
    samples.npz, an .npy, a folder of PNG files, shards (.npz, .tar), or a pattern of these.

    \b
        harness evaluate samples.npz --protocol imagenet-256 --suite adm \\
                --reference VIRTUAL_imagenet256_labeled.npz --inception classify_image_graph_def.pb
    """
    from evaluators.suites import get_suite

    team = join("torch")
    path = samples / "samples.npz" if (samples / "samples.npz").is_file() else samples
    if not path.exists() and not any(sign in str(path) for sign in "*?["):
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
    source = open_reference(reference) if reference else None
    if source is not None:
        images = reference_images(source)
    elif data is None and run is not None and run.places:
        images = stages.images_behind(run.places, run.identity["dataset_sha256"], str(run.folder))
    else:
        images = stages.load_data(task, data)
    by = judge_of(get_suite(suite or task.suite), weights, backend, reference, device)
    by = dataclasses.replace(by, reference=source, allow=allow, picture=neighbours)
    with team.together():
        found = stages.judge(path, task, images, records, cache=cache, name=name, by=by, team=team)
    if not team.leads:
        return
    if as_json:
        click.echo(json.dumps({"records": [json.loads(to_json(each)) for each in found]}, indent=2))
        return
    from harness.cli.report import print_records

    print_records(found)
    if by.suite.note:
        click.echo(f"suite {by.suite.name}: {by.suite.note}")
    click.echo(f"records: {records}")


def judge_of_run(task: Protocol, reference: Path | None, weights: Path | None) -> tuple[Judge, ImageSet | None] | None:
    """Who measures the samples of a run, and the images of --reference, if it was given. None: the suite's network needs
    weights, and nothing was given. Refused before anything is trained: files that are not there or of no use."""
    from evaluators.suites import get_suite

    suite = get_suite(task.suite)
    if weights is None and reference is None and suite.features.weights_option:
        return None
    if weights is not None and not weights.exists():
        raise Refusal(f"{suite.features.weights_option or '--inception'} {weights}: no such file")
    source = None if reference is None else open_reference(reference)
    by = dataclasses.replace(judge_of(suite, weights, "torch", reference), reference=source)
    return by, None if source is None else reference_images(source)


def judge_of(suite: Any, weights: Path | None, backend: str, reference: Path | None, device: str = "cpu") -> Judge:
    """The suite on the chosen backend, with what was brought; what has no use is refused."""
    from evaluators.reference_file import read_about

    torch, chosen = INCEPTION_BACKENDS["torch"], INCEPTION_BACKENDS[backend]
    flag = suite.features.weights_option
    if weights is not None and not flag:
        raise Refusal(f"suite {suite.name!r} comes with its network's weights; leave out {weights}")
    if weights is None and flag == torch.weights_option:
        raise Refusal(f"suite {suite.name!r} needs the weights of its network: give --inception FILE ({WHERE})")
    if chosen != torch:
        if suite.features != torch:
            raise Refusal(f"--backend {backend} belongs to suite adm and others on {torch.name}, not to {suite.name!r}")
        suite = dataclasses.replace(suite, features=chosen)
    elif device != "cpu":
        from harness.engines.torch.resolve import pick_device

        device = str(pick_device(device))  # refuses one that is absent; the other backends do so themselves
    statistics = reference if reference is not None and reference.suffix == ".npz" and reference.is_file() else None
    if statistics is not None and not suite.takes_statistics(declared=read_about(statistics) is not None):
        statistics = None
    return Judge(suite=suite, weights=weights, statistics=statistics, device=device)


def open_reference(path: Path) -> ImageSource:
    """The images of a reference; one that was made of JPEG files still says so."""
    from evaluators.reference_file import read_about

    source, about = open_images(path), read_about(path)
    source.lossy = source.lossy or (about is not None and about.lossy)
    return source


def reference_images(source: ImageSource) -> ImageSet:
    """The images of a source; labels, where there are none, are all 0."""
    images = source.array()
    labels = np.zeros(len(images), np.int64) if source.labels is None else source.labels
    return ImageSet(name=Path(source.name).stem, images=images, labels=labels)
