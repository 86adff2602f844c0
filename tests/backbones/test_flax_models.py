"""The Flax networks against the torch ones: outputs, gradients of the training loss, initial weights, names."""

import math
import zlib
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("flax", reason="JAX is not installed")

import jax
import jax.extend
import jax.numpy as jnp
from flax import nnx

from backbones import flax_layers
from backbones.dit.flax_model import LabelEmbedder
from backbones.dit.spec import BLOCKS
from backbones.flax_weights import from_torch, to_torch, torch_shapes
from harness.compute.meta_torch import build_on_meta
from harness.diffusion.objectives import OBJECTIVES
from harness.diffusion.schedule import Schedule
from harness.diffusion.training import TrainingObjective
from harness.engines.jax.resolve import inputs_of
from harness.engines.torch.loss import DenoisingLoss, LossTables
from harness.errors import UserError
from harness.protocols import Recipe
from harness.randomness import Purpose, bits
from harness.registry import backbones
from harness.spec import load_attribute

# Compiling is most of the time of these tests: LLVM does without optimisation.
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}

DIT = {"input_size": 8, "in_channels": 3, "num_classes": 7, "depth": 2, "width": 48, "heads": 4, "patch": 2}
UNET = {"input_size": 8, "num_classes": 7, "width": 32, "multipliers": (1, 2), "res_blocks": 1, "head_channels": 16}
ADM = {**UNET, "attention_resolutions": (8, 4), "dropout": 0.0}
LDM = {**UNET, "attention_rates": (2,), "context_width": 24}

# Two levels hold every kind of part: with and without attention, down, middle, up.
CASES = {
    **{f"dit, {block}": ("dit-xs-2", {**DIT, "block": block}) for block in BLOCKS},
    "adm, heads as of 64": ("adm-64", {**ADM, "width": 64, "multipliers": (0.5, 1)}),
    "adm, heads as of 256, no classes": ("adm-256", {**ADM, "num_classes": 0, "attention_resolutions": (4,)}),
    "upsampler": ("adm-u-64-256", {**ADM, "low_res_size": 3, "heads": 4, "head_channels": 0}),
    "classifier": ("adm-classifier-64", {**ADM, "attention_resolutions": (4,)}),
    "ldm-4": ("ldm-4", {**LDM, "heads": 1, "head_channels": 0}),
    "ldm-8": ("ldm-8", {**LDM, "attention_rates": (1,)}),
}


@pytest.fixture(autouse=True)
def exact_products_and_quick_compilation():
    with jax.default_matmul_precision("highest"):
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


def numbers(name, *shape):
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)


@torch.no_grad()
def drawn(net):
    """Fills every trained weight from its name. Feature maps are so small that the eps of normalisations matters."""
    for name, value in net.named_parameters():
        if not value.requires_grad:
            continue
        new = torch.from_numpy(numbers(name, *value.shape))
        if value.dim() > 1:
            sharp = any(part in name for part in ("qkv", "to_q", "to_k", ".q.", ".kv."))
            value.copy_(new * ((1.0 if sharp else 0.2) / math.sqrt(value[0].numel())))
        else:
            is_scale = name.endswith("weight")  # of a normalisation: every other vector is a bias
            value.copy_(0.2 * new + is_scale)
    return net


def abstract(name, overrides):
    return nnx.eval_shape(lambda: backbones.get(name).build("jax", **overrides))


def filled(name, overrides, torch_net):
    """The Flax network with the weights of the torch network."""
    net = abstract(name, overrides)
    state = from_torch(net, {key: value.numpy() for key, value in torch_net.state_dict().items()})
    nnx.update(net, jax.tree.map(jnp.asarray, state))
    return net


def run(function, *arguments):
    return jax.jit(function).lower(*arguments).compile(QUICK)(*arguments)


