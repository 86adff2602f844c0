"""The first command of README, as it stands there: minutes, so on demand (`make slow`)."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.svm import SVC

from evaluators.frechet import frechet_distance
from evaluators.statistics import statistics
from evaluators.suites import EMBEDDED
from harness.data.digits import load
from harness.diffusion.sampler_plan import sampler_plan
from harness.engines.torch.sampling import TorchSampler
from harness.engines.torch.trainer import build
from harness.planning.request import make_request
from harness.runs.sample_set import labels_of

N = 898  # half of the digits
README_WORDS = ["run", "--backbone", "dit-2xs-2", "--set", "objective=sit", "--out", "runs/a"]


@pytest.mark.slow
def test_the_first_command_makes_digits_that_can_be_told(tmp_path):
    assert f"harness {' '.join(README_WORDS)} " in (Path(__file__).parents[2] / "README.md").read_text()
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "harness", *README_WORDS],
        cwd=tmp_path, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    seconds = time.monotonic() - begin
    assert done.returncode == 0, done.stderr
    print(f"{seconds:.0f} s\n{done.stdout}")

    digits = load()
    pixels = digits.images.reshape(len(digits), -1) / 255
    judge = SVC(C=10).fit(pixels, digits.labels)
    extractor = EMBEDDED.features.load("cpu")
    order = np.random.default_rng(0).permutation(len(digits))
    first, second = (statistics(extractor(digits.images[part]).pooled) for part in (order[:N], order[N : 2 * N]))
    halves = frechet_distance(first, second)
    untrained = frechet_distance(statistics(extractor(untrained_samples()).pooled), first)

    run = tmp_path / "runs" / "a"
    paths = sorted(run.glob("samples/*/samples.npz"))
    assert len(paths) == 3
    for path in paths:
        with np.load(path, allow_pickle=False) as data:
            images, labels = data["arr_0"], data["arr_1"]
        assert images.shape == (1000, 8, 8, 1) and images.dtype == np.uint8
        agreement = (judge.predict(images.reshape(1000, -1) / 255) == labels).mean()
        distance = frechet_distance(statistics(extractor(images[:N]).pooled), first)
        print(
            f"{path.parent.name}: agreement {agreement:.3f}, {distance / halves:.2f} x halves, 1/{untrained / distance:.1f}"
        )
        assert agreement >= 0.85
        assert distance <= 5 * halves
        assert distance <= untrained / 5
        assert path.with_name("grid.png").stat().st_size > 1000
    records = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    assert len(records) == 3 * len(EMBEDDED.metrics)
    assert all(record["low"] <= record["value"] <= record["high"] for record in records)
    assert (tmp_path / "runs" / "report" / "figure-10.png").exists()
    assert seconds < 300


def untrained_samples():
    """What the same network draws before its first step."""
    request = make_request(backbone="dit-2xs-2", protocol="digits", settings={"objective": "sit"})
    plan = sampler_plan(
        request.sampling.sampler, 10, schedule=request.recipe.schedule, diffusion_steps=1000,
        objective=request.recipe.objective, clip_denoised=True,
    )  # fmt: skip
    net = build(request.spec, request.arguments, 0)
    sampler = TorchSampler(
        request.spec, net, plan, request.sampling, arguments=request.arguments, precision="float32",
        device=torch.device("cpu"),
    )  # fmt: skip
    return sampler.draw(np.arange(N), labels_of("random", 0, N, 10))
