"""The torch DiT: goldens of the public release, initialisation, and properties of every block design."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from backbones.dit.position import sincos_table
from backbones.dit.spec import BLOCKS, SPECS
from backbones.dit.torch_model import Mlp
from backbones.torch_layers import attend
from harness.engines.torch.sampler import guided
from harness.errors import UserError

BY_NAME = {spec.name: spec for spec in SPECS}
SMALL = {"input_size": 8, "in_channels": 3, "num_classes": 7, "depth": 2, "width": 48, "heads": 4, "patch": 2}


def small(block, **overrides):
    torch.manual_seed(0)
    return BY_NAME["dit-xs-2"].build(**{**SMALL, "block": block, **overrides})


def randomise(net):
    """Draws random values for the zero-initialised weights, as after some training."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(std=0.05)
    return net


def batch(n, **shape):
    generator = torch.Generator().manual_seed(3)
    channels, size = shape.get("in_channels", 3), shape.get("input_size", 8)
    x = torch.randn(n, channels, size, size, generator=generator)
    t = torch.randint(0, 1000, (n,), generator=generator)
    return x, t, torch.randint(0, 8, (n,), generator=generator)


# The public release, facebookresearch/DiT ed81ce2, run in torch 2.13.0 on a CPU: float64 sums after seed 0.
RELEASE_SUMS = {
    "x_embedder.proj.weight": -10.225910550,
    "t_embedder.mlp.0.weight": 3.760489910,
    "y_embedder.embedding_table.weight": -3.397970222,
    "blocks.0.attn.qkv.weight": -0.995814629,
    "blocks.11.mlp.fc2.weight": -20.721813648,
    "pos_embed": 3210.131757766,
}


@pytest.fixture(scope="module")
def dit_s_8():
    torch.manual_seed(0)
    return BY_NAME["dit-s-8"].build()


@pytest.mark.parametrize("name", RELEASE_SUMS)
def test_same_seed_gives_the_weights_of_the_release(dit_s_8, name):
    assert dit_s_8.state_dict()[name].double().sum().item() == pytest.approx(RELEASE_SUMS[name], abs=1e-6)


@pytest.fixture(scope="module")
def lively():
    """The release's network with its zero-initialised layers drawn at random, and one input."""
    torch.manual_seed(0)
    net = BY_NAME["dit-s-8"].build()
    torch.manual_seed(1)
    for block in net.blocks:
        nn.init.normal_(block.adaLN_modulation[1].weight, std=0.02)
    nn.init.normal_(net.final_layer.linear.weight, std=0.02)
    nn.init.normal_(net.final_layer.adaLN_modulation[1].weight, std=0.02)
    torch.manual_seed(2)
    return net, torch.randn(2, 4, 32, 32)


def test_forward_gives_the_output_of_the_release(lively):
    net, x = lively
    with torch.no_grad():
        out = net(x, torch.tensor([3, 777]), torch.tensor([207, 1000]))
    assert out.shape == (2, 8, 32, 32) and out.dtype == torch.float32
    assert out.mean().item() == pytest.approx(-0.00024616, abs=1e-5)
    assert out.std().item() == pytest.approx(0.38894010, abs=1e-5)
    np.testing.assert_allclose(out[0, 0, 0, :3], [-0.42183518, 0.80800843, -0.04641823], atol=1e-5)


def test_guidance_gives_the_output_of_the_release(lively):
    """Its forward_with_cfg at scale 4: guided noise in three channels of both halves; the other channels are unchanged."""
    net, x = lively
    t, y = torch.tensor([3, 777]), torch.tensor([207, 88])
    with torch.no_grad():
        first = guided(net, y, 4.0, "first-3", 1000)(x, t, 0)
        second = net(x, t, torch.tensor([1000, 1000]))
    second[:, :3] = first[:, :3]
    out = torch.cat([first, second])
    assert out.shape == (4, 8, 32, 32)
    assert out.mean().item() == pytest.approx(-0.00014060, abs=1e-5)
    assert out.std().item() == pytest.approx(0.38923869, abs=1e-5)


def test_position_table():
    row = sincos_table(8, 2)[1]  # row 0, column 1: the column comes first
    np.testing.assert_allclose(row, [math.sin(1), math.sin(0.01), math.cos(1), math.cos(0.01), 0, 0, 1, 1], atol=1e-12)
    table = sincos_table(1152, 16)
    assert table.shape == (256, 1152) and table.dtype == np.float64


def expected_release_keys(depth, width, patch, tokens, labels):
    d = width
    shapes = {
        "pos_embed": (1, tokens, d),
        "x_embedder.proj.weight": (d, 4, patch, patch),
        "x_embedder.proj.bias": (d,),
        "y_embedder.embedding_table.weight": (labels, d),
    }
    linears = {"t_embedder.mlp.0": (d, 256), "t_embedder.mlp.2": (d, d)}
    for index in range(depth):
        linears |= {
            f"blocks.{index}.attn.qkv": (3 * d, d),
            f"blocks.{index}.attn.proj": (d, d),
            f"blocks.{index}.mlp.fc1": (4 * d, d),
            f"blocks.{index}.mlp.fc2": (d, 4 * d),
            f"blocks.{index}.adaLN_modulation.1": (6 * d, d),
        }
    linears |= {"final_layer.linear": (patch * patch * 8, d), "final_layer.adaLN_modulation.1": (2 * d, d)}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


