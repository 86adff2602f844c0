"""The benchmarks beside public code: what they time is the same work, and they run from end to end."""

import importlib.util
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

from harness import registry
from harness.diffusion.sampler_plan import sampler_plan
from harness.engines.torch.sampler import guided, sample_loop
from harness.randomness import threefry_torch

ROOT = Path(__file__).resolve().parents[2]


def module(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_the_public_recipes_loop_draws_what_ours_draws():
    peers = module("peers")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 4, 3, 3, generator=generator) * 0.1
    table = torch.randn(11, 8, generator=generator)

    def net(x, t, y):
        out = torch.nn.functional.conv2d(x, weight, padding=1) + table[y][:, :, None, None] * (1 + t[0] / 1000)
        return torch.cat([x, 0 * x], dim=1) + 0.01 * out  # nearly the noise, or x would grow without bounds

    x = torch.randn(3, 4, 6, 6, generator=generator)
    y = torch.tensor([1, 5, 9])
    noise = torch.randn(10, 3, 4, 6, 6, generator=generator)
    theirs = peers.PublicDiffusion(10).loop(net, x, y, 3.0, 10, noise=lambda k, x: torch.cat([noise[k]] * 2))
    plan = sampler_plan("ddpm", 10, schedule="linear", diffusion_steps=1000, objective="epsilon-learned-range")
    ours = sample_loop(guided(net, y, 3.0, "first-3", 10), plan, x, lambda k: noise[k])
    np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_the_public_network_is_ours():
    peers = module("peers")
    net = registry.backbones.get("dit-xs-4").build("torch", **peers.INPUT).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for weight in net.parameters():
        weight.normal_(std=0.05, generator=generator)
    x = torch.randn(2, 4, 32, 32, generator=generator)
    t, y = torch.tensor([3, 900]), torch.tensor([7, 1000])
    ours, theirs = net(x, t, y), peers.PublicNetwork(net)(x, t, y)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_the_generator_is_checked_on_the_device(monkeypatch):
    """Its keys come from the host, and what it draws is on the device of the check."""
    checks, drawn = module("gpu_checks"), []

    def on_device(draw):
        def watched(seed, purpose, index, step, what, device=threefry_torch.CPU):
            drawn.append((index.device.type, device.type))
            return draw(seed, purpose, index, step, what)

        return watched

    functions = {name: getattr(threefry_torch, name) for name in ("bits", "uniform", "integers", "normal")}
    monkeypatch.setattr(
        checks, "threefry_torch", Namespace(**{name: on_device(draw) for name, draw in functions.items()})
    )
    found, holds = checks.generator(Namespace(device="cuda"))
    assert holds and found["wrong"] == 0 and set(drawn) == {("cpu", "cuda")}


def test_the_reckoned_step_has_the_operations_of_three_forward_passes():
    estimate = module("mfu_estimate")
    found, macs = estimate.trace("dit-2xs-4", 8)
    assert sum(found.operations.values()) == pytest.approx(2 * 3 * macs * 8, rel=0.03)  # attention repeats its scores
    assert found.count["attention"] == 2 * 4 and found.seconds["matrix products"] > 0  # of 4 blocks, there and back
    assert 0 < found.fused_bytes() < found.bytes["element-wise"]
    assert torch.nn.functional.scaled_dot_product_attention(*[torch.ones(1, 1, 2, 2)] * 3).shape == (1, 1, 2, 2)


def test_the_table_of_the_reckoned_step_is_computed(tmp_path):
    words = [sys.executable, ROOT / "benchmarks" / "mfu_estimate.py", "--out", tmp_path / "found.json"]
    subprocess.run(words, check=True, capture_output=True, timeout=300)
    found = json.loads((tmp_path / "found.json").read_text())
    text = (ROOT / "docs" / "guides" / "speed.md").read_text()
    table = {
        cells[0]: cells[1:]
        for line in text.splitlines()
        if len(cells := [c.strip() for c in line.split("|")[1:-1]]) == 5
    }
    names = {"optimiser": "optimiser and average"}
    for row in found["rows"]:
        shown = table[names.get(row["part"], row["part"])]
        computed = [row["tflop"], row["gigabytes"], row["eager_ms"], row["fused_ms"]]
        for text, number in zip(shown, computed, strict=True):
            assert float(text or 0) == pytest.approx(number, abs=0.5 if "." not in text else 0.05), row
    assert [f"{found['mfu'][key]:.0%}" for key in ("eager", "fused")] == [
        text.replace(" ", "") for text in table["utilisation (MFU)"][2:]
    ]


@pytest.mark.slow
def test_sampling_is_timed_beside_both_peers(tmp_path):
    words = ["--backbones", "dit-xs-4", "--batch", "1", "--steps", "2", "--runs", "1", "--threads", "1"]
    out = tmp_path / "rows.json"
    subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "sample.py"), *words, "--out", str(out)],
        check=True, capture_output=True, timeout=300, cwd=tmp_path,
    )  # fmt: skip
    found = json.loads(out.read_text())
    assert found["threads"] == 1
    assert ["diffusers" in row["against"] for row in found["rows"]] == [True, False, False]
    assert all(row["ratio_low"] <= row["ratio"] <= row["ratio_high"] for row in found["rows"])
    assert all(row["ours_images_per_second"] > 0 for row in found["rows"])


def test_the_interval_of_a_median():
    """Of 31 values the ranks 10 and 22 (Hahn & Meeker: at least 95 %); of few values all of them."""
    cost = module("cost")
    assert cost.median_interval([float(value) for value in range(31, 0, -1)]) == (16.0, 10.0, 22.0)
    assert cost.median_interval([3.0, 1.0]) == (2.0, 1.0, 3.0)


@pytest.mark.slow
def test_tables_and_objectives_are_timed_beside_plain_ones(tmp_path):
    words = ["--backbone", "dit-xs-4", "--batch", "2", "--steps", "5", "--runs", "2", "--threads", "1"]
    out = tmp_path / "rows.json"
    subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "cost.py"), *words, "--out", str(out)],
        check=True, capture_output=True, timeout=300, cwd=tmp_path,
    )  # fmt: skip
    rows = json.loads(out.read_text())["rows"]
    assert [row["what"].partition(":")[0] for row in rows] == [
        "torch, ddpm", "torch, ddim", "jax, ddpm", "jax, ddim", "torch, 5 training steps", "jax, 5 training steps",
    ]  # fmt: skip
    assert all(0 < row[clock]["low"] <= row[clock]["ratio"] <= row[clock]["high"] for row in rows for clock in ("wall", "processor"))  # fmt: skip
