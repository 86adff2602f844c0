"""The torch U-Nets of ADM and LDM: goldens of the public releases, initialisation, and refused arguments.

The goldens were computed with the public code, openai/guided-diffusion 22e0df8 (unet.py: UNetModel, SuperResModel,
EncoderUNetModel) and CompVis/latent-diffusion a506df5 (openaimodel.py: UNetModel with a spatial transformer), at
reduced width, in torch 2.13.0 on a CPU. It ran in float64: its casts to float32 around normalisations and softmax
were taken out. Weights and inputs are drawn by numpy, weights by their names, so that neither the order of
construction nor a framework's generator matters. At full block structure (every list of multipliers of the papers, up
to 128 pixels) outputs differed by at most 2e-14 of the largest in float64 and 2e-5 in float32, mostly 1e-6, and
gradients of the image by 1e-13.
"""

import math
import zlib

import numpy as np
import pytest
import torch
from torch import nn

from backbones.adm.spec import SPECS as ADM_SPECS
from backbones.adm.torch_model import AttentionPool
from backbones.ldm.spec import SPECS as LDM_SPECS
from backbones.unet.torch_unet import AttentionBlock, GatedGelu, ResBlock, SpatialTransformer
from harness.errors import UserError

BY_NAME = {spec.name: spec for spec in (*ADM_SPECS, *LDM_SPECS)}
SMALL = {"num_classes": 10, "width": 32}
CASES = {
    "adm-64": {"input_size": 16, "attention_resolutions": (8, 4, 2), "head_channels": 16, "dropout": 0.0},
    "adm-128": {"input_size": 32, "attention_resolutions": (8, 4, 2)},
    "adm-512": {"input_size": 32, "width": 64, "multipliers": (0.5, 1, 1, 2), "attention_resolutions": (8, 4)},
    "adm-u-64-256": {"input_size": 32, "low_res_size": 8, "multipliers": (1, 1, 2, 2), "attention_resolutions": (8, 4)},
    "adm-classifier-256": {"input_size": 32, "multipliers": (1, 1, 2, 2, 4), "attention_resolutions": (8, 4)},
    "ldm-4": {"input_size": 16, "context_width": 48},
    "ldm-8": {"input_size": 8, "context_width": 48},
}
for _name in ("adm-512", "adm-classifier-256"):
    CASES[_name]["head_channels"] = 32

# Output: mean, standard deviation, first three values; standard deviations of the gradients of the sum of the output
# weighted by normal numbers, by the image and by two weights.
# fmt: off
GOLDENS = {
    "adm-64": [-0.14628355, 0.25053221, -0.42302365, -0.44008236, -0.40760958, 0.37096143, 0.012926318, 6.0093309],
    "adm-128": [-0.14761346, 0.25117858, -0.29365316, -0.36393988, -0.24177072, 0.38808736, 0.033113755, 13.439541],
    "adm-512": [-0.14715905, 0.25210942, -0.26647033, -0.42775806, -0.36112205, 0.2671721, 0.014635515, 7.6919512],
    "adm-u-64-256": [-0.1469852, 0.25170743, -0.28867329, -0.34445823, -0.36907114, 0.26131114, 0.033940628, 13.746297],
    "adm-classifier-256": [-0.030307132, 0.27772602, -0.51295146, 0.15744873, -0.088058912, 0.011525237, 0.00077611249, 0.41038595],
    "ldm-4": [-0.027049573, 0.11487786, 0.023757004, 0.0024485826, -0.059483442, 0.15058823, 0.0022144979, 1.9569268],
    "ldm-8": [0.021742804, 0.1282863, 0.11841916, 0.14152384, 0.012845927, 0.13913418, 0.0010403553, 1.1299986],
}
# fmt: on

TINY = {
    "adm-xs": {"input_size": 8, "multipliers": (1, 2), "attention_resolutions": (4,), "head_channels": 16},
    "adm-u-xs": {"input_size": 8, "low_res_size": 4, "attention_resolutions": (4,), "head_channels": 16},
    "adm-classifier-xs": {"input_size": 8, "attention_resolutions": (4,), "head_channels": 16},
    "ldm-xs": {"input_size": 8, "head_channels": 16, "context_width": 24},
}


