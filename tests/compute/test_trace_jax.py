"""The tracer of Flax networks: every counted primitive, no silent zero, and the closed form to the last flop."""

import math
from dataclasses import replace

import pytest

pytest.importorskip("flax", reason="JAX is not installed")

import jax
import jax.numpy as jnp
from flax import nnx

from harness.compute.trace_jax import COUNTED, FREE, abstract_forward, trace
from harness.compute.trace_torch import trace as trace_torch
from harness.errors import RunError, UserError
from harness.registry import backbones
from harness.spec import BackboneSpec


class Toy(nnx.Module):
    """One of everything that the convention counts."""

    def __init__(self, *, input_size, in_channels, num_classes, out_channels):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(in_channels, 8, (3, 3), rngs=rngs)
        self.grouped = nnx.Conv(8, 8, (3, 3), strides=2, feature_group_count=4, rngs=rngs)
        self.up = nnx.ConvTranspose(8, 4, (2, 2), strides=(2, 2), rngs=rngs)
        self.norm = nnx.GroupNorm(8, 2, rngs=rngs)
        self.quiet = nnx.LayerNorm(4, rngs=rngs)
        self.label = nnx.Embed(num_classes + 1, 8, rngs=rngs)
        self.linear = nnx.Linear(8, 8, use_bias=False, rngs=rngs)
        self.kept = nnx.Variable(jnp.zeros(5))

    def __call__(self, x, t, y):
        h = self.norm(self.conv(x.transpose(0, 2, 3, 1)))  # (1, 6, 6, 8)
        h = h + self.linear(self.label(y))[:, None, None]
        h = self.up(jax.nn.silu(self.grouped(h)))  # (1, 6, 6, 4)
        tokens = self.quiet(h.reshape(1, 36, 4))  # (1, 36, 4)
        scores = jax.nn.softmax(jnp.einsum("nic,njc->nij", tokens, tokens))
        q = jnp.einsum("nij,njc->nic", scores, tokens)[:, :, None]  # (1, 36, 1, 4)
        out = jax.nn.dot_product_attention(q, q, q)  # (1, 36, 1, 4)
        return out.reshape(1, 6, 6, 4)[..., :2].transpose(0, 3, 1, 2)


class Called(nnx.Module):
    """A linear layer, called as `how` says."""

    how: str

    def __init__(self, **arguments):
        self.linear = nnx.Linear(6, 6, rngs=nnx.Rngs(0))

    def __call__(self, x, t, y):
        def step(x):
            return self.linear(x)

        if self.how == "scan":
            return jax.lax.scan(lambda x, _: (step(x), None), x, None, length=5)[0]
        if self.how == "while":
            return jax.lax.while_loop(lambda x: x.sum() < 0, step, x)
        if self.how == "cond":
            return jax.lax.cond(t[0] > 0, step, lambda x: x, x)
        if self.how == "same cond":
            return jax.lax.cond(t[0] > 0, step, lambda x: step(x) + 1, x)
        if self.how == "jit and remat":
            return jax.checkpoint(jax.jit(step))(x)
        if self.how == "cholesky":
            return jnp.linalg.cholesky(step(x))
        if self.how == "qr":
            return jnp.linalg.qr(step(x))[0]
        if self.how == "sort":
            return jnp.sort(step(x)) + jax.lax.top_k(x, 2)[0][..., :1] + jnp.zeros(x.shape).at[0, 0, t].add(x[0, 0, t])
        return step(x)


class Spectral(nnx.Module):
    """Mixes the tokens in the Fourier domain, with a complex matrix for each frequency."""

    def __init__(self, **arguments):
        self.weight = nnx.Param(jnp.ones((2, 2, 6, 4), jnp.complex64))

    def __call__(self, x, t, y):
        spectrum = jnp.fft.rfft2(jnp.concatenate([x, x], 1))  # (1, 2, 6, 4), complex
        out = jnp.fft.irfft2(jnp.einsum("nihw,iohw->nohw", spectrum.conj(), self.weight[...]), s=(6, 6))
        return jnp.fft.ifft(out + 1j * out, axis=2).real


