"""The BigGAN-deep generators: goldens of the public code, names, compute, and properties.

The goldens marked "public" were computed with pytorch-pretrained-biggan 0.1.1 from PyPI in torch 2.13.0 on a CPU. It is
no test dependency, for importing it needs boto3, requests and tqdm; its model.py and config.py alone do not. To make
them again: build its BigGAN with the configuration of that resolution from its convert_tf_to_pytorch.py and with what
`SMALL` says (its names: channel_width, z_dim, num_classes); load `drawn(net.state_dict())` with strict=True after
`.double()`, put it in evaluation mode, and call it on `inputs()` with the labels one-hot. Its gradients are what
`gradients(net, lambda z: net(z, one_hot, 1.0))` gives; ours differ by at most 1e-13 of each.
"""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn.utils import spectral_norm

from backbones.biggan.spec import SPECS
from backbones.biggan.torch_model import Spectral, SpectralConv2d, SpectralLinear, StandingNorm
from harness.compute.trace_torch import trace
from harness.errors import UserError

BY_SIZE = {spec.defaults["input_size"]: spec for spec in SPECS}
SMALL = {"width": 8, "latent_size": 16, "num_classes": 10}
TINY = {
    "input_size": 16,
    "width": 4,
    "latent_size": 5,
    "num_classes": 7,
    "blocks": [(0, 16, 8), (1, 8, 4), (0, 4, 2), (1, 2, 1)],
    "attention": 2,
}


def drawn(state):
    """A state dict of that form from numpy's generator; u and v are two steps of a power iteration apart from ones."""
    random = np.random.RandomState(0)
    values = {}
    for name in sorted(state):
        if name.endswith(("weight_u", "weight_v")):
            continue
        value = random.standard_normal(tuple(state[name].shape))
        if name.endswith("running_vars"):
            value = np.exp(0.3 * value)
        elif name.endswith("running_means"):
            value = 0.3 * value
        elif name == "generator.bn.weight":
            value = 1 + 0.2 * value
        elif name.endswith("bias"):
            value = 0.2 * value
        elif name.endswith("weight_orig"):
            matrix, u = value.reshape(len(value), -1), np.ones(len(value))
            for _ in range(2):
                v = matrix.T @ u
                v /= np.linalg.norm(v)
                u = matrix @ v
                u /= np.linalg.norm(u)
            values |= {name.removesuffix("orig") + "u": u, name.removesuffix("orig") + "v": v}
        values[name] = value
    return {name: torch.from_numpy(np.ascontiguousarray(value)).to(state[name]) for name, value in values.items()}


def inputs(images=2, latent_size=16):
    z = np.random.RandomState(1).standard_normal((images, latent_size))
    return torch.from_numpy(z), torch.tensor([3, 9])[:images]


def filled(size, dtype=torch.float64, **overrides):
    net = BY_SIZE[size].build(**{**SMALL, **overrides}).to(dtype).eval()
    net.load_state_dict(drawn(net.state_dict()), strict=True)
    return net


def tiny(dtype=torch.float32):
    torch.manual_seed(0)
    net = BY_SIZE[128].build(**TINY).to(dtype)
    net.load_state_dict(drawn(net.state_dict()), strict=True)
    return net


# Public: by pixels, entries of the state dict, its numbers altogether, SHA-256 of its sorted names and shapes.
PUBLIC_STATE = {
    128: (506, 52_687_425, "903d386b52b46a8f93b53f1fee5f2d464de5f5673251d68ba141574c318e07bb"),
    256: (602, 58_573_185, "b433f579e9870f54f51f4ab9f2a44bc404118faa000649b75eeeeb2a1bf2f718"),
    512: (698, 58_908_865, "544657e61641fd5bc7086a43644e948ae0fd7024458c3f2f71f4431a2d8f5c2e"),
}


@pytest.mark.parametrize("size", PUBLIC_STATE)
def test_state_dict_is_that_of_the_public_network(size):
    with torch.device("meta"):
        state = BY_SIZE[size].build().state_dict()
    lines = [f"{name} {'x'.join(map(str, value.shape))}" for name, value in sorted(state.items())]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert (len(lines), sum(value.numel() for value in state.values()), digest) == PUBLIC_STATE[size]
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert {  # names that the published weight files have
        "embeddings.weight 128x1000",
        "generator.gen_z.weight_orig 32768x256",
        "generator.layers.0.bn_0.running_means 51x2048",
        "generator.layers.0.bn_0.scale.weight_u 2048",
        "generator.layers.8.gamma 1",
        "generator.conv_to_rgb.weight_orig 128x128x3x3",
    } <= set(lines)