def batch(name, overrides, n=3):
    """Images, timesteps, labels, noise and the network's inputs besides x_t and t: numpy."""
    spec = backbones.get(name)
    arguments = spec.arguments(**overrides)
    shape = (n, arguments["in_channels"], arguments["input_size"], arguments["input_size"])
    x0, noise = np.clip(0.5 * numbers("images", *shape), -1, 1), numbers("noise", *shape)
    t = np.array([0, 31, 700], np.int64)
    # The last label is the null label where there is one.
    y = np.array([1, 4, 7 if spec.null_label else 6], np.int64)
    more = [] if spec.kind == "classifier" else [y]
    if spec.kind == "upsampler":
        more.append(numbers("low", n, arguments["in_channels"], *[arguments["low_res_size"]] * 2))
    return x0, t, y, noise, more


def jax_loss(objective, tables, output, x0, t, noise):
    """`harness.engines.torch.loss.DenoisingLoss.terms` in jax.numpy, summed up."""
    if not objective.learned_variance:
        return ((output - noise) ** 2).mean()

    def at(table):
        return jnp.asarray(table.numpy())[t][:, None, None, None]

    eps, v = jnp.split(output, 2, axis=1)
    low, high = at(tables.log_variance_low), at(tables.log_variance_high)
    log_variance = (v + 1) / 2 * high + (1 - v) / 2 * low
    centred = at(tables.mean_error_per_eps) * jax.lax.stop_gradient(eps - noise)
    kl = 0.5 * (-1 + log_variance - low + jnp.exp(low - log_variance) + centred**2 * jnp.exp(-log_variance))
    inverse = jnp.exp(-0.5 * log_variance)

    def cdf(x):
        return 0.5 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    upper, lower = cdf(inverse * (centred + 1 / 255)), cdf(inverse * (centred - 1 / 255))
    inside = jnp.log(jnp.maximum(upper - lower, 1e-12))
    edges = (jnp.log(jnp.maximum(upper, 1e-12)), jnp.log(jnp.maximum(1 - lower, 1e-12)))
    nll = -jnp.where(x0 < -0.999, edges[0], jnp.where(x0 > 0.999, edges[1], inside))
    vb = jnp.where((t == 0)[:, None, None, None], nll, kl) / math.log(2)
    return (((eps - noise) ** 2) + vb).mean()


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_of_the_training_loss_are_torchs(case):
    name, overrides = CASES[case]
    spec = backbones.get(name)
    x0, t, y, noise, more = batch(name, overrides)
    objective = OBJECTIVES["epsilon-fixed" if spec.family == "ldm" else "epsilon-learned-range"]
    denoising = DenoisingLoss(TrainingObjective.from_recipe(Recipe(objective=objective.name)))
    tables = LossTables(Schedule.named("linear"))

    torch_net = drawn(spec.build("torch", **overrides)).eval()
    given = [torch.from_numpy(each) for each in (x0, t, noise)]
    xt = denoising.noised(*given)
    expected = torch_net(xt, given[1], *(torch.from_numpy(each) for each in more))
    if spec.kind == "classifier":
        torch_loss = F.cross_entropy(expected, torch.from_numpy(y))
    else:
        torch_loss = sum(denoising.terms(expected, *given)).mean()
    torch_loss.backward()

    net = filled(name, overrides, torch_net)
    graph, params, rest = nnx.split(net, nnx.Param, ...)

    def loss(params, rest, xt, t, y, x0, noise, more):
        out = nnx.merge(graph, params, rest)(xt, t, *more)
        if spec.kind == "classifier":
            return -jnp.take_along_axis(jax.nn.log_softmax(out), y[:, None], 1).mean(), out
        return jax_loss(objective, tables, out, x0, t, noise), out

    arrays = jax.tree.map(jnp.asarray, (xt.numpy(), t.astype(np.int32), y.astype(np.int32), x0, noise, more))
    (value, out), gradients = run(jax.value_and_grad(loss, has_aux=True), params, rest, *arrays)
    expected = expected.detach().numpy()
    assert np.std(expected) > 0.05  # no comparison of zeros
    assert np.abs(out - expected).max() < 1e-5 * np.abs(expected).max()
    assert value == pytest.approx(torch_loss.item(), rel=1e-5)

    nnx.update(net, gradients)  # for their names
    found = to_torch(net)
    theirs = {key: p.grad.numpy() for key, p in torch_net.named_parameters() if p.requires_grad}
    scale = math.sqrt(sum(float((g**2).sum()) for g in theirs.values()))
    for key, gradient in theirs.items():
        # What is 0 but for rounding is compared with the gradient of the whole network.
        least = 1e-6 * scale if np.linalg.norm(gradient) < 1e-5 * scale else 0
        assert np.linalg.norm(found[key] - gradient) <= 1e-4 * np.linalg.norm(gradient) + least, key


