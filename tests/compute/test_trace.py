"""The tracer: every kind of call, every counted operator, and no silent zero."""

import math
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from backbones.dit.spec import SPECS
from harness.compute.trace_torch import COUNTED, FREE, OperatorCounter, trace
from harness.errors import RunError, UserError
from harness.spec import BackboneSpec


class Toy(nn.Module):
    """One of everything that the convention counts."""

    def __init__(self, *, input_size, in_channels, num_classes, out_channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 8, 3, padding=1, groups=1)
        self.grouped = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.norm = nn.GroupNorm(2, 8)
        self.quiet = nn.LayerNorm(4)
        self.label = nn.Embedding(num_classes + 1, 8)
        self.linear = nn.Linear(8, 8, bias=False)

    def forward(self, x, t, y):
        h = self.norm(self.conv(x))  # (1, 8, 6, 6)
        h = h + self.linear(self.label(y))[:, :, None, None]
        h = self.up(F.silu(self.grouped(h)))  # (1, 4, 6, 6)
        tokens = self.quiet(h.flatten(2).transpose(1, 2))  # (1, 36, 4)
        scores = torch.einsum("nic,njc->nij", tokens, tokens).softmax(-1)
        tokens = F.scaled_dot_product_attention(*(scores @ tokens).unsqueeze(1).expand(3, 1, 1, 36, 4))
        return tokens[:, 0].transpose(1, 2).unflatten(2, (6, 6))[:, :2]


class Strange(Toy):
    def forward(self, x, t, y):
        return torch.linalg.cholesky(x) + t


class Spectral(nn.Module):
    """Mixes the tokens in the Fourier domain, with a complex matrix for each frequency."""

    def __init__(self, **arguments):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2, 6, 4, dtype=torch.complex64))

    def forward(self, x, t, y):
        spectrum = torch.fft.rfft2(torch.cat([x, x], 1))  # (1, 2, 6, 4), complex
        out = torch.fft.irfft2(torch.einsum("nihw,iohw->nohw", spectrum.conj(), self.weight), s=(6, 6))
        return torch.fft.ifft(torch.complex(out, out), dim=2).real


class Shape(nn.Module):
    """Records the shapes of its inputs."""

    seen: list = []

    def __init__(self, **arguments):
        super().__init__()

    def forward(self, *inputs):
        Shape.seen = [tuple(each.shape) for each in inputs]
        return inputs[0] * 2


DEFAULTS = {"input_size": 6, "in_channels": 1, "num_classes": 3, "out_channels": 2}


def toy(attribute="Toy", kind="denoiser", defaults=DEFAULTS, **more):
    return BackboneSpec(name="toy", kind=kind, defaults=defaults, builders={"torch": f"{__name__}:{attribute}"}, **more)


def test_every_counted_kind_by_hand():
    count = trace(toy(uncounted_norms=("qui*",)))
    assert count.breakdown == {
        ("conv", "conv"): 8 * 36 * 9,
        ("norm", "norm"): 8 * 36,
        ("linear", "linear"): 64,
        ("grouped", "conv"): 8 * 9 * 9 * 2,  # 9 cells, 2 channels a group
        ("up", "conv"): 8 * 9 * 4 * 4,
        ("", "attention"): 2 * 36 * 36 * 4 + 2 * 36 * 36 * 4,
    }
    assert count.flops == count.macs + 8 * 36
    assert count.params == sum(p.numel() for p in Toy(**DEFAULTS).parameters())
    assert trace(toy()).flops == count.flops + 36 * 4  # the quiet norm


def test_spec_without_a_closed_form_is_traced():
    assert toy().count() == trace(toy()) and toy().count().source == "traced"


def test_frozen_parameters_are_not_counted():
    class Frozen(Toy):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            self.label.requires_grad_(False)

    globals()["Frozen"] = Frozen
    assert trace(toy()).params - trace(toy("Frozen")).params == 4 * 8


