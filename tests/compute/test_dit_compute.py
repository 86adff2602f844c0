"""The closed form of the DiTs: the paper's figures, and the traced count, as integers."""

import pytest
import torch

from backbones.dit.spec import SPECS
from harness.compute import activations
from harness.compute.activations import activation_bytes, activation_bytes_by_precision
from harness.compute.trace_torch import trace

BY_NAME = {spec.name: spec for spec in SPECS}

# arXiv:2212.09748, Table 4: Gflops and million parameters at 32x32x4, and XL/2 at 64x64x4.
TABLE_4 = [
    ("dit-s-8", 32, "0.36", 33),
    ("dit-s-4", 32, "1.41", 33),
    ("dit-s-2", 32, "6.06", 33),
    ("dit-b-8", 32, "1.42", 131),
    ("dit-b-4", 32, "5.57", 130),  # the paper prints 5.56
    ("dit-b-2", 32, "23.01", 130),
    ("dit-l-8", 32, "5.01", 459),
    ("dit-l-4", 32, "19.70", 458),
    ("dit-l-2", 32, "80.71", 458),
    ("dit-xl-8", 32, "7.39", 676),
    ("dit-xl-4", 32, "29.05", 675),
    ("dit-xl-2", 32, "118.64", 675),
    ("dit-xl-2", 64, "524.60", 675),
    ("dit-xl-2-in-context", 32, "119.37", 449),
    ("dit-xl-2-cross-attention", 32, "137.62", 598),
    ("dit-xl-2-adaln", 32, "118.56", 600),
]


@pytest.mark.parametrize(("name", "size", "gflops", "params"), TABLE_4)
def test_the_paper(name, size, gflops, params):
    count = BY_NAME[name].count(input_size=size)
    assert f"{count.gflops:.2f}" == gflops
    assert round(count.params / 1e6) == params
    assert count.macs < count.flops and count.source == "closed form"


def assert_same(closed, traced):
    assert traced.source == "traced"
    assert traced.breakdown == closed.breakdown
    assert all(type(flops) is int for flops in [*closed.breakdown.values(), *traced.breakdown.values()])
    assert (traced.flops, traced.macs, traced.params) == (closed.flops, closed.macs, closed.params)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_closed_form_equals_trace(spec):
    assert_same(spec.count(), trace(spec))


@pytest.mark.parametrize(
    "overrides",
    [
        {"input_size": 64},
        {"input_size": 8, "in_channels": 1, "num_classes": 10},
        {"out_channels": 4},
        {"gradient_checkpointing": True},
        {"depth": 1, "width": 64, "heads": 2, "input_size": 12},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["dit-xs-2", "dit-xs-4-in-context", "dit-xs-2-cross-attention", "dit-s-4-adaln"])
def test_closed_form_equals_trace_with_other_arguments(name, overrides):
    assert_same(BY_NAME[name].count(**overrides), trace(BY_NAME[name], **overrides))


def test_activation_bytes_are_what_a_real_training_step_saves():
    spec = BY_NAME["dit-xs-4"]
    net = spec.build()
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x, t, y = torch.randn(1, 4, 32, 32), torch.tensor([5]), torch.tensor([7])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(x, t, y)
    held = {tensor.untyped_storage().data_ptr() for tensor in [*net.parameters(), x, t, y]}
    real = sum(tensor.untyped_storage().nbytes() for address, tensor in storages.items() if address not in held)
    assert real > 0
    assert activation_bytes(spec) == pytest.approx(real, rel=0.02)  # padding inside kernels differs


def test_activation_bytes_in_bfloat16():
    """The product of matrices keeps half, the stream between blocks and the normalisations stay in float32."""
    xl = activation_bytes_by_precision(BY_NAME["dit-xl-2"], out_channels=8)
    assert xl["float32"] == xl["tf32"] == pytest.approx(665.9e6, rel=1e-3)
    assert xl["bfloat16"] == pytest.approx(366.9e6, rel=1e-3)
    spec = BY_NAME["dit-xs-4"]
    checkpointed = activation_bytes_by_precision(spec, gradient_checkpointing=True)
    assert checkpointed["bfloat16"] < checkpointed["float32"] < activation_bytes(spec)


def test_a_network_that_fails_in_bfloat16_counts_as_in_float32(monkeypatch):
    class Strict(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(32, 32))

        def forward(self, x, t, y):
            out = torch.nn.functional.linear(x, self.weight)
            if out.dtype != torch.float32:
                raise RuntimeError("expected float32")
            return out.exp()

    monkeypatch.setattr(activations, "build_on_meta", lambda spec, overrides: Strict().to("meta"))
    found = activation_bytes_by_precision(BY_NAME["dit-xs-4"])
    assert found["bfloat16"] == found["float32"] > 0


def test_activation_bytes_grow_as_they_should():
    spec = BY_NAME["dit-xs-2"]
    full, deep = activation_bytes(spec), activation_bytes(spec, depth=12)
    assert type(full) is int
    assert 1.9 < deep / full < 2.0
    assert activation_bytes(spec, gradient_checkpointing=True) < full / 3
    assert 3.5 < activation_bytes(spec, input_size=64) / full < 4.1  # linear in tokens: no T x T scores