class Twice(nnx.LayerNorm):
    """A normalisation that calls its superclass."""

    def __call__(self, x):
        return super().__call__(x) * 2


class Derived(nnx.Module):
    def __init__(self, **arguments):
        self.norms = nnx.List([Twice(6, rngs=nnx.Rngs(0)), nnx.RMSNorm(6, rngs=nnx.Rngs(0))])

    def __call__(self, x, t, y):
        return self.norms[1](self.norms[0](x))


class Shape(nnx.Module):
    """Records the shapes of its inputs."""

    seen: list = []

    def __init__(self, **arguments):
        pass

    def __call__(self, *inputs):
        Shape.seen = [each.shape for each in inputs]
        return inputs[0] * 2


DEFAULTS = {"input_size": 6, "in_channels": 1, "num_classes": 3, "out_channels": 2}


def toy(kind_of=Toy, kind="denoiser", defaults=DEFAULTS, **more):
    globals()["built"] = kind_of
    return BackboneSpec(name="toy", kind=kind, defaults=defaults, builders={"jax": f"{__name__}:built"}, **more)


def called(how):
    return toy(type("Called", (Called,), {"how": how}))


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
    kinds = (8 * 9 + 8) + (8 * 2 * 9 + 8) + (4 * 8 * 4 + 4) + 16 + 8 + 4 * 8 + 64
    assert count.params == kinds and count.source == "traced"  # without the 5 that are no parameters
    assert trace(toy()).flops == count.flops + 36 * 4  # the quiet norm


@pytest.mark.parametrize(("how", "times"), [("", 1), ("scan", 5), ("jit and remat", 1), ("same cond", 1), ("sort", 1)])
def test_what_is_run_inside_is_counted(how, times):
    assert trace(called(how)).flops == times * 6 * 6 * 6


@pytest.mark.parametrize(
    ("how", "what"),
    [("cholesky", "primitive cholesky"), ("qr", "householder|qr"), ("while", "while_loop"), ("cond", "branches")],
)
def test_unknown_arithmetic_is_an_error_that_names_it(how, what):
    with pytest.raises(RunError, match=rf"'toy'.*{what}.*closed_form") as failure:
        trace(called(how))
    assert "\n" not in str(failure.value)


def test_fourier_transforms_and_complex_products_are_counted():
    count = trace(toy(Spectral))
    transforms = [
        round(5 / 4 * 2 * 36 * math.log2(36)),  # real, of 36 values, 2 channels
        round(5 / 4 * 2 * 36 * math.log2(36)),  # back
        round(5 / 2 * 2 * 36 * math.log2(6)),  # complex, of 6 values
    ]
    assert [row.flops for row in count.rows if row.kind == "fft"] == transforms
    assert count.flops - sum(transforms) == 4 * 4 * 24  # 4 multiply-adds for each complex one


def test_a_derived_normalisation_is_counted_once():
    assert trace(toy(Derived)).breakdown == {("norms.0", "norm"): 36, ("norms.1", "norm"): 36}


def test_tracing_leaves_no_mark():
    before = nnx.LayerNorm.__call__
    trace(toy())
    assert nnx.LayerNorm.__call__ is before
    with pytest.raises(RunError):
        trace(called("qr"))
    net = Derived()
    assert "harness" not in str(jax.make_jaxpr(lambda x: net(x, None, None))(jnp.zeros((1, 6))))


def test_no_primitive_is_both_counted_and_free():
    assert not FREE & set(COUNTED)


@pytest.mark.parametrize(
    ("kind", "defaults", "shapes"),
    [
        ("denoiser", DEFAULTS, [(1, 1, 6, 6), (1,), (1,)]),
        ("classifier", DEFAULTS, [(1, 1, 6, 6), (1,)]),
        ("upsampler", {"input_size": 8, "in_channels": 3}, [(1, 3, 8, 8), (1,), (1,), (1, 3, 2, 2)]),
        ("generator", {"latent_size": 5}, [(1, 5), (1,)]),
    ],
)
def test_every_kind_of_call(kind, defaults, shapes):
    trace(toy(Shape, kind, defaults))
    assert Shape.seen == shapes


