"""Stands in for `harness` where a test is about who launches it: says what it was given, then waits to be told to stop."""

import os
import signal
import sys
import time
from pathlib import Path


def stop(number, frame):
    print("harness: interrupted", flush=True)
    sys.exit(130)


if __name__ == "__main__":
    seed = sys.argv[sys.argv.index("--seed") + 1]
    if seed == "9":
        sys.exit("harness: nine is too many")
    signal.signal(signal.SIGTERM, stop)
    given = [os.environ.get(name, "") for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")]
    Path(f"begun-{seed}").write_text(" ".join([str(os.getpgid(0)), *given]))
    while not Path(f"end-{seed}").exists():
        time.sleep(0.02)
