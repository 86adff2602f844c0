"""How long the training stands still at a checkpoint: beside its own thread, waiting for it, and with safetensors' own writer.

    python benchmarks/checkpoint.py [--backbone dit-s-4] [--rounds 5] [--out FOLDER]

One process takes turns; FOLDER is on the disk that is measured. `library` is save_file, then a second read for the hash;
`waiting` writes and hashes in one pass; `beside` copies the state, and a thread does that. `steps_meanwhile`: training steps
that were done until that thread had ended, and the time of one of them in that of a step that is alone.
"""

import argparse
import functools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from safetensors.numpy import save_file

from harness.data.digits import load
from harness.engines.backend import get_backend
from harness.io import files
from harness.pipeline.train import RunSession
from harness.planning.request import make_request
from harness.runs import checkpoints
from harness.runs.run import Resolved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="dit-s-4")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of the training")
    parser.add_argument("--out", type=Path, help="default: a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        print(json.dumps(measured(options, Path(folder)), indent=2))


def measured(options: argparse.Namespace, folder: Path) -> dict:
    request = make_request(backbone=options.backbone, protocol="digits", steps=1000, settings={"batch": "8"})
    session = RunSession(request, load(), folder / "run")
    run = session.create(
        Resolved(device="cpu", device_name="", precision="float32", micro_batch=8, threads=options.threads)
    )
    engine = get_backend("torch").make_engine(request, run, session.data, None)
    steps = iter(range(1, 10**9))

    def step() -> float:
        begin = time.monotonic()
        engine.step(next(steps), lambda: False)
        return time.monotonic() - begin

    step()
    seconds: dict[str, list[float]] = {"library": [], "waiting": [], "beside": []}
    alone, with_thread, meanwhile, whole = [], [], [], []
    for index in range(options.rounds):
        alone += [step() for _ in range(5)]
        begin = time.monotonic()
        for name, tensors in engine.state_dicts():
            path = folder / f"{name}.safetensors"
            save_file(tensors(), path)
            files.sync_file(path)
            files.sha256_file(path)
        seconds["library"].append(time.monotonic() - begin)
        for name in ("waiting", "beside"):
            writer = checkpoints.Writer()
            begin = time.monotonic()
            parts = engine.state_dicts(copy=name == "beside")
            writer.start(
                functools.partial(checkpoints.write, run.checkpoints, next(steps), parts, {}), beside=name == "beside"
            )
            del parts
            seconds[name].append(time.monotonic() - begin)
            if name == "beside":
                count = len(with_thread)
                while not writer.done:
                    with_thread.append(step())
                meanwhile.append(len(with_thread) - count)
                whole.append(time.monotonic() - begin)
            writer.wait()
        print(f"round {index + 1} of {options.rounds}", file=sys.stderr)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "backbone": options.backbone,
        "megabytes_of_weights": request.compute.params * 4 / 1e6,
        "megabytes_of_a_checkpoint": request.checkpoint_bytes / 1e6,
        "seconds_that_training_stands_still": {name: round(value, 4) for name, value in median.items()},
        "share_of_library": {name: round(value / median["library"], 4) for name, value in median.items()},
        "seconds_of_the_thread": round(statistics.median(whole), 3),
        "steps_meanwhile": statistics.median(meanwhile),
        "a_step_meanwhile_in_steps_alone": round(statistics.median(with_thread) / statistics.median(alone), 2),
        "rounds": options.rounds,
    }


if __name__ == "__main__":
    main()