def test_missing_argument_is_refused():
    with pytest.raises(UserError, match="input_size"):
        trace(toy(Shape, "denoiser", {"in_channels": 3}))


NETWORKS = ["dit-xs-2", "dit-xs-4-in-context", "dit-xs-4-cross-attention", "dit-xs-4-adaln"]
NETWORKS += ["adm-xs", "adm-u-xs", "adm-classifier-xs", "ldm-xs"]


def agree(name, **overrides):
    """Count of the Flax network, closed form, count of the torch network; the shape of the output."""
    spec = backbones.get(name)
    traced, closed = trace(spec, **overrides), spec.count(**overrides)
    assert traced.breakdown == closed.breakdown == trace_torch(spec, **overrides).breakdown, name
    assert traced.flops == closed.flops and traced.params == closed.params, name
    return traced


@pytest.mark.parametrize("name", NETWORKS)
def test_the_flax_network_costs_what_the_closed_form_says(name):
    agree(name)


def test_gradient_checkpointing_and_missing_classes():
    spec = backbones.get("dit-xs-4")
    assert trace(spec, depth=1, gradient_checkpointing=True) == trace(spec, depth=1)
    assert agree("adm-xs", num_classes=0).params < backbones.get("adm-xs").count().params


def test_the_paper():
    assert round(trace(backbones.get("dit-xl-2")).gflops, 2) == 118.64  # arXiv:2212.09748, Table 1


def test_a_backbone_without_a_flax_network_is_refused():
    spec = replace(backbones.get("dit-xs-2"), builders={"torch": "backbones.dit.torch_model:DiT"})
    with pytest.raises(UserError, match="not implemented for 'jax'"):
        trace(spec)


@pytest.mark.slow
def test_every_network_at_full_size():
    names = [name for name in backbones.names() if "jax" in backbones.get(name).builders]
    assert len(names) >= 70
    for name in names:
        agree(name)
        spec = backbones.get(name)
        given = spec.arguments()
        channels = given["in_channels"] * (1 if spec.family == "ldm" else 2)
        shape = (1, channels, given["input_size"], given["input_size"])
        _, _, out = abstract_forward(spec)
        assert out.shape == ((1, given["num_classes"]) if spec.kind == "classifier" else shape), name
        assert out.dtype == jnp.float32


def test_a_primitive_counts_as_declared(monkeypatch):
    from jax.extend.core import Primitive

    from harness.compute import custom, register_flops
    from harness.compute.trace_jax import trace_and_doubt

    monkeypatch.setattr(custom, "_declared", {})
    scan = Primitive("scan_of_a_test")
    scan.def_abstract_eval(lambda x, *, states: x)

    class Scan(nnx.Module):
        def __init__(self, **arguments):
            self.weight = nnx.Param(jnp.ones((3, 3)))

        def __call__(self, x, t, y):
            x = jax.lax.map(lambda row: (row[..., None] * self.weight[0]).sum(-1), x)  # element by element, summed
            return scan.bind(x, states=4)

    spec = toy(Scan)
    size = DEFAULTS["input_size"] ** 2
    with pytest.raises(RunError, match="primitive scan_of_a_test .* harness.compute.register_flops"):
        trace(spec)
    register_flops(scan, lambda x, *, states: x.size * states)
    assert trace(spec).flops == 4 * size
    register_flops(scan, lambda x, *, states: 7, composed=lambda x, *, states: x[..., None] @ jnp.ones((1, states)))
    compute, blind = trace_and_doubt(spec)
    assert blind.declared == [("primitive scan_of_a_test", 7, 4 * size, 0.0)]
    assert sum(blind.summed.values()) == 3 * size