# Public: mean, standard deviation, three pixels of the first row, and the colours of one pixel of the second image.
# fmt: off
PUBLIC_IMAGES = {
    (128, 1.0): (
        0.117155733852, 0.394648518946,
        [-0.232021436465, -0.347275455949, -0.380191336604],
        [-0.172589080279, -0.057669943935, 0.357485200003],
    ),
    (128, 0.7): (
        0.067865506230, 0.495634580297,
        [-0.612083805728, -0.573464581902, -0.602849120524],
        [-0.279853188060, 0.136563582701, 0.413135524947],
    ),
    (128, 0.58): (
        0.093861389766, 0.400686299003,
        [0.082525831801, -0.262603956480, -0.369856410064],
        [-0.183210659239, -0.171088904547, 0.529855483789],
    ),
    (128, 0.4): (
        0.155953630557, 0.465507888931,
        [-0.171103401889, -0.497984856194, -0.530579842858],
        [-0.150588946033, 0.287644692458, 0.326971849509],
    ),
    (128, 0.375): (
        0.073627331564, 0.394502592247,
        [-0.090151821561, -0.470090208839, -0.513959900945],
        [-0.280053413505, -0.057947307323, 0.299271747596],
    ),
    (256, 1.0): (
        0.178647093105, 0.531920202331,
        [-0.385859340798, -0.544077568373, -0.639218278462],
        [0.022566689685, -0.014763378785, 0.790670320273],
    ),
    (256, 0.375): (
        0.177041648432, 0.503829146754,
        [-0.557345182290, -0.513021532719, -0.510407598480],
        [-0.026941259109, -0.022789713733, 0.703928942672],
    ),
    (512, 1.0): (
        0.568140962183, 0.468804185567,
        [-0.305456056008, -0.248159190224, -0.151227950156],
        [0.100943349366, -0.155503297331, 0.986911429729],
    ),
    (512, 0.375): (
        0.522790640166, 0.480563735960,
        [-0.620592608427, -0.505884630980, -0.482880311442],
        [0.143441727024, -0.087410658137, 0.959367361082],
    ),
}
# fmt: on


