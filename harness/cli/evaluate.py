"""`harness evaluate`: the third stage of run."""

from __future__ import annotations

import json
from pathlib import Path

import click

from harness import runs, stages
from harness.cli.options import DEFAULT_PROTOCOL, FOLDER, json_option, protocol_option
from harness.errors import Refusal
from harness.protocols import get_protocol
from harness.samples import read_sidecar, sidecar_path
from results.records import to_json


@click.command("evaluate")
@click.argument("samples", type=FOLDER)
@protocol_option
@click.option("--data", type=FOLDER, metavar="PATH", help="Where the protocol's data set is, if it needs one.")
@click.option("--name", metavar="TEXT", help="Row name of samples that say nothing of themselves.")
@click.option(
    "--out", type=FOLDER, metavar="FILE", help="Record file. [default: the run's, or records.jsonl beside SAMPLES]"
)
@json_option
def command(
    samples: Path, protocol: str | None, data: Path | None, name: str | None, out: Path | None, as_json: bool
) -> None:
    """Measure a sample set (SAMPLES: an .npz of ADM's layout, or its folder) and keep the records."""
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
    images = stages.load_data(task, data)
    found = stages.judge(path, task, images, records, cache=cache, name=name)
    if as_json:
        click.echo(json.dumps({"records": [json.loads(to_json(each)) for each in found]}, indent=2))
        return
    from harness.cli.report import print_records

    print_records(found)
    click.echo(f"records: {records}")
