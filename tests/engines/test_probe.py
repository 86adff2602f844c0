"""The precision of a run: measured, but one that is far slower only briefly."""

import pytest
import torch

from harness import registry
from harness.distributed.mesh import MeshShape
from harness.engines.memory import USABLE_SHARE, fit_micro_batch, state_bytes
from harness.engines.torch import resolve
from harness.errors import UserError

SPEC = registry.backbones.get("dit-xs-4")
ARGUMENTS = {"input_size": 8, "in_channels": 1, "num_classes": 10, "out_channels": 2}
ACTIVATIONS = {"float32": 1, "bfloat16": 1}


@pytest.fixture
def chosen(monkeypatch):
    """A function of the seconds that bfloat16 takes for an image and of how many times as long a product takes in it: the
    precisions that `resolve` then measures, and what it chooses."""

    def choose(seconds, slowdown, *, micro_batch=16, batch=16, activation_bytes=ACTIVATIONS):
        passes = []

        def measure_here(
            net,
            images,
            arguments,
            device,
            precision,
            kind="denoiser",
            repeats=resolve.PROBE_REPEATS,
            time_form="",
            times=1,
        ):
            passes.append(precision)
            return 0.1 if precision == "float32" else seconds

        monkeypatch.setattr(resolve, "measure_here", measure_here)
        monkeypatch.setattr(resolve, "product_slowdown", lambda device, precision: slowdown)
        found = resolve.resolve(
            SPEC, SPEC.build("torch", **ARGUMENTS), SPEC.arguments(**ARGUMENTS), batch=batch, device=torch.device("cpu"),
            mesh=MeshShape(1, 1), precision="auto", micro_batch=micro_batch, activation_bytes=activation_bytes, gradient_checkpointing=False,
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


def test_a_network_that_knows_no_bfloat16_is_trained_in_float32(caplog, monkeypatch):
    class WithoutBfloat16(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = SPEC.build("torch", **ARGUMENTS)

        def forward(self, x, t, y):
            out = self.inner(x, t, y)
            if out.dtype == torch.bfloat16:
                raise RuntimeError("my_kernel is not implemented for BFloat16")
            return out

    monkeypatch.setattr(resolve, "product_slowdown", lambda device, precision: 1.0)
    with caplog.at_level("INFO"):
        found = resolve.resolve(
            SPEC, WithoutBfloat16(), SPEC.arguments(**ARGUMENTS), batch=4, device=torch.device("cpu"),
            mesh=MeshShape(1, 1), precision="auto", micro_batch=4, activation_bytes=ACTIVATIONS, gradient_checkpointing=False,
            compile="off", steps=1,
        )  # fmt: skip
    assert found.resolved.precision == "float32" and list(found.seconds) == ["float32"]
    assert (
        "bfloat16 is left out: the network fails in it with RuntimeError: my_kernel is not implemented" in caplog.text
    )


def test_the_micro_batch_is_that_of_the_precision_that_runs(chosen, monkeypatch):
    """Here float32 fits 40 images at once, and bfloat16 80."""
    parameters = sum(weight.numel() for weight in SPEC.build("torch", **ARGUMENTS).parameters())
    free = 10**9 + 20 * parameters  # the network is counted as used
    monkeypatch.setattr(resolve, "free_bytes", lambda device: free)
    usable = int((free + 4 * parameters) * USABLE_SHARE)
    room = {precision: usable - state_bytes(parameters, precision) for precision in ("float32", "bfloat16")}
    images = {"float32": room["float32"] // 40, "bfloat16": room["bfloat16"] // 80}
    for seconds, precision, expected in ((0.05, "bfloat16", 64), (0.2, "float32", 32)):
        _, found = chosen(seconds, 1.0, micro_batch=None, batch=64, activation_bytes=images)
        assert (found.resolved.precision, found.resolved.micro_batch) == (precision, expected)
        assert found.memory_bytes == state_bytes(parameters, precision) + expected * images[precision]
    images["float32"] = 2 * room["float32"]  # not even one
    passes, found = chosen(0.2, 1.0, micro_batch=None, batch=64, activation_bytes=images)
    assert passes == ["bfloat16"] and found.resolved.micro_batch == 64
    images["bfloat16"] = 2 * room["bfloat16"]
    with pytest.raises(UserError, match="to train even one image at a time"):
        chosen(0.2, 1.0, micro_batch=None, batch=64, activation_bytes=images)


@pytest.mark.parametrize(
    ("batch", "fitting", "expected"),
    [
        (256, 100, 64),
        (256, 256, 256),
        (256, 300, 256),
        (96, 50, 48),
        (100, 64, 50),
        (97, 64, 49),
        (24, 7, 6),
        (7, 6, 4),
        (7, 1, 1),
    ],
)
def test_micro_batches_divide_the_batch(batch, fitting, expected):
    free = int((state_bytes(1000, "float32") + fitting * 10**6 + 5 * 10**5) / USABLE_SHARE) + 1
    assert fit_micro_batch(batch, 1000, 10**6, free, precision="float32") == expected


def test_the_slowdown_is_that_of_the_fastest_products(monkeypatch):
    durations = iter([5.0, 1.0, 2.0, 9.0, 4.0, 6.0])  # three products in float32, then three in bfloat16
    ticks = (each for duration in durations for each in (0.0, duration))
    monkeypatch.setattr(resolve.time, "perf_counter", lambda: next(ticks))
    assert resolve.product_slowdown(torch.device("cpu"), "bfloat16") == 4.0


def test_without_repeats_the_first_pass_counts():
    net = SPEC.build("torch", **ARGUMENTS)
    seconds = resolve.measure_here(net, 1, SPEC.arguments(**ARGUMENTS), torch.device("cpu"), "float32", repeats=0)
    assert 0 < seconds < 60
