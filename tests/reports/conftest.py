"""Measured records of a small study on digits, and of ImageNet runs that may join the paper's tables."""

import contextlib
import sys
from pathlib import Path

import pytest

from results.records import Environment, Evaluation, Record, Sampling, Training

sys.path.insert(0, str(Path(__file__).parent))  # helpers beside these tests; pytest's importlib mode leaves it alone
FEATURES, REFERENCE = "ef" * 32, "12" * 32


@pytest.fixture(autouse=True)
def nothing_kept(request, monkeypatch):
    """Without the runs in results/measured, which change; a test that is marked `kept` has them."""
    if not request.node.get_closest_marker("kept"):
        monkeypatch.setattr("reports.report.packaged_runs", lambda: contextlib.nullcontext([]))


def make_record(
    metric: str = "fd",
    value: float = 12.0,
    *,
    half: float | None = 0.5,
    system: str = "dit-xs-2",
    steps: int = 25,
    gflops: float = 0.0637,
    seed: int = 0,
    **changes,
) -> Record:
    fields = {
        "provenance": "measured",
        "metric": metric,
        "value": value,
        "low": None if half is None else value - half,
        "high": None if half is None else value + half,
        "interval": None if half is None else "95 % delete-block jackknife",
        "n": 1000,
        "protocol": "digits",
        "protocol_version": "1",
        "resolution": 8,
        "dataset": "digits",
        "system": system,
        "backbone": system,
        "framework": "torch",
        "params": 4_123_456,
        "gflops": gflops,
        "training": Training(steps=800, gflops=3 * gflops * 102_400, seed=seed, recipe_hash="ab" * 32),
        "sampling": Sampling(sampler="ddpm", steps=steps, gflops_per_image=gflops * steps, precision="bfloat16"),
        "evaluation": Evaluation(
            suite="embedded", features="efficientnet-lite0", features_sha256=FEATURES, reference_sha256=REFERENCE
        ),
        "environment": Environment(device="cpu"),
    }
    return Record(**{**fields, **changes})


@pytest.fixture
def record():
    return make_record


@pytest.fixture
def study() -> list[Record]:
    """3 models, 2 seeds, 3 step counts, 3 metrics: 54 records."""
    return make_study()


def make_study() -> list[Record]:
    records = []
    for system, gflops, base in (("dit-xs-2", 0.0637, 12.0), ("dit-xs-4", 0.0171, 18.0), ("unet-small", 0.05, 9.6)):
        for seed in range(2):
            for steps, factor in ((10, 2.2), (25, 1.3), (50, 1.0)):
                fd = base * factor + 0.8 * seed
                for metric, value in (("fd", fd), ("kid", fd / 4000), ("precision", 0.8 / factor)):
                    made = make_record(
                        metric, value, half=0.05 * value, system=system, steps=steps, gflops=gflops, seed=seed
                    )
                    records.append(made)
    return records


@pytest.fixture(scope="session")
def makers():
    """(make_study, make_record), for fixtures of modules."""
    return make_study, make_record


@pytest.fixture
def imagenet():
    """A record that may stand in Table 2: the paper's data set, resolution, N and suite."""

    def make(metric: str, value: float, features: str = FEATURES, **changes) -> Record:
        sampling = Sampling(sampler="ddpm", steps=250, guidance_scale=1.5, guidance_channels="all", precision="float32")
        evaluation = Evaluation(suite="adm", features="inception", features_sha256=features, reference_sha256=REFERENCE)
        fields = {"n": 50_000, "protocol": "imagenet-256", "resolution": 256, "dataset": "imagenet"}
        fields |= {"sampling": sampling, "evaluation": evaluation, "backbone": "dit-xl-2", "half": 0.02}
        return make_record(metric, value, **{**fields, "system": "dit-xl-2-256-cfg1.5", "gflops": 118.638, **changes})

    return make