def build(name, **overrides):
    torch.manual_seed(0)
    return BY_NAME[name].build(**{**SMALL, **CASES.get(name, TINY.get(name, {})), **overrides})


def numbers(name, *shape):
    return torch.from_numpy(np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape))


@torch.no_grad()
def draw(net):
    """Fills every weight from its name. Feature maps are so small that the eps of normalisations matters."""
    for name, value in net.state_dict().items():
        drawn = numbers(name, *value.shape)
        if value.dim() > 1:
            sharp = name.endswith(("qkv.weight", "qkv_proj.weight", "to_q.weight", "to_k.weight"))
            value.copy_(drawn * ((2.0 if sharp else 0.2) / math.sqrt(value[0].numel())))
        else:
            is_scale = name.endswith("weight")  # of a normalisation: every other vector is a bias
            value.copy_(0.2 * drawn + is_scale)
    return net


def arguments(name, dtype=torch.float64, n=2, **overrides):
    """Inputs of the network: two images, the second with the last label."""
    a = BY_NAME[name].arguments(**{**SMALL, **CASES.get(name, TINY.get(name, {})), **overrides})
    x = numbers("x", n, a["in_channels"], a["input_size"], a["input_size"]).to(dtype)
    t, y = torch.tensor([2, 31, 500, 999, 7])[:n], torch.tensor([1, 9 + a.get("null_class", 0), 3, 4, 5])[:n]
    kind = BY_NAME[name].kind
    if kind == "upsampler":
        return x, t, y, numbers("low_res", n, a["in_channels"], a["low_res_size"], a["low_res_size"]).to(dtype)
    return (x, t) if kind == "classifier" else (x, t, y)


def weights(net):
    """The U-Net's parameters by name, for both families."""
    unet = net.model["diffusion_model"] if hasattr(net, "model") else net
    return dict(unet.named_parameters()), unet


def summary(net, inputs, call=None):
    """The numbers of GOLDENS, for a network in float64."""
    named, unet = weights(net)
    handle = unet.time_embed.register_forward_pre_hook(lambda module, given: (given[0].double(),))
    image = inputs[0].clone().requires_grad_()
    out = (call or net)(image, *inputs[1:])
    (out * numbers("cotangent", *out.shape)).sum().backward()
    handle.remove()
    flat = out.detach().flatten()
    gradients = (image.grad, named["time_embed.0.weight"].grad, named["input_blocks.1.0.in_layers.2.weight"].grad)
    return [each.item() for each in (flat.mean(), flat.std(), *flat[:3], *(gradient.std() for gradient in gradients))]