def assert_golden(out, golden, size, tolerance):
    mean, std, row, pixel = golden
    assert out.shape == (2, 3, size, size)
    assert out.mean().item() == pytest.approx(mean, abs=tolerance)
    assert out.std().item() == pytest.approx(std, abs=tolerance)
    np.testing.assert_allclose(out[0, 0, 0, :3], row, rtol=0, atol=tolerance)
    np.testing.assert_allclose(out[1, :, size // 2, size // 4], pixel, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("size", "truncation"), PUBLIC_IMAGES)
def test_images_are_those_of_the_public_network(size, truncation):
    net, (z, y) = filled(size), inputs()
    with torch.no_grad():
        out = net(z, y) if truncation == 1 else net(z, y, truncation)
    assert_golden(out, PUBLIC_IMAGES[size, truncation], size, 1e-10)


# Public, at truncation 1: gradients of the images weighted by normal numbers, each gradient along a normal direction: of
# the latent, of all parameters together, and of some (`GRADIENTS_OF`).
GRADIENTS_OF = (
    "embeddings.weight",
    "generator.gen_z.weight_orig",
    "generator.layers.0.bn_0.scale.weight_orig",
    "generator.layers.8.snconv1x1_theta.weight_orig",
    "generator.layers.8.gamma",
    "generator.conv_to_rgb.weight_orig",
)
# fmt: off
PUBLIC_GRADIENTS = {
    128: [44.0781142457, -212.570559842, 120.897641071, -9.404875871, 0.44401315912, 1.94565190152, -2.42234997317, -275.714948185],
    256: [-202.919006501, -1779.62783401, -146.381732022, -1.45725513689, -0.378744844996, -1.57438744207, -15.110873533, -1831.71160324],
    512: [-179.183224013, 2620.43712389, 185.630397718, 20.7662370405, 3.46354753725, -24.3647583155, 1.73316579915, -1600.7065012],
}
# fmt: on


def gradients(net, call):
    """The numbers of PUBLIC_GRADIENTS. `call` takes the latent."""
    z = inputs()[0].requires_grad_()
    out = call(z)
    (out * torch.from_numpy(np.random.RandomState(2).standard_normal(tuple(out.shape)))).sum().backward()
    random, along = np.random.RandomState(3), {}
    for name, parameter in sorted(net.named_parameters()):
        direction = torch.from_numpy(random.standard_normal(tuple(parameter.shape)))
        along[name] = (parameter.grad * direction).sum().item()
    latent = (z.grad * torch.from_numpy(random.standard_normal(tuple(z.shape)))).sum().item()
    return [latent, sum(along.values()), *(along[name] for name in GRADIENTS_OF)]


@pytest.mark.parametrize("size", PUBLIC_GRADIENTS)
def test_gradients_are_those_of_the_public_network(size):
    net, (_, y) = filled(size), inputs()
    assert gradients(net, lambda z: net(z, y)) == pytest.approx(PUBLIC_GRADIENTS[size], rel=1e-9)


def test_images_in_float32_and_bfloat16():
    net, (z, y) = filled(128, torch.float32), inputs()
    with torch.no_grad():
        exact = net(z.float(), y, 0.7)
        assert exact.dtype == torch.float32
        assert_golden(exact, PUBLIC_IMAGES[128, 0.7], 128, 1e-5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = net(z.float(), y, 0.7)
    assert not torch.equal(rounded.float(), exact)
    assert (rounded.float() - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize(
    ("truncation", "row"),
    [
        (1.0, 50),
        (0.5, 25),
        (0.02, 1),
        (0.375, 0.75 * 18 + 0.25 * 19),  # 18.75 steps: the nearer row, 19, gets the smaller weight
        (0.7, 35),
        (0.58, 28),  # 0.58 / 0.02 is 28.999999999999996, and the weights are swapped
        (0.14, 8),  # 7.000000000000001
        (0.005, 0.25 * 0 + 0.75 * 1),
        (0.999, 0.95 * 49 + 0.05 * 50),
    ],
)
def test_truncation_selects_the_standing_statistics(truncation, row):
    norm = StandingNorm(2).double()
    norm.running_means.copy_(torch.arange(51.0).unsqueeze(1) * torch.tensor([1.0, 2.0]))
    norm.running_vars.copy_(1000 - norm.running_means)
    mean, variance = norm.statistics(truncation)
    np.testing.assert_allclose(mean, [row, 2 * row], atol=1e-9)
    np.testing.assert_allclose(variance, [1000 - row, 1000 - 2 * row], atol=1e-9)


def test_weights_are_divided_as_torch_does_in_evaluation_mode():
    torch.manual_seed(0)
    pairs = [
        (SpectralConv2d(6, 4, 3), spectral_norm(torch.nn.Conv2d(6, 4, 3, padding=1)), torch.randn(2, 6, 5, 5)),
        (SpectralConv2d(6, 4, 1), spectral_norm(torch.nn.Conv2d(6, 4, 1)), torch.randn(2, 6, 5, 5)),
        (SpectralLinear(6, 4, bias=True), spectral_norm(torch.nn.Linear(6, 4)), torch.randn(2, 6)),
    ]
    for ours, theirs, x in pairs:
        theirs(x)  # a step of the power iteration
        theirs.eval()
        ours.load_state_dict(theirs.state_dict(), strict=True)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_training_mode_changes_nothing():
    net = tiny().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    z, y = torch.randn(3, 5), torch.tensor([0, 6, 2])
    out = net(z, y, 0.5)
    out.square().sum().backward()
    assert all(parameter.grad.any() for parameter in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(net.eval()(z, y, 0.5), out)


def test_a_new_network_has_weights_of_spectral_norm_1():
    torch.manual_seed(0)
    net = BY_SIZE[128].build(**TINY)
    layers = [module for module in net.modules() if isinstance(module, Spectral)]
    assert len(layers) == 1 + 4 * 12 + 4 + 1
    for layer in layers:
        assert torch.linalg.matrix_norm(layer.weight().flatten(1), 2).item() == pytest.approx(1, abs=1e-4)
    with torch.no_grad():
        out = net(torch.randn(4, 5), torch.arange(4))
    assert out.isfinite().all() and (out.amax(0) - out.amin(0)).max() > 0.01


def test_latent_and_label_matter_and_images_do_not_know_each_other():
    net = tiny(torch.float64)
    z, y = torch.randn(5, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 6, 6])
    with torch.no_grad():
        out = net(z, y)
        assert out.shape == (5, 3, 16, 16) and out.abs().max() <= 1
        order = torch.tensor([3, 0, 4, 1, 2])
        torch.testing.assert_close(net(z[order], y[order]), out[order], rtol=0, atol=1e-12)
        torch.testing.assert_close(net(z[2:3], y[2:3]), out[2:3], rtol=0, atol=1e-12)
        for changed in (net(z + 0.1, y), net(z, (y + 1) % 7), net(z, y, 0.3)):
            assert ((changed - out).abs().amax(dim=(1, 2, 3)) > 1e-3).all()


# Public: parameters, and multiply-adds of one image counted by torch.utils.flop_counter (half of its flops, less the
# 128,000 of the matrix product with one-hot labels, where ours looks up).
PUBLIC_COUNT = {
    128: (50_388_609, 11_318_394_880),
    256: (55_880_833, 38_834_864_128),
    512: (56_163_905, 75_744_968_704),
}


@pytest.mark.parametrize("size", PUBLIC_COUNT)
def test_compute_is_that_of_the_public_network(size):
    count = BY_SIZE[size].count()
    assert (count.params, count.macs) == PUBLIC_COUNT[size]


def test_every_normalised_element_counts_once():
    # 128 pixels at width 128, in units of 128 channels: cells a side, and the channels of bn_0 to bn_3 on them.
    # fmt: off
    elements = [
        (4, 16 + 3 * 4), (4, 16 + 4), (8, 2 * 4), (8, 16 + 3 * 4), (8, 16 + 4), (16, 2 * 4), (16, 8 + 3 * 2),
        (16, 8 + 2), (32, 2 * 2), (32, 4 + 3), (32, 4 + 1), (64, 2), (64, 2 + 1.5), (64, 2 + 0.5), (128, 1), (128, 1),
    ]
    # fmt: on
    count = BY_SIZE[128].count()
    assert count.flops - count.macs == sum(128 * side**2 * channels for side, channels in elements)


@pytest.mark.parametrize(
    ("size", "overrides"),
    [
        (128, {}),
        (256, {}),
        (512, {}),
        (128, {"input_size": 256}),
        (256, {"num_classes": 10, "width": 8, "latent_size": 5}),
        (256, {"attention": None}),
        (256, {"attention": 0}),
        (128, TINY),
    ],
)
def test_closed_form_equals_trace(size, overrides):
    closed, traced = BY_SIZE[size].count(**overrides), trace(BY_SIZE[size], **overrides)
    assert traced.source == "traced" and closed.source == "closed form"
    assert traced.breakdown == closed.breakdown
    assert all(type(flops) is int for flops in [*closed.breakdown.values(), *traced.breakdown.values()])
    assert (traced.flops, traced.macs, traced.params) == (closed.flops, closed.macs, closed.params)


@pytest.mark.parametrize(
    ("overrides", "culprit", "remedy"),
    [
        ({"input_size": 64}, "64 pixels", "128, 256, 512"),
        ({"width": 6}, "width 6", "4"),
        ({"num_classes": 0}, "num_classes is 0", "at least 1"),
        ({"latent_size": 1.5}, "latent_size is 1.5", "whole number"),
        ({"attention": 10}, "attention is 10", "0 to 9"),
        ({"input_size": 512, "width": 4, "attention": 12}, "4 channels", "divisible by 8"),
        ({"blocks": [(0, 16, 8), (1, 4, 1)]}, "block 1", "its input has 8 times"),
        ({"blocks": [(1, 16, 4)]}, "16 times the width into 4", "half"),
        ({"blocks": TINY["blocks"]}, "16 pixels", "input_size 128"),
        ({"blocks": [(1, 16)]}, "blocks", "sequence"),
        ({"blocks": 3}, "blocks", "sequence"),
        ({"in_channels": 3}, "in_channels", "input_size"),
    ],
)
@pytest.mark.parametrize("way", ["count", "build"])
def test_arguments_that_do_not_fit_are_refused_in_one_line(overrides, culprit, remedy, way):
    with pytest.raises(UserError) as refusal:
        BY_SIZE[128].count(**overrides) if way == "count" else BY_SIZE[128].build(**overrides)
    message = str(refusal.value)
    assert culprit in message and remedy in message and "\n" not in message


@pytest.mark.parametrize(
    ("z", "y", "truncation", "culprit"),
    [
        (torch.zeros(2, 4), torch.tensor([0, 1]), 1.0, r"\(2, 4\).*\(N, 5\)"),
        (torch.zeros(2, 5), torch.eye(7)[:2], 1.0, "one-hot"),
        (torch.zeros(2, 5), torch.tensor([0.0, 1.0]), 1.0, "float32"),
        (torch.zeros(2, 5), torch.tensor([0]), 1.0, "2 rows"),
        (torch.zeros(2, 5), torch.tensor([0, 1]), 0.0, "truncation 0.0"),
        (torch.zeros(2, 5), torch.tensor([0, 1]), 1.01, "truncation 1.01"),
        (torch.zeros(2, 5), torch.tensor([0, 1]), torch.tensor([0.5, 0.5]), "a single number"),
    ],
)
def test_a_call_that_does_not_fit_is_refused(z, y, truncation, culprit):
    with pytest.raises(UserError, match=culprit):
        tiny()(z, y, truncation)


def test_specs_and_closed_forms_import_no_framework():
    code = (
        "import sys; from backbones.biggan.spec import SPECS; [spec.count() for spec in SPECS];"
        "print(sorted({'torch', 'jax', 'numpy', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
