"""Keeps the measurements of finished runs in results/measured, which `harness report` shows beside the paper's.

    python studies/keep.py runs/fashion-mnist-16-*

Of each run: its records, run.json, the log as means over blocks of steps, and of one sample set for each kind of sampling
the first images with their sidecar and the grid. Weights and whole sample sets stay where they are.
"""

import argparse
import json
import re
import shutil
from pathlib import Path

import numpy as np

from harness.io.files import write_bytes
from results.store import RECORDS_FILE, load

MEASURED = Path(__file__).parents[1] / "results" / "measured"
PLACES = 200  # lines of a kept log
IMAGES = 10  # of a kept sample set: those of a row of Figure 7
SHOWN_STEPS = 32  # sampler steps of the kept sample sets
LARGEST = 10_000_000  # bytes of all that is kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs")
    parser.add_argument(
        "--out", type=Path, default=MEASURED, help="folder to keep them in  [default: results/measured]"
    )
    options = parser.parse_args()
    for run in options.runs:
        if (run / RECORDS_FILE).exists():
            keep(run, options.out / run.name)
            print(f"kept {run.name}")
    files = [path for path in options.out.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    print(f"{options.out}: {size / 1e6:.2f} MB in {len(files)} files")
    if size > LARGEST:
        raise SystemExit(f"more than {LARGEST / 1e6:g} MB: keep fewer runs")
    for path in files:
        # what is shipped names no folder of the machine that measured it
        if path.suffix in (".json", ".jsonl") and (found := re.search(rb'"/[^"]*/[^"]*"', path.read_bytes())):
            raise SystemExit(f"{path} names a place of this machine: {found[0].decode()}")


def keep(run: Path, out: Path) -> None:
    """Copies what is kept of the folder `run` to the folder `out`, which is replaced."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    loaded = load([run / RECORDS_FILE])
    assert not loaded.problems and not loaded.conflicts, (run, loaded.problems, loaded.conflicts)
    shutil.copyfile(run / RECORDS_FILE, out / RECORDS_FILE)
    shutil.copyfile(run / "run.json", out / "run.json")
    write_bytes(out / "log.jsonl", thinned((run / "log.jsonl").read_text()).encode())
    for sidecar in sorted(run.glob("samples/*/samples.json")):
        sampling = json.loads(sidecar.read_text())["identity"]["sampling"]
        if (sampling["steps"], sampling["seed"]) != (SHOWN_STEPS, 0):
            continue
        to = out / "samples" / sidecar.parent.name
        to.mkdir(parents=True)
        for name in ("samples.json", "grid.png"):
            shutil.copyfile(sidecar.with_name(name), to / name)
        with np.load(sidecar.with_name("samples.npz"), allow_pickle=False) as samples:
            np.savez_compressed(to / "samples.npz", **{name: samples[name][:IMAGES] for name in samples.files})


def thinned(log: str) -> str:
    """A log of at most PLACES lines, each the mean over a block of the lines of `log`."""
    rows = [json.loads(line) for line in log.splitlines()]
    if len(rows) <= PLACES:
        return log
    lines = []
    for block in np.array_split(np.arange(len(rows)), PLACES):
        names = rows[block[0]]
        lines.append(json.dumps({name: float(f"{np.mean([rows[i][name] for i in block]):.6g}") for name in names}))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
