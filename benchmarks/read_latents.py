"""How fast training reads a cache of latents (harness.data.latents), rows in the order of an epoch.

    python benchmarks/read_latents.py --folder DIR [--gigabytes 8] [--batch 256]

Writes a file of ImageNet's latents' form (4x32x32, mean and standard deviation, two views) into DIR, drops it from the
system's cache, and reads batches as the trainer does: once from the disk, then again from memory. Prints images a
second; a trainer needs as many as it trains on.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from harness.data.epoch_sampler import EpochSampler
from harness.data.latents import DTYPE, LatentSet, Meta
from harness.data.prepared import chunk_count

LATENT = (4, 32, 32)
IMAGENET = 1_281_167


def made(path: Path, count: int) -> LatentSet:
    """A cache of random latents at `path`, not in the system's memory any more."""
    shape = (count, 2, 2, *LATENT)
    part = np.random.default_rng(0).standard_normal((256, *shape[1:]), np.float32)
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": DTYPE.str, "fortran_order": False, "shape": shape})
        for start in range(0, count, len(part)):
            file.write(part[: min(len(part), count - start)].data)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    vae = {"name": "none", "weights_sha256": "", "config_sha256": "", "scale_factor": 0.18215}
    meta = Meta(images={"name": "noise"}, vae=vae, shape=shape, chunks=("",) * chunk_count(count))
    return LatentSet(meta=meta, latents=np.load(path, mmap_mode="r"), labels=np.zeros(count, np.int64))


def seconds_of_an_epoch(data: LatentSet, batch: int) -> list[float]:
    """Of each batch of the first epoch."""
    stream, seconds = EpochSampler(0, data, flip=True), []
    for start in range(0, len(data) - batch + 1, batch):
        began = time.perf_counter()
        stream.take(np.arange(start, start + batch))
        seconds.append(time.perf_counter() - began)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="on the disk that is measured")
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--batch", type=int, default=256)
    options = parser.parse_args()
    row = 4 * 4 * int(np.prod(LATENT))
    print(f"one image: {row / 1024:.0f} KiB stored, {row / 2048:.0f} KiB read; ImageNet: {IMAGENET * row / 1e9:.1f} GB")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        data = made(Path(folder) / "latents.npy", int(options.gigabytes * 1e9 / row))
        for what in ("from the disk, each view once", "again, what memory kept"):
            seconds = seconds_of_an_epoch(data, options.batch)
            each = np.median(seconds) / options.batch
            total = sum(seconds) / (len(seconds) * options.batch)
            print(
                f"{what}: {1 / total:,.0f} images/s ({row / 2e9 / total:.2f} GB/s); median batch {1 / each:,.0f} images/s, "
                f"slowest {options.batch / max(seconds):,.0f}; {len(seconds)} batches of {options.batch}"
            )


if __name__ == "__main__":
    main()
