"""Evaluation beside public packages, in one process: speed, equality, and the memory of FID on 50,000 images.

    python benchmarks/evaluate.py [--parts frechet,precision-recall,extraction,memory] [--runs 5] [--out FILE.json]

1. frechet: two 2048-dimensional statistics of --rows rows, against clean-fid, pytorch-fid and torch-fidelity;
2. precision-recall: rows x rows x 2048, mode `exact`, against torch-fidelity (k = 3, its two ways of going about it);
3. extraction: uint8 images at 256x256 to pool3, resizing included, with the same random weights, the same batch and
   the same threads, in float32 (benchmarks/inception_peers.py says what is called of each package);
4. memory: FID with its interval on 50,000 images, in a process of its own (benchmarks/memory_of_fid.py).

Every run takes each package once, in turn, and the ratios of each run are compared: machines are noisy and only the
ratios mean something. Beside the clock's stand those of processor time, which with `--threads 1` other programs on the
machine hardly move; with more threads it counts those that wait, too. Peers that are not installed are left out and named. Beside a build of torch for another device
torchvision fails to be imported; its operators are declared first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np
import scipy.linalg  # noqa: F401 -- so that its BLAS is there to be limited
import torch
from threadpoolctl import threadpool_limits

sys.path.insert(0, str(Path(__file__).parent))  # run as a file or imported by a path

from inception_peers import PEERS, harness_extractor, random_weights
from memory_of_fid import memory_of_fid

from evaluators.frechet import frechet_distance
from evaluators.precision_recall import precision_recall
from evaluators.statistics import Statistics
from evaluators.statistics import statistics as feature_statistics
from harness.engines.torch.resolve import device_name

DIMENSIONS = 2048
PACKAGES = ("clean-fid", "pytorch-fid", "torch-fidelity", "torchvision")
# What is promised: so many times as fast as the package, and equal to so much.
TARGETS = {
    ("frechet", "clean-fid"): 8.0,
    ("frechet", "pytorch-fid"): 8.0,
    ("frechet", "torch-fidelity"): 1.5,
    ("precision-recall", "torch-fidelity"): 2.0,
    ("precision-recall", "torch-fidelity, save_cpu_ram"): 2.0,
    ("extraction", "clean-fid"): 1.0,
    ("extraction", "pytorch-fid"): 1.0,
    ("extraction", "torch-fidelity"): 1.0,
}
DIFFERENCES = {"frechet": 1e-6, "precision-recall": 0.0, "extraction": 1e-3}


def features(rows: int, seed: int, scale: float) -> np.ndarray:
    """Stand-ins for pool3, float32 (rows, 2048): non-negative, a decaying spectrum, and full rank if rows allow."""
    r = np.random.RandomState(seed)
    mixing = np.random.RandomState(0).randn(256, DIMENSIONS) * np.geomspace(1, 0.05, 256)[:, None]
    x = scale * r.randn(rows, 256) @ mixing / 8 + 0.1 * r.randn(rows, DIMENSIONS) + 0.2
    return np.maximum(x, 0).astype(np.float32)


def declare_torchvision_operators() -> None:
    """Let a torchvision built for another device be imported: its operators are declared and never called."""
    declare_torchvision_operators.library = torch.library.Library("torchvision", "DEF")  # lives as long as it is held
    for op in ("nms", "qnms"):
        declare_torchvision_operators.library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def versions() -> dict[str, str | None]:
    """Of what is compared and of what it runs on; None: not installed."""
    found = {}
    for name in (*PACKAGES, "torch", "numpy", "scipy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def peers_of_frechet(a: Statistics, b: Statistics) -> dict[str, Callable[[], float]]:
    """Each package's own function on the same two statistics."""
    found = {}
    try:
        from cleanfid.fid import frechet_distance as clean

        found["clean-fid"] = lambda: clean(a.mean, a.covariance, b.mean, b.covariance)
    except (ImportError, RuntimeError) as error:
        print("clean-fid is left out:", error)
    try:
        from pytorch_fid.fid_score import calculate_frechet_distance

        found["pytorch-fid"] = lambda: calculate_frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    except (ImportError, RuntimeError) as error:
        print("pytorch-fid is left out:", error)
    try:
        from torch_fidelity.metric_fid import fid_statistics_to_metric

        both = [{"mu": s.mean, "sigma": s.covariance} for s in (a, b)]
        found["torch-fidelity"] = lambda: fid_statistics_to_metric(*both, False)["frechet_inception_distance"]
    except (ImportError, RuntimeError) as error:
        print("torch-fidelity is left out:", error)
    return found


def peers_of_precision_recall(reference: np.ndarray, samples: np.ndarray) -> dict[str, Callable[[], tuple]]:
    """torch-fidelity calls samples features_1 and the reference features_2."""
    try:
        from torch_fidelity.metric_prc import calculate_precision_recall_full, calculate_precision_recall_part
    except (ImportError, RuntimeError) as error:
        print("torch-fidelity is left out:", error)
        return {}
    one, other = torch.from_numpy(samples), torch.from_numpy(reference)
    return {
        "torch-fidelity": lambda: calculate_precision_recall_full(one, other),
        "torch-fidelity, save_cpu_ram": lambda: calculate_precision_recall_part(one, other),
    }