# ---------------------------------------------------------------------------------------------------- initial weights

INITIAL = {
    **{f"dit, {block}": ("dit-xs-4", {"depth": 2, "width": 96, "block": block}) for block in BLOCKS},
    "adm": ("adm-xs", {**UNET, "multipliers": (1,)}),
    "classifier": ("adm-classifier-xs", {**UNET, "multipliers": (1,)}),
    "ldm": ("ldm-xs", {**LDM, "multipliers": (1, 1)}),
}


def initial(name, overrides, seed=0):
    """Initial weights under torch's names."""

    spec = backbones.get(name)
    builder = load_attribute(spec.builders["jax"], name)
    return to_torch(builder(**spec.arguments(**overrides), rngs=flax_layers.initial_rngs(seed)))


@pytest.mark.parametrize("case", INITIAL)
def test_initial_weights_are_distributed_as_torchs(case):
    """Zeros and ones where torch has them; elsewhere mean, spread and distribution within 5 standard errors."""
    name, overrides = INITIAL[case]
    torch.manual_seed(0)
    theirs = {key: p.detach().numpy() for key, p in backbones.get(name).build("torch", **overrides).named_parameters()}
    ours = initial(name, overrides)
    assert list(ours) and set(ours) == set(theirs)
    drawn_groups = {}
    for key, a in theirs.items():
        b = ours[key]
        assert a.shape == b.shape and b.dtype == np.float32, key
        if key == "pos_embed" or (a == a.flat[0]).all():
            np.testing.assert_array_equal(b, a, err_msg=key)
            continue
        assert abs(b.mean()) < 5 * a.std() / math.sqrt(a.size), key
        assert abs(b.std() / a.std() - 1) < 5 / math.sqrt(a.size), key
        if a.size > 1000:  # uniform within +-1.73 standard deviations, or normal
            assert (np.abs(b).max() < 1.8 * b.std()) == (np.abs(a).max() < 1.8 * a.std()), key
        drawn_groups.setdefault(a.shape, []).append(b)
    for group in drawn_groups.values():  # no two parameters are drawn from one key
        assert len({each.tobytes() for each in group}) == len(group)


def test_initial_weights_come_from_our_seed():
    words = bits(7, Purpose.INITIALISATION, np.zeros(1, np.int64), 0, 2)[0]
    key = flax_layers.initial_rngs(7).params.key[...]
    np.testing.assert_array_equal(jax.random.key_data(key), words)
    assert jax.random.key_impl(key) == "threefry2x32"
    make = LabelEmbedder(9, 16, flax_layers.initial_rngs(7)).embedding_table.embedding
    again = LabelEmbedder(9, 16, flax_layers.initial_rngs(7)).embedding_table.embedding
    other = LabelEmbedder(9, 16, flax_layers.initial_rngs(8)).embedding_table.embedding
    np.testing.assert_array_equal(make[...], again[...])
    assert (np.asarray(make[...]) != np.asarray(other[...])).all()


# --------------------------------------------------------------------------------------------------- names and shapes


def with_jax():
    return [name for name in backbones.names() if "jax" in backbones.get(name).builders]


def names_and_shapes(name):
    spec = backbones.get(name)
    state = build_on_meta(spec, {}).state_dict()
    net = nnx.eval_shape(lambda: spec.build("jax"))
    assert torch_shapes(net) == {key: tuple(value.shape) for key, value in state.items()}, name
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(net))} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", [f"dit-xs-4{suffix}" for suffix in ("", *[f"-{b}" for b in BLOCKS[1:]])] + ["ldm-xs"])
def test_names_and_shapes_are_torchs(name):
    names_and_shapes(name)