def test_unknown_operator_is_an_error_that_names_it():
    with pytest.raises(RunError, match=r"'toy'.*aten::linalg_cholesky.*closed_form"):
        trace(toy("Strange"))


def test_fourier_transforms_and_complex_products_are_counted():
    count = trace(toy("Spectral"))
    transforms = [
        round(5 / 4 * 2 * 36 * math.log2(36)),  # real, of 36 values, 2 channels
        round(5 / 4 * 2 * 36 * math.log2(36)),  # back
        round(5 / 2 * 2 * 36 * math.log2(6)),  # complex, of 6 values
    ]
    assert [row.flops for row in count.rows if row.kind == "fft"] == transforms
    assert count.flops - sum(transforms) == 4 * 4 * 24  # 4 multiply-adds for each complex one


FREE_CALLS = {
    "top-k": lambda x: x.topk(2).values.sort().values,
    "scattered sums": lambda x: x.scatter_add(1, torch.zeros(x.shape, dtype=torch.int64, device=x.device), x),
    "prelu": lambda x: F.prelu(x, torch.ones(1, device=x.device)),
    "complex": lambda x: torch.polar(x, x).conj().angle(),
    "resampling": lambda x: F.interpolate(
        F.grid_sample(x, x[:, :2].permute(0, 2, 3, 1), align_corners=False).flatten(2), scale_factor=2.0
    ),
    "padding": lambda x: F.pad(x.flatten(2), (1, 1), mode="replicate"),
    "shuffled channels": lambda x: F.channel_shuffle(x, 2),
    "random numbers": lambda x: F.gumbel_softmax(x) + torch.empty_like(x).uniform_(),
}


@pytest.mark.parametrize("call", FREE_CALLS.values(), ids=FREE_CALLS)
def test_what_has_no_multiply_adds_is_free(call):
    counter = OperatorCounter("toy", ())
    with counter:
        call(torch.zeros(1, 4, 6, 6, device="meta"))
    assert counter.rows == []


def test_no_operator_is_both_counted_and_free():
    assert not FREE & set(COUNTED)


@pytest.mark.parametrize(
    ("kind", "defaults", "shapes"),
    [
        ("denoiser", DEFAULTS, [(1, 1, 6, 6), (1,), (1,)]),
        ("classifier", DEFAULTS, [(1, 1, 6, 6), (1,)]),
        ("upsampler", {"input_size": 8, "in_channels": 3}, [(1, 3, 8, 8), (1,), (1,), (1, 3, 2, 2)]),
        (
            "upsampler",
            {"input_size": 8, "in_channels": 3, "low_res_size": 4},
            [(1, 3, 8, 8), (1,), (1,), (1, 3, 4, 4)],
        ),
        ("generator", {}, [(1, 128), (1,)]),
        ("generator", {"latent_size": 5}, [(1, 5), (1,)]),
    ],
)
def test_every_kind_of_call(kind, defaults, shapes):
    trace(toy("Shape", kind, defaults))
    assert Shape.seen == shapes


def test_missing_argument_is_refused():
    with pytest.raises(UserError, match="input_size"):
        trace(toy("Shape", "denoiser", {"in_channels": 3}))


def test_count_depends_on_nothing_the_thread_has_set():
    spec = next(spec for spec in SPECS if spec.name == "dit-xs-4")
    plain = trace(spec)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.enable_grad():
        assert trace(spec) == plain
    torch.set_default_dtype(torch.float64)
    try:
        assert trace(spec) == plain
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    results = []
    with torch.inference_mode():
        assert trace(spec) == plain
    thread = threading.Thread(target=lambda: results.append(trace(spec)))
    thread.start()
    thread.join()
    assert results == [plain]


def test_tracing_draws_no_random_numbers():
    before = torch.get_rng_state()
    trace(next(spec for spec in SPECS if spec.name == "dit-xs-4"))
    trace(toy())
    assert torch.equal(torch.get_rng_state(), before)
