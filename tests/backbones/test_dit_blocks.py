"""The four block designs against the paper's description (arXiv:2212.09748, section 3.2), written out in sums of products.

Only adaLN-Zero was released, and diffusers has it alone: the other three have no public code to be held against. Here
the whole network is computed from the state dict in float64, without a module of ours or of torch, and its output and
the gradients of every weight are compared.
"""

import math

import pytest
import torch

import harness

WIDTH, HEADS, PATCH, SIDE, DEPTH, CLASSES = 24, 3, 2, 6, 2, 5
BLOCKS = ("adaln-zero", "in-context", "cross-attention", "adaln")


def linear(w, name, x):
    return torch.einsum("...i,oi->...o", x, w[f"{name}.weight"]) + w[f"{name}.bias"]


def silu(x):
    return x / (1 + torch.exp(-x))


def gelu(x):
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def normalised(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def affine(w, name, x):
    return normalised(x) * w[f"{name}.weight"] + w[f"{name}.bias"]


def heads(x):
    n, tokens, _ = x.shape
    return x.reshape(n, tokens, HEADS, WIDTH // HEADS)


def attention(q, k, v):
    """q (N, T, D) looks at k and v (N, S, D)."""
    scores = torch.einsum("nthd,nshd->nhts", heads(q), heads(k)) / math.sqrt(WIDTH // HEADS)
    shares = (scores - scores.detach().amax(-1, keepdim=True)).exp()
    shares = shares / shares.sum(-1, keepdim=True)
    return torch.einsum("nhts,nshd->nthd", shares, heads(v)).reshape(q.shape)


def self_attention(w, name, x):
    q, k, v = linear(w, f"{name}.qkv", x).split(WIDTH, dim=-1)
    return linear(w, f"{name}.proj", attention(q, k, v))


def mlp(w, name, x):
    return linear(w, f"{name}.fc2", gelu(linear(w, f"{name}.fc1", x)))


def block_of(design, w, name, x, t, y):
    """One block: x (N, T, D), and the vectors (N, D) of timestep and label."""
    if design in ("adaln-zero", "adaln"):
        found = linear(w, f"{name}.adaLN_modulation.1", silu(t + y))[:, None].split(WIDTH, dim=-1)
        if design == "adaln-zero":
            shift1, scale1, gate1, shift2, scale2, gate2 = found
        else:
            (shift1, scale1, shift2, scale2), gate1, gate2 = found, 1.0, 1.0
        x = x + gate1 * self_attention(w, f"{name}.attn", normalised(x) * (1 + scale1) + shift1)
        return x + gate2 * mlp(w, f"{name}.mlp", normalised(x) * (1 + scale2) + shift2)
    x = x + self_attention(w, f"{name}.attn", affine(w, f"{name}.norm1", x))
    if design == "cross-attention":
        k, v = linear(w, f"{name}.cross_attn.kv", torch.stack([t, y], dim=1)).split(WIDTH, dim=-1)
        q = linear(w, f"{name}.cross_attn.q", affine(w, f"{name}.norm_cross", x))
        x = x + linear(w, f"{name}.cross_attn.proj", attention(q, k, v))
    return x + mlp(w, f"{name}.mlp", affine(w, f"{name}.norm2", x))


def by_hand(design, w, x, t, y):
    n, channels, side, _ = x.shape
    grid = side // PATCH
    patches = x.reshape(n, channels, grid, PATCH, grid, PATCH).permute(0, 2, 4, 1, 3, 5).reshape(n, grid * grid, -1)
    tokens = patches @ w["x_embedder.proj.weight"].flatten(1).T + w["x_embedder.proj.bias"] + w["pos_embed"]
    angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)  # in float32, as released
    features = torch.cat([angles.cos(), angles.sin()], dim=1).double()
    t = linear(w, "t_embedder.mlp.2", silu(linear(w, "t_embedder.mlp.0", features)))
    y = w["y_embedder.embedding_table.weight"][y]
    if design == "in-context":  # as the class token of a ViT: with the image's tokens, and gone after the last block
        tokens = torch.cat([tokens, torch.stack([t, y], dim=1)], dim=1)
    for index in range(DEPTH):
        tokens = block_of(design, w, f"blocks.{index}", tokens, t, y)
    tokens = tokens[:, : grid * grid]
    if design in ("adaln-zero", "adaln"):
        shift, scale = linear(w, "final_layer.adaLN_modulation.1", silu(t + y))[:, None].split(WIDTH, dim=-1)
        tokens = normalised(tokens) * (1 + scale) + shift
    else:
        tokens = affine(w, "final_layer.norm_final", tokens)
    out = linear(w, "final_layer.linear", tokens).reshape(n, grid, grid, PATCH, PATCH, -1)
    return out.permute(0, 5, 1, 3, 2, 4).reshape(n, -1, side, side)


@pytest.mark.parametrize("design", BLOCKS)
def test_output_and_gradients_are_those_of_the_description(design):
    sizes = {"input_size": SIDE, "in_channels": 4, "num_classes": CLASSES, "patch": PATCH}
    spec = harness.get_backbone("dit-xs-2" + ("" if design == "adaln-zero" else f"-{design}"))
    net = spec.build(**sizes, depth=DEPTH, width=WIDTH, heads=HEADS).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():  # the gates and the output are zero before training
            if parameter.requires_grad:
                parameter.normal_(std=0.2, generator=generator)
    net.t_embedder.mlp.register_forward_pre_hook(lambda module, given: (given[0].double(),))
    x = torch.randn(3, 4, SIDE, SIDE, dtype=torch.float64, generator=generator)
    weighted = torch.randn(3, 8, SIDE, SIDE, dtype=torch.float64, generator=generator)
    t, y = torch.tensor([0, 31, 700]), torch.tensor([1, 4, CLASSES])
    results = []
    for call in (net, lambda *inputs: by_hand(design, dict(net.state_dict(keep_vars=True)), *inputs)):
        net.zero_grad()
        image = x.clone().requires_grad_()
        out = call(image, t, y)
        (out * weighted).sum().backward()
        gradients = {name: each.grad.clone() for name, each in net.named_parameters() if each.requires_grad}
        results.append({"output": out.detach(), "image": image.grad, **gradients})
    mine, described = results
    assert mine.keys() == described.keys() and mine["output"].std() > 0.1
    largest = max(each.norm() for each in described.values())
    for name, each in described.items():
        assert (mine[name] - each).norm() < 1e-8 * each.norm() + 1e-12 * largest, name