@pytest.mark.slow
def test_names_and_shapes_are_torchs_for_every_network():
    assert len(with_jax()) >= 70
    for name in with_jax():
        names_and_shapes(name)


def test_every_denoiser_upsampler_and_classifier_is_built_for_jax():
    own = [name for name in backbones.names() if backbones.owner(name) == "backbone-harness"]
    assert {name for name in own if backbones.get(name).kind != "generator"} <= set(with_jax())


def test_weights_that_do_not_fit_are_refused():
    overrides = {**DIT, "depth": 1}
    net = abstract("dit-xs-2", overrides)
    weights = {key: np.zeros(shape, np.float32) for key, shape in torch_shapes(net).items()}
    from_torch(net, weights)
    for wrong, match in (
        ({**weights, "blocks.1.mlp.fc1.bias": np.zeros(3)}, "have 'blocks.1.mlp.fc1.bias'"),
        ({key: value for key, value in weights.items() if key != "pos_embed"}, "'pos_embed' is missing"),
        ({**weights, "pos_embed": np.zeros((1, 4, 48))}, r"'pos_embed' has shape \(1, 4, 48\).*\(1, 16, 48\)"),
        ({**weights, "blocks.0.attn.qkv.weight": np.zeros((48, 144))}, r"has shape \(48, 144\).*\(144, 48\)"),
    ):
        with pytest.raises(UserError, match=match):
            from_torch(net, wrong)


def test_weights_go_to_torch_and_back():
    overrides = CASES["classifier"][1]
    theirs = drawn(backbones.get("adm-classifier-64").build("torch", **overrides)).state_dict()
    ours = to_torch(
        filled("adm-classifier-64", overrides, backbones.get("adm-classifier-64").build("torch", **overrides))
    )
    assert sorted(ours) == sorted(theirs)
    net = abstract("adm-classifier-64", overrides)
    nnx.update(net, from_torch(net, {key: value.numpy() for key, value in theirs.items()}))
    for key, value in to_torch(net).items():
        np.testing.assert_array_equal(value, theirs[key], err_msg=key)
        assert value.flags.c_contiguous


# -------------------------------------------------------------------------------------------------- what training needs


def test_positions_are_kept_but_not_trained():
    net = abstract("dit-xs-2", DIT)
    assert ("pos_embed",) not in [path for path, _ in nnx.to_flat_state(nnx.state(net, nnx.Param))]
    assert isinstance(net.pos_embed, flax_layers.Frozen) and "pos_embed" in torch_shapes(net)


def live(name, overrides):
    torch.manual_seed(0)
    return filled(name, overrides, drawn(backbones.get(name).build("torch", **overrides)))


@pytest.mark.parametrize("case", ["dit", "classifier"])
def test_checkpointing_and_dropout(case):
    """A recomputed block gives the same gradients, with the same dropout; without rngs there is no dropout."""
    unet = {**ADM, "multipliers": (1,), "dropout": 0.3, "attention_resolutions": ()}
    name, overrides = ("dit-xs-2", {**DIT, "depth": 1}) if case == "dit" else ("adm-classifier-64", unet)
    x0, t, _, _, more = batch(name, overrides)
    given = jax.tree.map(jnp.asarray, (x0, t, *more))
    results = {}
    for checkpointing in (False, True):
        net = live(name, {**overrides, "gradient_checkpointing": checkpointing})
        graph, params, rest = nnx.split(net, nnx.Param, ...)

        def loss(params, rest, key, graph=graph):
            net = nnx.merge(graph, params, rest)
            rngs = None if key is None else nnx.Rngs(dropout=key)
            return (net(*given, rngs=rngs) ** 2).mean()

        gradient = jax.value_and_grad(loss)
        key = jax.random.key(1)
        traced = jax.jit(gradient).trace(params, rest, key)
        assert ("remat" in str(traced.jaxpr)) == checkpointing
        compiled = traced.lower().compile(QUICK)
        results[checkpointing] = compiled(params, rest, key)
        if checkpointing and case == "classifier":
            assert compiled(params, rest, jax.random.key(2))[0] != results[True][0]
            without = run(partial(loss, graph=graph), params, rest, None)
            assert without != results[True][0]
    for a, b in zip(*map(jax.tree.leaves, results.values()), strict=True):
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(a) + 1e-6


