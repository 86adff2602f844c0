"""How long `harness report` takes on many records, stage by stage.

    python benchmarks/report.py [--records 100000] [--folder DIR] [--profile]

Makes record files of an invented study (50 backbones, 5 seeds, checkpoints, sampling steps, 10 metrics) in a folder,
then loads and reports them.
"""

from __future__ import annotations

import argparse
import cProfile
import itertools
import os
import pstats
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from results.records import Environment, Evaluation, Record, Sampling, Training, to_json

METRICS = ("fd", "sfid", "kid", "is", "precision", "recall", "density", "coverage", "authenticity", "copies")
STEPS = (10, 25, 50, 250)
SEEDS, BACKBONES = 5, 50


def invented(count: int) -> Iterator[tuple[str, Record]]:
    """(name of the run, record), `count` of them: runs of several checkpoints, sampled and judged in several ways."""
    checkpoints = -(-count // (BACKBONES * SEEDS * len(STEPS) * len(METRICS)))
    environment = Environment(device="cpu", versions={"torch": "2.13.0", "numpy": "2.4.6"}, time="2026-01-01T00:00:00Z")
    evaluation = Evaluation(
        suite="embedded", suite_version="1", features="efficientnet-lite0", features_sha256="ef" * 32, reference_sha256="12" * 32
    )  # fmt: skip
    made = itertools.product(range(BACKBONES), range(SEEDS), range(1, checkpoints + 1), STEPS, METRICS)
    for index, seed, checkpoint, steps, metric in itertools.islice(made, count):
        gflops = 0.01 * 1.1**index
        value = (20 / (1 + 0.05 * index) / checkpoint**0.3) * (1 + 5 / steps) + 0.1 * seed
        training = Training(
            steps=1000 * checkpoint, images=128_000 * checkpoint, gflops=3 * gflops * 128_000 * checkpoint, batch=128,
            learning_rate=1e-4, ema_decay=0.9999, seed=seed, objective="epsilon-learned-range", schedule="linear",
            precision="bfloat16", micro_batch=128, recipe_hash="ab" * 32, checkpoint_sha256=f"{index * 997 + seed:064x}",
        )  # fmt: skip
        sampling = Sampling(
            sampler="ddpm", steps=steps, evaluations=steps, gflops_per_image=gflops * steps, uint8_rule="round",
            label_policy="random", clip_denoised=True, precision="bfloat16", batch=100, seed=0,
            samples_sha256=f"{index * 991 + seed * 7 + checkpoint * 31 + steps:064x}",
        )  # fmt: skip
        record = Record(
            provenance="measured", metric=metric, value=value, low=0.95 * value, high=1.05 * value, interval="jackknife-20",
            n=1000, protocol="digits", protocol_version="1", resolution=8, dataset="digits", system=f"model-{index}",
            backbone=f"model-{index}", kind="denoiser", framework="torch", params=1_000_000 + index, gflops=gflops,
            training=training, sampling=sampling, evaluation=evaluation, environment=environment,
        )  # fmt: skip
        yield f"digits-model-{index}-seed{seed}", record


def write(folder: Path, count: int) -> None:
    """`count` records under `folder`, a file a run."""
    for name, records in itertools.groupby(invented(count), key=lambda pair: pair[0]):
        path = folder / name / "records.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(f"{to_json(record)}\n" for _, record in records), encoding="ascii")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, help="kept there, and read again by the next call")
    parser.add_argument("--profile", action="store_true", help="the costliest functions as well")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        runs = (arguments.folder or Path(temporary)) / f"runs-{arguments.records}"
        if not runs.exists():
            write(runs, arguments.records)
        measure(runs, Path(temporary) / "report", arguments.profile)


def measure(runs: Path, out: Path, profile: bool) -> None:
    """Processor seconds of each stage; then of `harness report`, with all figures, page and helpers, and by the clock."""
    from reports import charts
    from reports.figures import figures, published_records
    from reports.report import table_files
    from results.store import collector_paused, find_record_files, load

    profiler = cProfile.Profile(time.process_time)
    if profile:
        profiler.enable()
    files = find_record_files([runs])
    start = time.process_time()
    records = load(files).records
    loaded = time.process_time()
    _, contents = table_files(records, sorted({record.protocol for record in records}))
    written = time.process_time()
    with collector_paused():  # as the report does
        drawn = figures([*records, *published_records(None)], [path.parent for path in files])
        for figure in drawn:
            charts.to_csv(figure)
    ended = time.process_time()
    if profile:
        profiler.disable()
    print(f"load {len(records)} records          {loaded - start:6.2f} s")
    print(f"{len(contents)} files of tables           {written - loaded:6.2f} s")
    print(f"data of {len(drawn)} figures          {ended - written:6.2f} s")
    print(f"together                     {ended - start:6.2f} s")
    command = [sys.executable, "-m", "harness", "report", "--results", str(runs), "--out", str(out)]
    before, begin = os.times(), time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after, seconds = os.times(), time.monotonic() - begin
    used = after.children_user + after.children_system - before.children_user - before.children_system
    print(f"harness report, {len(list(out.iterdir()))} files     {used:6.2f} s, {seconds:.2f} s by the clock")
    if profile:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(30)


if __name__ == "__main__":
    main()
