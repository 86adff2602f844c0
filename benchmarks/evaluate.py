"""Metrics from stored features, beside public packages, in one process.

    python benchmarks/evaluate.py [--parts frechet,precision-recall] [--rows 10000] [--runs 5] [--out FILE.json]

1. frechet: two 2048-dimensional statistics, against clean-fid, pytorch-fid and torch-fidelity;
2. precision-recall: rows x rows x 2048, mode `exact`, against torch-fidelity (k = 3, its two ways of going about it).

Every run takes each package once, in turn, and the medians are compared: machines are noisy and only the ratios mean
something. Peers that are not installed are left out and named.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from evaluators.frechet import frechet_distance
from evaluators.precision_recall import precision_recall
from evaluators.statistics import Statistics
from evaluators.statistics import statistics as feature_statistics
from harness.engines.torch.resolve import device_name

DIMENSIONS = 2048


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
    """Seconds (median of the runs, each package once a run) and what each returned."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    values = {}
    for _ in range(runs):
        for name, call in calls.items():
            start = time.perf_counter()
            values[name] = call()
            seconds[name].append(time.perf_counter() - start)
    return {name: {"seconds": statistics.median(seconds[name]), "value": values[name]} for name in calls}


def frechet(rows: int, runs: int) -> dict[str, dict]:
    a, b = (feature_statistics(features(rows, seed, scale)) for seed, scale in ((1, 1.0), (2, 0.9)))
    results = interleave({"harness": lambda: frechet_distance(a, b), **peers_of_frechet(a, b)}, runs)
    for result in results.values():
        result["value"] = float(result["value"])
        result["relative difference"] = abs(result["value"] / results["harness"]["value"] - 1)
    return results


def prdc(rows: int, runs: int) -> dict[str, dict]:
    reference, samples = features(rows, 1, 1.0), features(rows, 2, 0.9)
    calls = {
        "harness": lambda: precision_recall(reference, samples),
        **peers_of_precision_recall(reference, samples),
    }
    results = interleave(calls, runs)
    for result in results.values():
        ours = results["harness"]["value"]
        result["largest difference"] = max(abs(x - y) for x, y in zip(result["value"], ours, strict=True))
    return results


PARTS = {"frechet": frechet, "precision-recall": prdc}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    declare_torchvision_operators()
    parts = arguments.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    report: dict = {"device": device_name(torch.device("cpu")), "rows": arguments.rows, "runs": arguments.runs}
    for part in parts:
        report[part] = PARTS[part](arguments.rows, arguments.runs)
        ours = report[part]["harness"]["seconds"]
        print(f"{part}, {arguments.rows} rows, median of {arguments.runs}:")
        for name, result in report[part].items():
            difference = next(value for key, value in result.items() if key.endswith("difference"))
            print(
                f"  {name:30s} {result['seconds']:8.2f} s {result['seconds'] / ours:6.2f}x  difference {difference:.1e}"
            )
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