@pytest.mark.parametrize("case", ["dit, adaln-zero", "ldm-4"])
def test_bfloat16_is_near_float32_and_embeds_the_timestep_in_float32(case):
    name, overrides = CASES[case]
    overrides = {
        **overrides,
        **({"depth": 1} if case.startswith("dit") else {"multipliers": (1,), "attention_rates": (1,)}),
    }
    net = live(name, overrides)
    x0, t, _, _, more = batch(name, overrides)
    given = jax.tree.map(jnp.asarray, (x0, t, *more))

    def outputs(dtype):
        flax_layers.set_compute_dtype(net, dtype)
        graph, state = nnx.split(net)
        return run(lambda state, given: nnx.merge(graph, state)(*given), state, given)

    exact, out = outputs(None), outputs(jnp.bfloat16)
    assert exact.dtype == jnp.float32 and out.dtype == jnp.bfloat16
    error = np.linalg.norm(out.astype(jnp.float32) - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 0.03
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(net))} == {jnp.dtype("float32")}
    unet = net.model["diffusion_model"] if name.startswith("ldm") else net
    embedded = net.t_embedder(jnp.asarray(t)) if name.startswith("dit") else unet.embed(jnp.asarray(t))
    assert embedded.dtype == jnp.float32
    flax_layers.set_compute_dtype(net, None)
    again = net.t_embedder(jnp.asarray(t)) if name.startswith("dit") else unet.embed(jnp.asarray(t))
    np.testing.assert_array_equal(embedded, again)


# --------------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("case", ["dit, adaln-zero", "adm, heads as of 64", "classifier", "ldm-4"])
def test_what_is_float32_beside_bfloat16_is_multiplied_exactly(case):
    """By default, GPUs and TPUs multiply float32 with lower precision, and a bfloat16 run does not change this."""
    with jax.default_matmul_precision(None):
        name, arguments = CASES[case]
        spec = backbones.get(name)
        net = nnx.eval_shape(lambda: spec.build("jax", **arguments))
        flax_layers.set_compute_dtype(net, jnp.bfloat16)
        graph, state = nnx.split(net)
        shapes = inputs_of(spec.kind, 2, spec.arguments(**arguments))
        traced = jax.make_jaxpr(lambda state, *inputs: nnx.merge(graph, state)(*inputs))(state, *shapes)
    exactly = (jax.lax.Precision.HIGHEST,) * 2
    products = [
        each for each in equations(traced.jaxpr) if each.primitive.name in ("dot_general", "conv_general_dilated")
    ]
    full = [each for each in products if all(operand.aval.dtype == jnp.float32 for operand in each.invars)]
    assert len(full) == 2 < len(products)  # the two layers of the timestep's embedding
    assert all(each.params["precision"] == exactly for each in full)


def equations(jaxpr):
    """All equations of a jaxpr and of the jaxprs inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


def test_a_label_that_does_not_exist_gives_nan():
    table = LabelEmbedder(7, 4, nnx.Rngs(0))
    assert np.isfinite(table(jnp.array([0, 7]))).all() and np.isnan(table(jnp.array([8]))).all()


@pytest.mark.parametrize("case", ["dit, adaln-zero", "upsampler", "classifier", "ldm-4"])
def test_arguments_and_inputs_that_do_not_fit_are_refused(case):
    name, overrides = CASES[case]
    if "multipliers" in overrides:
        overrides = {**overrides, "multipliers": (1,)}
    with pytest.raises(UserError, match="input_size 7"):
        backbones.get(name).build("jax", **{**CASES[case][1], "input_size": 7})
    net = abstract(name, overrides)
    _, t, _, _, more = batch(name, overrides)
    with pytest.raises(UserError, match=r"input of shape \(3, 3, 8, 16\).*\(N, 3, 8, 8\)"):
        net(jnp.zeros((3, 3, 8, 16)), t, *more)
