"""Replacements for layers of torch that are slow: the same functions up to float32 rounding."""

import pytest
import torch
from torch.nn import functional as F

from backbones import torch_layers
from backbones.torch_layers import gelu

EDGES = [0.0, -0.0, 1e-30, 1e20, -1e20, 3.4e38, -3.4e38, 88.0, -88.0]


@pytest.mark.parametrize("edge", [False, True])
def test_gelu_and_its_gradient_are_torchs_to_rounding(edge):
    values = torch.tensor(EDGES) if edge else torch.linspace(-12, 12, 20001)
    x, exact = values.clone().requires_grad_(), values.double().requires_grad_()
    ours, theirs = gelu(x), F.gelu(exact, approximate="tanh")
    (gradient,) = torch.autograd.grad(ours.sum(), x)
    (wanted,) = torch.autograd.grad(theirs.sum(), exact)
    assert torch.isfinite(ours).all()
    # 1 + tanh(u) cancels where u is far below 0, in torch's float32 as well as in a sigmoid.
    torch.testing.assert_close(ours.double(), theirs, rtol=2e-6, atol=1e-6)
    if not edge:
        torch.testing.assert_close(gradient.double(), wanted, rtol=2e-6, atol=2e-6)  # torch's own


def test_gelu_is_a_sigmoids_on_a_cpu_alone(monkeypatch):
    calls = []
    monkeypatch.setattr(torch_layers.F, "gelu", lambda x, approximate: calls.append(x.dtype) or x)
    gelu(torch.ones(3))
    assert calls == []
    gelu(torch.ones(3, dtype=torch.bfloat16))
    gelu(torch.ones(3, device="meta"))  # as the counters of compute see it
    assert calls == [torch.bfloat16, torch.float32]


def test_what_compiles_gets_one_expression(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    x = torch.linspace(-12, 12, 1001, requires_grad=True)
    torch.testing.assert_close(gelu(x), F.gelu(x, approximate="tanh"), rtol=2e-6, atol=1e-6)
    assert "SigmoidGelu" not in type(gelu(x).grad_fn).__name__
