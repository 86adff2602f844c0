"""--sampling-precision auto: what it becomes, before anything depends on it."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from small_runs import request, workshop

from harness import sample
from harness.engines.torch import resolve, systems
from harness.pipeline.sample_system import sample_system
from harness.runs.samples import read_sidecar
from harness.systems.binding import load_parts
from harness.systems.read import get_system


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run in bfloat16, as if that had been measured to be faster."""
    shop = workshop(tmp_path_factory.mktemp("runs") / "run", request(steps=1), precision="bfloat16")
    shop.train(1)
    return shop.run.folder


def test_a_run_is_sampled_in_the_precision_that_it_was_trained_in(run):
    settings = {"run": run, "samples": 2, "sampling_steps": 2, "batch": 2}
    (auto,) = sample(**settings, sampling_precision="auto").samples
    (named,) = sample(**settings, sampling_precision="bfloat16").samples
    (default,) = sample(**settings).samples
    assert auto == named != default  # one sample set, not two
    sidecar = read_sidecar(auto)
    assert sidecar["identity"]["sampling"]["precision"] == sidecar["record"]["sampling"]["precision"] == "bfloat16"
    assert read_sidecar(default)["identity"]["sampling"]["precision"] == "float32"


def test_a_system_takes_what_its_backend_measures(run, tmp_path, monkeypatch):
    system = replace(get_system("digits-guided"), name="plain", classifier=None, uint8_rule="dit")
    system = replace(system, base=replace(system.base, backbone="dit-xs-4", steps=2))
    monkeypatch.setattr("harness.engines.torch.backend.faster_precision", lambda device: "bfloat16")
    path = sample_system(
        load_parts(system, {"base": run}), folder=tmp_path, count=2, seed=0, precision="auto", batch=2, device="cpu"
    )
    side = json.loads(path.with_name("samples.json").read_text())
    assert side["identity"]["sampling"]["precision"] == side["record"]["sampling"]["precision"] == "bfloat16"


@pytest.mark.parametrize(
    ("device", "slowdown", "expected"),
    [("cuda", 0.1, "bfloat16"), ("cuda", 1.5, "float32"), ("cpu", 0.1, "float32")],
)
def test_bfloat16_where_a_gpu_is_faster_in_it(device, slowdown, expected, monkeypatch):
    monkeypatch.setattr(resolve, "product_slowdown", lambda device, precision: slowdown)
    assert systems.faster_precision(SimpleNamespace(target=torch.device(device))) == expected
