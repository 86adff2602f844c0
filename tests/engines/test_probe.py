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
    """A function of the seconds that bfloat16 takes for an image: what `resolve` then measures (precision, images, repeats),
    and what it chooses."""

    def choose(seconds, first=None):
        passes = []

        def measure_here(net, images, arguments, device, precision, kind="denoiser", repeats=resolve.PROBE_REPEATS):
            passes.append((precision, images, repeats))
            if precision == "float32":
                return 0.1
            return first if first is not None and len(passes) == 2 else seconds

        monkeypatch.setattr(resolve, "measure_here", measure_here)
        found = resolve.resolve(
            SPEC, SPEC.build("torch", **ARGUMENTS), SPEC.arguments(**ARGUMENTS), batch=16, device=torch.device("cpu"),
            mesh=MeshShape(1, 1), precision="auto", micro_batch=16, activation_bytes=1, gradient_checkpointing=False,
            compile="off", steps=1,
        )  # fmt: skip
        assert passes[0] == ("float32", 16, resolve.PROBE_REPEATS)
        return passes[1:], found

    return choose


ONE, ALL = ("bfloat16", 1, 0), ("bfloat16", 16, resolve.PROBE_REPEATS)


def test_two_passes_of_one_image_show_that_a_precision_is_far_slower(chosen):
    passes, found = chosen(30.0)
    assert passes == [ONE, ONE]
    assert found.resolved.precision == "float32" and found.seconds == {"float32": 0.1, "bfloat16": 30.0}


def test_a_precision_that_is_faster_is_measured_as_the_other_was(chosen):
    passes, found = chosen(0.05)
    assert passes == [ONE, ALL] and found.resolved.precision == "bfloat16"


def test_a_first_pass_that_prepares_itself_decides_nothing(chosen):
    passes, found = chosen(0.05, first=30.0)
    assert passes == [ONE, ONE, ALL] and found.resolved.precision == "bfloat16"


def test_without_repeats_the_first_pass_counts():
    net = SPEC.build("torch", **ARGUMENTS)
    seconds = resolve.measure_here(net, 1, SPEC.arguments(**ARGUMENTS), torch.device("cpu"), "float32", repeats=0)
    assert 0 < seconds < 60
