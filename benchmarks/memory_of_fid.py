"""The memory of FID with its interval on 50,000 images: an .npz is written, read and judged in a process of its own.

    python benchmarks/memory_of_fid.py FILE.npz REFERENCE.npz [--whole-suite]

The images are 64x64 in a stored .npz (614 MB for 50,000), the features 2048 wide (with --whole-suite also 2023 and
1008), the reference 10,000 images. Everything is what `harness evaluate` runs, but for the network: Inception itself
(random weights) sees the first batch, so that its weights and activations are in the peak, and a random projection
stands for it on the rest, which would take hours.

Two peaks are printed: all resident pages, as the system counts them (VmHWM), and those of them that belong to no file
(sampled every 20 ms), which alone cannot be had back when memory is short.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np

SIDE = 64
REFERENCE = 10_000
LIMIT = 1e9  # bytes, promised


def write_images(path: Path, count: int, seed: int) -> None:
    """uint8 (count, 64, 64, 3) as `arr_0` of a stored .npz: smooth colour and texture."""
    r = np.random.default_rng(seed)
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as member:
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, SIDE, SIDE, 3)}
        np.lib.format.write_array_header_1_0(member, header)
        for start in range(0, count, 1000):
            coarse = r.normal(128, 50, (min(1000, count - start), 8, 8, 3))
            smooth = np.repeat(np.repeat(coarse, 8, axis=1), 8, axis=2)
            member.write(np.clip(smooth + r.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8).tobytes())


class StandIn:
    """Inception for the first batch, then a random projection and a rectifier: full rank, and as wide."""

    name, sha256, dim, description = "stand-in", "0" * 64, 2048, "for a measurement of memory"

    def __init__(self, whole_suite: bool):
        r = np.random.default_rng(7)
        self.inputs = 16 * 16 * 3
        self.widths = (2048, 2023, 1008) if whole_suite else (2048,)
        self.weights = [r.standard_normal((self.inputs, width), np.float32) * np.float32(0.05) for width in self.widths]
        self.inception = None

    def __call__(self, images: np.ndarray):
        from evaluators.features import Features

        if self.inception is None:
            from inception_peers import harness_extractor, random_weights

            self.inception = harness_extractor(random_weights()[0], 16)
            self.inception(images[:16])
        small = images.reshape(len(images), 16, 4, 16, 4, 3).mean(axis=(2, 4), dtype=np.float32)
        rows = small.reshape(len(images), -1) / np.float32(64) - np.float32(2)
        arrays = [np.maximum(rows @ weight, 0) for weight in self.weights]
        return Features(**dict(zip(("pooled", "spatial", "logits"), arrays, strict=False)))


def _status(*keys: str) -> int:
    """Bytes, the sum of lines of /proc/self/status."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(lines[key].split()[0]) * 1024 for key in keys)


class Watch(threading.Thread):
    """The largest resident memory that belongs to no file."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak = 0

    def run(self) -> None:
        while True:
            self.peak = max(self.peak, _status("RssAnon", "RssShmem"))
            time.sleep(0.02)


def judge(samples: Path, reference: Path, whole_suite: bool) -> dict:
    """What `harness evaluate` does between opening the files and writing the records."""
    watch = Watch()
    watch.start()
    from evaluators.reference import build_reference
    from evaluators.suites import BUILT_IN, METRICS, evaluate_samples
    from harness.images.open import open_images

    start = time.perf_counter()
    suite, extractor = BUILT_IN["adm"], StandIn(whole_suite)
    metrics = suite.metrics if whole_suite else (METRICS["fd"],)
    suite = replace(suite, metrics=metrics, features=replace(suite.features, name=extractor.name))
    images = open_images(samples).array()
    judged_by = build_reference(open_images(reference).array(), extractor)
    before = watch.peak
    found = evaluate_samples(images, judged_by, suite)
    return {
        "images": len(images),
        "metrics": {each.metric: [each.value, each.low, each.high] for each in found},
        "seconds": time.perf_counter() - start,
        "peak bytes": _status("VmHWM"),
        "peak bytes of no file": watch.peak,
        "peak bytes of no file, reference": before,
    }


def memory_of_fid(arguments: argparse.Namespace) -> dict:
    """Run `judge` in a process of its own, and say what it took."""
    with tempfile.TemporaryDirectory() as folder:
        samples, reference = Path(folder) / "samples.npz", Path(folder) / "reference.npz"
        write_images(samples, arguments.count, 1)
        write_images(reference, REFERENCE, 2)
        command = [sys.executable, __file__, str(samples), str(reference)]
        done = subprocess.run(
            command + ["--whole-suite"] * arguments.whole_suite, stdout=subprocess.PIPE, text=True, check=True
        )
    found = json.loads(done.stdout)
    what = "the five metrics of suite adm" if arguments.whole_suite else "FID with its interval"
    verdict = (
        "" if arguments.whole_suite else f"; promised under 1.00: {'yes' if found['peak bytes'] < LIMIT else 'NO'}"
    )
    print(
        f"memory, {found['images']} images, {what}: peak {found['peak bytes'] / 1e9:.2f} GB, "
        f"{found['peak bytes of no file'] / 1e9:.2f} GB of it in no file{verdict}; {found['seconds']:.0f} s"
    )
    return found


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", type=Path)
    parser.add_argument("reference", type=Path)
    parser.add_argument("--whole-suite", action="store_true")
    given = parser.parse_args()
    print(json.dumps(judge(given.samples, given.reference, given.whole_suite)))