@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward_give_the_numbers_of_the_release(name):
    net = draw(build(name)).double().eval()
    assert summary(net, arguments(name)) == pytest.approx(GOLDENS[name], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("name", TINY)
def test_initialisation_of_every_parameter(name):
    """Zero: the last layer of every residual branch and of a denoiser. One: normalisations. The rest as torch draws
    it by default, uniform within 1 / sqrt(inputs), tables normal; AttentionPool's positions by 1 / sqrt(channels)."""
    net = build(name, width=64)
    zero = set()
    for path, module in net.named_modules():
        if isinstance(module, ResBlock):
            zero |= {f"{path}.out_layers.3.weight", f"{path}.out_layers.3.bias"}
        elif isinstance(module, (AttentionBlock, SpatialTransformer)):
            zero |= {f"{path}.proj_out.weight", f"{path}.proj_out.bias"}
        elif path.endswith("out") and isinstance(module, nn.Sequential) and isinstance(module[-1], nn.Conv2d):
            zero |= {f"{path}.2.weight", f"{path}.2.bias"}
    inputs = 1
    for key, value in net.named_parameters():
        module = net.get_submodule(key.rpartition(".")[0])
        value = value.detach()
        if key in zero or (isinstance(module, (nn.GroupNorm, nn.LayerNorm)) and key.endswith("bias")):
            assert not value.any(), key
        elif isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            assert (value == 1).all(), key
        elif isinstance(module, (nn.Embedding, AttentionPool)):
            std = 1 if isinstance(module, nn.Embedding) else net.layout.channels**-0.5
            assert value.std().item() == pytest.approx(std, rel=0.05), key
        else:
            inputs = value[0].numel() if key.endswith("weight") else inputs  # a bias follows its weight
            assert value.abs().max().item() <= inputs**-0.5, key
            assert value.std().item() == pytest.approx((3 * inputs) ** -0.5, rel=0.2 if value.numel() < 2000 else 0.03)
        zero.discard(key)
    assert not zero


# float64 sums after torch.manual_seed(0) of the releases' networks with the arguments of these small ones.
RELEASE_SUMS = {
    ("adm-xs", "label_emb.weight"): -1103.139254177,
    ("adm-xs", "input_blocks.1.0.in_layers.2.weight"): 2.281501686,
    ("adm-xs", "middle_block.1.qkv.weight"): -13.227492412,
    ("adm-xs", "output_blocks.3.0.skip_connection.weight"): -7.235281621,
    ("adm-classifier-xs", "time_embed.0.weight"): 6.893890172,
    ("adm-classifier-xs", "input_blocks.1.0.emb_layers.1.weight"): 1.635882504,
    ("adm-classifier-xs", "middle_block.1.qkv.weight"): -0.198783028,
    ("adm-classifier-xs", "out.2.positional_embedding"): -22.470017156,
    ("adm-classifier-xs", "out.2.c_proj.weight"): -14.441646459,
    ("ldm-xs", "model.diffusion_model.time_embed.0.weight"): 6.893890172,
    ("ldm-xs", "model.diffusion_model.input_blocks.3.1.transformer_blocks.0.attn1.to_q.weight"): 2.641272125,
    ("ldm-xs", "model.diffusion_model.input_blocks.3.1.transformer_blocks.0.ff.net.2.weight"): -5.781383637,
    ("ldm-xs", "model.diffusion_model.middle_block.1.proj_in.weight"): -8.309457596,
    ("ldm-xs", "model.diffusion_model.output_blocks.1.2.conv.weight"): 5.305182534,
}


@pytest.mark.parametrize(("name", "key"), RELEASE_SUMS)
def test_same_seed_gives_the_weights_of_the_release(name, key):
    torch.manual_seed(0)
    value = BY_NAME[name].build().state_dict()[key]
    assert value.double().sum().item() == pytest.approx(RELEASE_SUMS[name, key], abs=1e-6)


@pytest.mark.parametrize("name", ["adm-xs", "adm-u-xs", "ldm-xs"])
def test_output_is_exactly_zero_before_training(name):
    out = build(name)(*arguments(name, torch.float32))
    channels = 3 if name == "ldm-xs" else 6
    assert out.shape == (2, channels, 8, 8) and out.dtype == torch.float32 and not out.any()
    assert build(name, out_channels=5)(*arguments(name, torch.float32)).shape == (2, 5, 8, 8)


def test_a_classifier_gives_logits():
    out = build("adm-classifier-xs")(*arguments("adm-classifier-xs", torch.float32))
    assert out.shape == (2, 10) and out.any()


@pytest.mark.parametrize("name", ["adm-xs", "adm-u-xs", "ldm-xs"])
def test_timestep_and_label_matter_and_images_do_not_know_each_other(name):
    net = draw(build(name)).eval()
    x, t, y, *low = arguments(name, torch.float32, n=5)
    with torch.no_grad():
        out = net(x, t, y, *low)
        order = torch.tensor([3, 0, 4, 1, 2])
        torch.testing.assert_close(net(*(each[order] for each in (x, t, y, *low))), out[order], rtol=0, atol=1e-5)
        torch.testing.assert_close(net(*(each[2:3] for each in (x, t, y, *low))), out[2:3], rtol=0, atol=1e-5)
        changes = [(x, (t + 400) % 1000, y, *low), (x, t, (y + 1) % 10, *low)]
        if low:
            changes.append((x, t, y, low[0] + torch.randn_like(low[0])))
        for changed in changes:
            assert ((net(*changed) - out).abs().amax(dim=(1, 2, 3)) > 1e-4).all()
        assert torch.equal(net(x, t.double(), y, *low), out)
        assert not torch.equal(net(x, t + 0.5, y, *low), out)


def test_without_classes_labels_are_not_looked_at():
    net = draw(build("adm-xs", num_classes=0)).eval()
    x, t, y = arguments("adm-xs", torch.float32)
    assert not any("label" in key for key in net.state_dict())
    with torch.no_grad():
        assert torch.equal(net(x, t, y), net(x, t, y + 100))


def test_the_null_class_is_one_more_row():
    with_null, without = build("ldm-xs"), build("ldm-xs", null_class=False)
    assert with_null.cond_stage_model.embedding.weight.shape == (11, 24)
    assert without.cond_stage_model.embedding.weight.shape == (10, 24)
    x, t, _ = arguments("ldm-xs", torch.float32)
    null = torch.tensor([10, 10])
    with torch.no_grad():
        assert draw(with_null).eval()(x, t, null).isfinite().all()
        with pytest.raises(IndexError):
            without(x, t, null)
    for name, expected in (("ldm-4", 1000), ("ldm-xs", 1000), ("ldm-8", None), ("adm-256", None)):
        label = BY_NAME[name].null_label
        assert (None if label is None else BY_NAME[name].null_index(1000)) == expected, name


@pytest.mark.parametrize("name", TINY)
def test_gradient_checkpointing_gives_the_same_gradients(name):
    gradients = []
    for checkpointing in (False, True):
        net = draw(build(name, gradient_checkpointing=checkpointing, dropout=0.3))
        calls = []
        block = weights(net)[1].middle_block
        block[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(4)  # of dropout
        net(*arguments(name, torch.float32)).square().sum().backward()
        assert len(calls) == 1 + checkpointing
        gradients.append({key: parameter.grad for key, parameter in net.named_parameters()})
    assert all(gradient.any() for key, gradient in gradients[0].items() if "weight" in key and "attn2.to_" not in key)
    for key, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][key]), key