def interleave(calls: dict[str, Callable], runs: int) -> dict[str, dict]:
    """Each package once a run: seconds (median), how many times as long as the harness (median, least and most of the
    runs; by the clock, and the median in processor time), and what it returned."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    processor: dict[str, list[float]] = {name: [] for name in calls}
    values = {}
    for _ in range(runs):
        for name, call in calls.items():
            start, busy = time.perf_counter(), time.process_time()
            values[name] = call()
            seconds[name].append(time.perf_counter() - start)
            processor[name].append(time.process_time() - busy)
    results = {}
    for name, own in seconds.items():
        ratios, busy = (
            [theirs / ours for theirs, ours in zip(each[name], each["harness"], strict=True)]
            for each in (seconds, processor)
        )
        results[name] = {
            "seconds": statistics.median(own),
            "ratio": statistics.median(ratios),
            "least": min(ratios),
            "most": max(ratios),
            "processor ratio": statistics.median(busy),
            "value": values[name],
        }
    return results


def frechet(arguments: argparse.Namespace) -> dict[str, dict]:
    a, b = (feature_statistics(features(arguments.rows, seed, scale)) for seed, scale in ((1, 1.0), (2, 0.9)))
    results = interleave({"harness": lambda: frechet_distance(a, b), **peers_of_frechet(a, b)}, arguments.runs)
    for result in results.values():
        result["value"] = float(result["value"])
        result["difference"] = abs(result["value"] / results["harness"]["value"] - 1)
    return results


def counted(share: float, rows: int) -> float:
    """The share whose numerator a package counted: torch-fidelity rounds it to float32. Any other number stays."""
    exact = round(share * rows) / rows
    return exact if np.float32(exact) == np.float32(share) else share


def prdc(arguments: argparse.Namespace) -> dict[str, dict]:
    reference, samples = features(arguments.rows, 1, 1.0), features(arguments.rows, 2, 0.9)
    calls = {
        "harness": lambda: precision_recall(reference, samples),
        **peers_of_precision_recall(reference, samples),
    }
    results = interleave(calls, arguments.runs)
    for result in results.values():
        ours = results["harness"]["value"]
        shares = (counted(each, arguments.rows) for each in result["value"])
        result["difference"] = max(abs(x - y) for x, y in zip(shares, ours, strict=True))
    return results


def extraction(arguments: argparse.Namespace) -> dict[str, dict]:
    images = np.random.RandomState(0).randint(0, 256, (arguments.images, 256, 256, 3)).astype(np.uint8)
    weights, port = random_weights()
    extractors = {"harness": harness_extractor(weights, arguments.batch)}
    for name, make in PEERS.items():
        try:
            extractors[name] = make(port, arguments.batch)
        except (ImportError, RuntimeError) as error:
            print(f"{name} is left out:", error)
    for extract in extractors.values():
        extract(images[: arguments.batch])  # what is prepared once is not measured
    results = interleave({n: lambda e=e: e(images) for n, e in extractors.items()}, arguments.runs)
    ours = results["harness"]["value"]
    for name, result in results.items():
        theirs = result.pop("value")
        if name in ("harness", "torch-fidelity"):  # the others resize or normalise by another rule
            result["difference"] = float(np.abs(theirs - ours).max() / np.sqrt((ours**2).mean()))
        result["images per second"] = len(images) / result["seconds"]
    return results


PARTS = {"frechet": frechet, "precision-recall": prdc, "extraction": extraction, "memory": memory_of_fid}


def show(part: str, results: dict[str, dict], found: dict[str, str | None]) -> None:
    print(
        f"  {'':30s} {'seconds':>9s} {'ratio':>8s} {'of the runs':>16s} {'processor':>9s} {'promised':>9s} {'difference':>11s}"
    )
    for name, result in results.items():
        version = found.get(name.partition(",")[0]) or ""
        target = TARGETS.get((part, name))
        promised = "" if target is None else f"{target:.1f} {'yes' if result['ratio'] >= target else 'NO'}"
        difference = result.get("difference")
        equal = "" if difference is None else f"{difference:.1e} {'' if difference <= DIFFERENCES[part] else 'NO'}"
        print(
            f"  {f'{name} {version}':30s} {result['seconds']:9.2f} {result['ratio']:8.2f}"
            f" {result['least']:7.2f}-{result['most']:<8.2f} {result['processor ratio']:9.2f} {promised:>9s} {equal:>11s}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--rows", type=int, default=10_000, help="of stored features")
    parser.add_argument("--images", type=int, default=32, help="of a run of extraction")
    parser.add_argument("--batch", type=int, default=16, help="images that a network sees at once")
    parser.add_argument("--count", type=int, default=50_000, help="images of the memory part")
    parser.add_argument("--whole-suite", action="store_true", help="memory of the five metrics of suite adm")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of every package [default: as many as each takes]")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
        threadpool_limits(arguments.threads)  # of what is loaded: numpy's BLAS and scipy's
    declare_torchvision_operators()
    parts = arguments.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    found = versions()
    threads, device = torch.get_num_threads(), device_name(torch.device("cpu"))
    print(f"{device}, {threads} threads; torch {found['torch']}, numpy {found['numpy']}, scipy {found['scipy']}")
    if missing := [name for name in PACKAGES if found[name] is None]:
        print(f"not installed: {', '.join(missing)}")
    report: dict = {
        "device": device,
        "threads": threads,
        "versions": found,
        "arguments": vars(arguments) | {"out": None},
    }
    for part in parts:
        report[part] = PARTS[part](arguments)
        if part == "memory":
            continue
        size = (
            f"{arguments.images} images, batch {arguments.batch}" if part == "extraction" else f"{arguments.rows} rows"
        )
        print(f"{part}, {size}, {arguments.runs} interleaved runs:")
        show(part, report[part], found)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
