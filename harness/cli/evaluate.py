"""`harness evaluate`: the third stage of run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from evaluators.features import INCEPTION_BACKENDS
from harness.cli.options import DEFAULT_PROTOCOL, FOLDER, json_option, protocol_option
from harness.data.load import load_data, source_images
from harness.engines.backend import join_processes
from harness.errors import UserError
from harness.pipeline.evaluate import CACHE, evaluate_and_record
from harness.pipeline.judges import SUITE_HELP, evaluation_config, open_reference, reference_images
from harness.protocols import get_protocol
from harness.runs.run import open_run
from harness.runs.samples import read_sidecar, sidecar_path
from results.records import to_json


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

    group = join_processes("torch")
    path = samples / "samples.npz" if (samples / "samples.npz").is_file() else samples
    if not path.exists() and not any(sign in str(path) for sign in "*?["):
        raise UserError(f"no sample set at {path}; `harness sample` makes one")
    home = path.resolve().parent.parent.parent  # RUN/samples/NAME/samples.npz
    run = open_run(home) if (home / "run.json").exists() else None
    if protocol is None and run is None and sidecar_path(path).exists():
        protocol = read_sidecar(path).get("identity", {}).get("protocol")
    task = get_protocol(protocol) if protocol else run.protocol if run else get_protocol(DEFAULT_PROTOCOL)
    records = out or (run.records if run else path.with_name("records.jsonl"))
    cache = (home.parent if run else path.parent) / CACHE
    if reference is not None and data is not None:
        raise UserError("--data and --reference both name the images to judge by; give one of them")
    source = open_reference(reference) if reference else None
    if source is not None:
        images = reference_images(source)
    elif data is None and run is not None and run.places:
        images = source_images(run.places, run.identity["dataset_sha256"], str(run.folder))
    else:
        images = load_data(task, data)
    by = evaluation_config(get_suite(suite or task.suite), weights, backend, reference, device)
    by = dataclasses.replace(by, reference=source, allow=allow, picture=neighbours)
    with group.collective_scope():
        found = evaluate_and_record(path, task, images, records, cache=cache, name=name, by=by, group=group)
    if not group.is_main:
        return
    if as_json:
        click.echo(json.dumps({"records": [json.loads(to_json(each)) for each in found]}, indent=2))
        return
    from harness.cli.report import print_records

    print_records(found)
    if by.suite.note:
        click.echo(f"suite {by.suite.name}: {by.suite.note}")
    click.echo(f"records: {records}")
