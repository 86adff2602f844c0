"""--deterministic: frozen in a run, and switched on for the GPU that works on it."""

import os
from dataclasses import replace

import pytest
import torch

from harness import RunError, UserError, registry, train
from harness.distributed.mesh import MeshShape
from harness.engines.torch import resolve
from harness.runs.run import Resolved, open_run

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ARGUMENTS = {"input_size": 8, "in_channels": 1, "num_classes": 10, "out_channels": 2}


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    yield
    torch.use_deterministic_algorithms(False)


def test_the_algorithms_of_a_run_are_switched_on_and_off(monkeypatch):
    run = Resolved(device="cuda", device_name="", precision="float32", micro_batch=4, threads=1, deterministic=True)
    monkeypatch.setattr(resolve, "pick_device", lambda name: torch.device(name))
    resolve.apply_resolved(replace(run, device="cpu"))
    assert not torch.are_deterministic_algorithms_enabled()  # a CPU needs nothing
    resolve.apply_resolved(run)
    assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    resolve.apply_resolved(replace(run, deterministic=False))
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_network_without_deterministic_algorithms_is_refused_in_one_line(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError(
            "grid_sampler_2d_backward_cuda does not have a deterministic implementation\nbut you set ..."
        )

    spec = registry.backbones.get("dit-xs-4")
    monkeypatch.setattr(resolve, "measure_here", fails)
    monkeypatch.setattr(resolve, "free_bytes", lambda device: 10**11)
    monkeypatch.setattr(resolve, "check_precision", lambda *_: None)
    resolve.set_deterministic(CUDA, True)
    with pytest.raises(UserError, match="--deterministic: the network uses .*grid_sampler_2d_backward_cuda") as caught:
        resolve.resolve(
            spec, spec.build("torch", **ARGUMENTS), spec.arguments(**ARGUMENTS), batch=16, device=CUDA, mesh=MeshShape(1, 1),
            precision="float32", micro_batch=16, activation_bytes={"float32": 1}, gradient_checkpointing=False, compile="off",
            steps=1, deterministic=True,
        )  # fmt: skip
    assert "\n" not in str(caught.value)


def test_it_is_frozen_in_the_run(tmp_path):
    settings = {"backbone": "dit-2xs-4", "protocol": "digits", "steps": 1, "device": "cpu", "set": {"batch": 4}}
    train(**settings, out=tmp_path / "with", deterministic=True)
    assert open_run(tmp_path / "with").resolved.deterministic is True
    train(**settings, out=tmp_path / "with")  # without the flag it goes on as it was created
    train(**settings, out=tmp_path / "without")
    assert open_run(tmp_path / "without").resolved.deterministic is False
    assert open_run(tmp_path / "with").identity == open_run(tmp_path / "without").identity
    with pytest.raises(
        UserError, match=r"was created with deterministic False, which is frozen .* leave out --deterministic"
    ):
        train(**settings, out=tmp_path / "without", deterministic=True)
    with pytest.raises((UserError, RunError), match="--deterministic belongs to --framework torch"):
        train(**settings, out=tmp_path / "jax", deterministic=True, framework="jax")
