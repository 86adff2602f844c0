"""The precision of a run: measured, but one that is far slower only briefly."""

import pytest
import torch

from harness import registry
from harness.distributed.mesh import MeshShape
from harness.engines.torch import resolve

SPEC = registry.backbones.get("dit-xs-4")
ARGUMENTS = {"input_size": 8, "in_channels": 1, "num_classes": 10, "out_channels": 2}


@pytest.fixture
def chosen(monkeypatch):
    """A function of the seconds that bfloat16 takes for an image and of how many times as long a product takes in it: the
    precisions that `resolve` then measures, and what it chooses."""

    def choose(seconds, slowdown):
        passes = []

        def measure_here(
            net, images, arguments, device, precision, kind="denoiser", repeats=resolve.PROBE_REPEATS, time_form=""
        ):
            passes.append(precision)
            return 0.1 if precision == "float32" else seconds

        monkeypatch.setattr(resolve, "measure_here", measure_here)
        monkeypatch.setattr(resolve, "product_slowdown", lambda device, precision: slowdown)
        found = resolve.resolve(
            SPEC, SPEC.build("torch", **ARGUMENTS), SPEC.arguments(**ARGUMENTS), batch=16, device=torch.device("cpu"),
            mesh=MeshShape(1, 1), precision="auto", micro_batch=16, activation_bytes=1, gradient_checkpointing=False,
            compile="off", steps=1,
        )  # fmt: skip
        return passes, found

    return choose


def test_a_product_shows_that_a_precision_is_far_slower(chosen, caplog):
    with caplog.at_level("INFO"):
        passes, found = chosen(0.05, slowdown=30.0)
    assert passes == ["float32"] and "a matrix product takes 30 times as long in it" in caplog.text
    assert found.resolved.precision == "float32" and found.seconds == {"float32": 0.1}


@pytest.mark.parametrize(("seconds", "fastest"), [(0.05, "bfloat16"), (0.2, "float32")])
def test_otherwise_the_faster_one_is_chosen(chosen, seconds, fastest):
    passes, found = chosen(seconds, slowdown=3.0)
    assert passes == ["float32", "bfloat16"] and found.resolved.precision == fastest
    assert found.seconds == {"float32": 0.1, "bfloat16": seconds}


def test_the_slowdown_is_that_of_the_fastest_products(monkeypatch):
    durations = iter([5.0, 1.0, 2.0, 9.0, 4.0, 6.0])  # three products in float32, then three in bfloat16
    ticks = (each for duration in durations for each in (0.0, duration))
    monkeypatch.setattr(resolve.time, "perf_counter", lambda: next(ticks))
    assert resolve.product_slowdown(torch.device("cpu"), "bfloat16") == 4.0


def test_without_repeats_the_first_pass_counts():
    net = SPEC.build("torch", **ARGUMENTS)
    seconds = resolve.measure_here(net, 1, SPEC.arguments(**ARGUMENTS), torch.device("cpu"), "float32", repeats=0)
    assert 0 < seconds < 60