def test_dropout_acts_in_training_alone():
    net = draw(build("adm-xs", dropout=0.5))
    given = arguments("adm-xs", torch.float32)
    with torch.no_grad():
        assert not torch.equal(net(*given), net(*given))
        net.eval()
        assert torch.equal(net(*given), net(*given))


@pytest.mark.parametrize("name", TINY)
def test_autocast_is_near_float32_and_embeds_the_timestep_in_float32(name):
    """The error of the releases' code is as large: 0.3 % (ADM) and 0.6 % (LDM, classifier) at this width."""
    net = draw(build(name, width=128)).eval()
    seen = []
    weights(net)[1].time_embed.register_forward_hook(lambda module, given, out: seen.append(out))
    given = arguments(name, torch.float32)
    with torch.no_grad():
        exact = net(*given)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = net(*given)
    assert torch.equal(*seen) and seen[1].dtype == torch.float32
    assert out.dtype == torch.bfloat16 and not torch.equal(out.float(), exact)
    assert (out.float() - exact).norm() < 0.01 * exact.norm()


def test_autocast_trains():
    net = draw(build("ldm-xs", gradient_checkpointing=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(*arguments("ldm-xs", torch.float32))
    out.float().square().sum().backward()
    for key, parameter in net.named_parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), key


def test_gelu_is_the_exact_form():
    layer = GatedGelu(1, 1)
    gate = torch.linspace(-4, 4, 101).reshape(1, 101, 1)
    with torch.no_grad():
        layer.proj.weight.copy_(torch.tensor([[0.0], [1.0]]))  # the first half is gated, the second gates
        layer.proj.bias.copy_(torch.tensor([1.0, 0.0]))
        exact = 0.5 * gate * (1 + torch.erf(gate / math.sqrt(2)))
        torch.testing.assert_close(layer(gate), exact, rtol=0, atol=1e-6)  # the tanh form is up to 5e-4 away


@pytest.mark.parametrize(
    ("name", "overrides", "culprit", "remedy"),
    [
        ("adm-xs", {"width": 48}, "width 48 x 1", "multiple of 32"),
        ("adm-xs", {"multipliers": (0.5, 1)}, "width 32 x 0.5", "multiple of 32"),
        ("adm-xs", {"multipliers": ()}, "multipliers are ()", "one positive number per level"),
        ("adm-xs", {"multipliers": (1, -1)}, "multipliers are (1, -1)", "positive"),
        ("adm-xs", {"input_size": 7}, "input_size 7", "multiple of 2"),
        ("adm-256", {"input_size": 28}, "input_size 28", "at most 3 levels"),
        ("ldm-4", {"input_size": 12}, "input_size 12", "multiple of 8"),
        ("adm-xs", {"heads": 2, "head_channels": 16}, "heads or head_channels", "leave the other 0"),
        ("adm-xs", {"heads": 0, "head_channels": 0}, "heads or head_channels", "leave the other 0"),
        ("adm-xs", {"head_channels": 24}, "64 channels", "head_channels 24"),
        ("ldm-xs", {"heads": 5, "head_channels": 0}, "64 channels", "heads 5"),
        ("adm-xs", {"res_blocks": 0}, "res_blocks is 0", "at least 1"),
        ("adm-xs", {"num_classes": -1}, "num_classes is -1", "at least 0"),
        ("adm-xs", {"width": 32.0}, "width is 32.0", "whole number"),
        ("adm-xs", {"dropout": 1.0}, "dropout is 1.0", "[0, 1)"),
        ("adm-classifier-xs", {"num_classes": 0}, "num_classes", "at least 1"),
        ("adm-u-xs", {"low_res_size": 16}, "low_res_size 16", "between 1 and input_size 8"),
        ("ldm-xs", {"num_classes": 0}, "num_classes is 0", "at least 1"),
        ("ldm-xs", {"transformer_depth": 0}, "transformer_depth is 0", "at least 1"),
        ("adm-xs", {"colour": 3}, "colour", "input_size"),
        ("adm-xs", {"heads": -1, "head_channels": 0}, "heads is -1", "whole number"),
        ("adm-xs", {"head_channels": -32}, "head_channels is -32", "whole number"),
        ("adm-xs", {"multipliers": (1, math.inf)}, "multipliers are (1, inf)", "positive"),
        ("adm-xs", {"multipliers": (1, 1.01)}, "x 1.01", "multiple of 32"),
        ("adm-xs", {"width": 33, "multipliers": (32, 32)}, "width 33 is odd", "even"),
        ("adm-xs", {"attention_resolutions": 4}, "attention_resolutions is 4", "as in (32, 16, 8)"),
        ("adm-xs", {"gradient_checkpointing": "no"}, "gradient_checkpointing is 'no'", "true or false"),
        ("adm-xs", {"dropout": "x"}, "dropout is x", "[0, 1)"),
        ("adm-xs", {"input_size": 2, "width": 64, "multipliers": (1, 0.5)}, "one position and 32 channels", "larger"),
        ("adm-xs", {"input_size": 2, "width": 32, "multipliers": (1, 2)}, "one position and 32 channels", "larger"),
        ("adm-xs", {"res_blocks": 10**30}, "res_blocks is 10000", "more than 1,000 cannot be built"),
        ("ldm-xs", {"transformer_depth": 2**31}, "transformer_depth is 2147483648", "more than 1,000"),
        ("adm-xs", {"width": 2**31}, "width is 2147483648", "more than 1,048,576"),
        ("ldm-xs", {"multipliers": (1, 10**30)}, "multipliers are (1, 1000", "one positive number"),
        ("ldm-xs", {"attention_rates": (0,)}, "attention_rates is (0,)", "at least 1"),
        ("ldm-xs", {"null_class": 5}, "null_class is 5", "true or false"),
        ("ldm-xs", {"context_width": 1.5}, "context_width is 1.5", "whole number"),
    ],
)
@pytest.mark.parametrize("way", ["count", "build"])
def test_arguments_that_do_not_fit_are_refused_in_one_line(name, overrides, culprit, remedy, way):
    given = {**SMALL, **TINY.get(name, {}), **overrides}
    if name not in TINY:
        given = {"width": 64, **overrides}
    with pytest.raises(UserError) as refusal:
        BY_NAME[name].count(**given) if way == "count" else BY_NAME[name].build(**given)
    message = str(refusal.value)
    assert culprit in message and remedy in message and "\n" not in message


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, 3, 8, 16), (2, 4, 8, 8)])
def test_an_input_of_another_shape_is_refused(name, shape):
    _, *rest = arguments(name, torch.float32)
    with pytest.raises(UserError) as refusal:
        build(name)(torch.zeros(shape), *rest)
    message = str(refusal.value)
    assert str(shape) in message and "(N, 3, 8, 8)" in message and "\n" not in message