# Parameter totals of the release, position table included (facebookresearch/DiT ed81ce2).
RELEASE_TOTALS = {
    "dit-s-8": 33_148_160,
    "dit-s-4": 32_945_024,
    "dit-s-2": 32_963_360,
    "dit-b-8": 130_881_536,
    "dit-b-4": 130_475_648,
    "dit-b-2": 130_512_416,
    "dit-l-8": 458_594_816,
    "dit-l-4": 458_053_760,
    "dit-l-2": 458_102_816,
    "dit-xl-8": 675_683_072,
    "dit-xl-4": 675_074_432,
    "dit-xl-2": 675_129_632,
}


@pytest.mark.parametrize("name", RELEASE_TOTALS)
def test_state_dict_is_that_of_the_release(name):
    spec = BY_NAME[name]
    with torch.device("meta"):
        state = spec.build().state_dict()
    a = spec.defaults
    expected = expected_release_keys(a["depth"], a["width"], a["patch"], (32 // a["patch"]) ** 2, 1001)
    assert {key: tuple(value.shape) for key, value in state.items()} == expected
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert sum(value.numel() for value in state.values()) == RELEASE_TOTALS[name]
    if name == "dit-xl-2":
        assert len(state) == 292


def test_the_512_pixel_network_has_the_total_of_the_release():
    with torch.device("meta"):
        net = BY_NAME["dit-xl-2"].build(input_size=64)
    assert sum(parameter.numel() for parameter in net.parameters()) == 676_014_368


def test_state_dict_loads_strictly():
    source, target = small("adaln-zero"), small("adaln-zero")
    state = randomise(source).state_dict()
    target.load_state_dict(state, strict=True)
    x, t, y = batch(2)
    assert torch.equal(source(x, t, y), target(x, t, y))


@pytest.mark.parametrize("block", BLOCKS)
def test_initialisation_statistics_of_every_parameter(block):
    """Each parameter belongs to one group: zero, one, normal, or uniform within the bound of Xavier (Glorot)."""
    torch.manual_seed(0)
    net = BY_NAME["dit-s-4"].build(depth=2, block=block)
    zero = {"final_layer.linear.weight", "final_layer.adaLN_modulation.1.weight"}
    if block == "adaln-zero":
        zero |= {f"blocks.{index}.adaLN_modulation.1.weight" for index in range(2)}
    normal = {"y_embedder.embedding_table.weight", "t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight"}
    seen = set()
    for name, value in net.named_parameters():
        value = value.detach()
        if name == "pos_embed":
            table = torch.from_numpy(sincos_table(384, 8)).float()
            assert torch.equal(value[0], table)
            group = "positions"
        elif name in zero or name.endswith(".bias"):
            assert not value.any(), name
            group = "zero"
        elif ".norm" in name:
            assert (value == 1).all(), name
            group = "one"
        elif name in normal:
            assert value.std().item() == pytest.approx(0.02, rel=0.02), name
            assert abs(value.mean().item()) < 0.02 * 5 / math.sqrt(value.numel()), name
            group = "normal"
        else:
            matrix = value.flatten(1)  # the patch convolution counts as a matrix
            bound = math.sqrt(6 / sum(matrix.shape))
            assert matrix.abs().max().item() <= bound, name
            assert matrix.abs().max().item() > 0.99 * bound, name
            assert matrix.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03), name
            group = "xavier"
        seen.add(group)
    affine = {"one"} if block in ("in-context", "cross-attention") else set()
    assert seen == {"positions", "zero", "normal", "xavier"} | affine


@pytest.mark.parametrize("block", BLOCKS)
def test_output_is_exactly_zero_before_training(block):
    out = small(block)(*batch(2))
    assert out.shape == (2, 6, 8, 8) and not out.any()


def test_adaln_zero_blocks_start_as_the_identity_and_the_others_do_not():
    x, c = torch.randn(2, 5, 48), torch.randn(2, 48)
    for block in BLOCKS:
        condition = c.unsqueeze(1).expand(2, 2, 48) if block == "cross-attention" else c
        same = torch.equal(small(block).blocks[0](x, condition), x)
        assert same == (block == "adaln-zero")


@pytest.mark.parametrize("block", BLOCKS)
def test_timestep_and_label_matter_and_images_do_not_know_each_other(block):
    net = randomise(small(block)).eval()
    x, t, y = batch(5)
    with torch.no_grad():
        out = net(x, t, y)
        order = torch.tensor([3, 0, 4, 1, 2])
        torch.testing.assert_close(net(x[order], t[order], y[order]), out[order], rtol=0, atol=2e-6)
        torch.testing.assert_close(net(x[2:3], t[2:3], y[2:3]), out[2:3], rtol=0, atol=2e-6)
        other = x.clone()
        other[1:] += 1
        torch.testing.assert_close(net(other, t, y)[:1], out[:1], rtol=0, atol=2e-6)
        for changed in (net(x, (t + 400) % 1000, y), net(x, t, (y + 1) % 8)):
            assert ((changed - out).abs().amax(dim=(1, 2, 3)) > 1e-4).all()


@pytest.mark.parametrize("block", BLOCKS)
def test_gradient_checkpointing_gives_identical_gradients(block):
    x, t, y = batch(3)
    gradients = []
    for checkpointing in (False, True):
        net = randomise(small(block, gradient_checkpointing=checkpointing))
        out = net(x, t, y)
        out.square().sum().backward()
        gradients.append({name: p.grad for name, p in net.named_parameters() if p.requires_grad})
    assert all(gradients[0][name].any() for name in gradients[0] if "weight" in name)
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_gradient_checkpointing_computes_blocks_again():
    net = small("adaln-zero", gradient_checkpointing=True)
    calls = []
    net.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    net(*batch(1)).sum().backward()
    assert len(calls) == 2


@pytest.mark.parametrize("block", BLOCKS)
def test_autocast_embeds_the_timestep_in_float32(block):
    net = randomise(small(block)).eval()
    seen = {}
    net.t_embedder.register_forward_hook(lambda module, inputs, out: seen.update(t=out))
    x, t, y = batch(4)
    with torch.no_grad():
        exact = net(x, t, y)
        exact_t = seen["t"]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = net(x, t, y)
    assert seen["t"].dtype == torch.float32 and torch.equal(seen["t"], exact_t)
    assert out.dtype == torch.bfloat16
    assert not torch.equal(out.float(), exact)
    assert (out.float() - exact).norm() < 0.02 * exact.norm()


def test_whole_and_fractional_timesteps():
    net = randomise(small("adaln-zero")).eval()
    x, t, y = batch(2)
    with torch.no_grad():
        whole = net(x, t, y)
        assert torch.equal(net(x, t.float(), y), whole)
        assert torch.equal(net(x, t.double(), y), whole)
        assert not torch.equal(net(x, t + 0.5, y), whole)


def test_timestep_features_are_cosine_first():
    net = small("adaln-zero")
    seen = []
    net.t_embedder.mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    net.t_embedder(torch.tensor([0, 777]))
    features = seen[0].double()
    frequencies = 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    angles = torch.tensor([[0.0], [777.0]], dtype=torch.float64) * frequencies
    torch.testing.assert_close(features, torch.cat([angles.cos(), angles.sin()], dim=1), rtol=0, atol=2e-4)


def test_gelu_is_the_tanh_form():
    mlp = Mlp(1)
    x = torch.linspace(-4, 4, 101).reshape(1, 101, 1)
    with torch.no_grad():
        mlp.fc1.weight.fill_(1)
        mlp.fc2.weight.fill_(0.25)
        mlp.fc1.bias.zero_()
        mlp.fc2.bias.zero_()
        out = mlp(x)
    tanh = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    torch.testing.assert_close(out, tanh, rtol=0, atol=1e-6)  # the exact form is up to 5e-4 away


@pytest.mark.parametrize(("queries", "keys"), [(16, 16), (256, 256), (257, 257), (64, 2)])
def test_attention_in_bfloat16_is_attention(queries, keys):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, tokens, 24) for tokens in (queries, keys, keys))
    exact = (q @ k.transpose(-1, -2) / math.sqrt(24)).softmax(-1) @ v
    torch.testing.assert_close(attend(q, k, v), exact, rtol=0, atol=1e-5)
    out = attend(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert out.dtype == torch.bfloat16 and out.shape == (2, 3, queries, 24)
    assert (out.float() - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("block", BLOCKS)
def test_without_attention_every_patch_is_on_its_own(block):
    """Output tokens are at the positions of the input tokens, and the conditioning tokens are removed."""
    net = randomise(small(block)).eval()
    with torch.no_grad():
        for each in net.blocks:
            each.attn.proj.weight.zero_()
        x, t, y = batch(1)
        changed = x.clone()
        changed[..., 2:4, 4:6] += 1  # the patch in row 1, column 2
        difference = (net(changed, t, y) - net(x, t, y)).abs().amax(dim=(0, 1)) > 1e-4
    assert difference[2:4, 4:6].all()
    assert difference.sum() == 4


def test_out_channels_follow_the_objective():
    assert small("adaln-zero", out_channels=3)(*batch(1)).shape == (1, 3, 8, 8)


def test_unpatchify_puts_token_vectors_where_the_patches_were():
    net = small("adaln-zero", out_channels=3)
    image = torch.arange(3 * 64.0).reshape(1, 3, 8, 8)
    tokens = torch.stack(
        [image[0, :, r : r + 2, c : c + 2].permute(1, 2, 0).flatten() for r in range(0, 8, 2) for c in range(0, 8, 2)]
    ).unsqueeze(0)
    assert torch.equal(net.unpatchify(tokens), image)


def test_an_input_of_another_shape_is_refused():
    x, t, y = batch(1, input_size=16)
    with pytest.raises(UserError, match=r"\(1, 3, 16, 16\).*\(N, 3, 8, 8\)"):
        small("adaln-zero")(x, t, y)
