"""Independence check: diffusers' DiT with our weights gives our output and our gradients.

diffusers is not numerically DiT: its timestep frequencies are spaced by 1/127 and its second layer norm has eps 1e-5
(huggingface/diffusers 58eb52c080, embeddings.py and attention.py). Both are corrected here.
"""

import pytest
import torch

from backbones.dit.spec import SPECS

diffusers = pytest.importorskip("diffusers")

SPEC = next(spec for spec in SPECS if spec.name == "dit-s-4")
DEPTH = 2


def to_diffusers(state):
    """Our state dict under diffusers' names; timestep and label embeddings are copied into every block."""
    out = {"pos_embed.proj.weight": "x_embedder.proj.weight", "pos_embed.proj.bias": "x_embedder.proj.bias"}
    for kind in ("weight", "bias"):
        out[f"proj_out_1.{kind}"] = f"final_layer.adaLN_modulation.1.{kind}"
        out[f"proj_out_2.{kind}"] = f"final_layer.linear.{kind}"
    tensors = {theirs: state[ours] for theirs, ours in out.items()}
    for index in range(DEPTH):
        ours, theirs = f"blocks.{index}", f"transformer_blocks.{index}"
        for kind in ("weight", "bias"):
            for part, value in zip("qkv", state[f"{ours}.attn.qkv.{kind}"].chunk(3), strict=True):
                tensors[f"{theirs}.attn1.to_{part}.{kind}"] = value
            tensors[f"{theirs}.attn1.to_out.0.{kind}"] = state[f"{ours}.attn.proj.{kind}"]
            tensors[f"{theirs}.ff.net.0.proj.{kind}"] = state[f"{ours}.mlp.fc1.{kind}"]
            tensors[f"{theirs}.ff.net.2.{kind}"] = state[f"{ours}.mlp.fc2.{kind}"]
            tensors[f"{theirs}.norm1.linear.{kind}"] = state[f"{ours}.adaLN_modulation.1.{kind}"]
            embedder = f"{theirs}.norm1.emb.timestep_embedder"
            tensors[f"{embedder}.linear_1.{kind}"] = state[f"t_embedder.mlp.0.{kind}"]
            tensors[f"{embedder}.linear_2.{kind}"] = state[f"t_embedder.mlp.2.{kind}"]
        table = f"{theirs}.norm1.emb.class_embedder.embedding_table.weight"
        tensors[table] = state["y_embedder.embedding_table.weight"]
    return tensors


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    ours = SPEC.build(depth=DEPTH)
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(std=0.02)
    a = SPEC.defaults
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=a["heads"],
        attention_head_dim=a["width"] // a["heads"],
        in_channels=4,
        out_channels=8,
        num_layers=DEPTH,
        patch_size=a["patch"],
        sample_size=32,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
        attention_bias=True,
    )
    theirs.load_state_dict(to_diffusers(ours.state_dict()), strict=True)
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm3.eps = 1e-6
    return ours.eval(), theirs.eval()


def inputs():
    torch.manual_seed(2)
    return torch.randn(2, 4, 32, 32), torch.tensor([3, 777]), torch.tensor([207, 1000])


def test_same_weights_give_the_same_output(pair):
    ours, theirs = pair
    x, t, y = inputs()
    with torch.no_grad():
        mine, other = ours(x, t, y), theirs(x, timestep=t, class_labels=y).sample
    assert mine.dtype == other.dtype == torch.float32 and mine.shape == other.shape == (2, 8, 32, 32)
    assert mine.std() > 0.1
    torch.testing.assert_close(mine, other, rtol=0, atol=5e-5)


def test_same_weights_give_the_same_gradients(pair):
    ours, theirs = pair
    x, t, y = inputs()
    target = torch.randn(2, 8, 32, 32)
    for net, call in ((ours, lambda: ours(x, t, y)), (theirs, lambda: theirs(x, timestep=t, class_labels=y).sample)):
        net.zero_grad()
        torch.nn.functional.mse_loss(call(), target).backward()
    for mine, other in (
        (ours.blocks[0].mlp.fc1.weight, theirs.transformer_blocks[0].ff.net[0].proj.weight),
        (ours.blocks[0].adaLN_modulation[1].weight, theirs.transformer_blocks[0].norm1.linear.weight),
        (ours.x_embedder.proj.weight, theirs.pos_embed.proj.weight),
        (ours.final_layer.linear.bias, theirs.proj_out_2.bias),
    ):
        assert mine.grad.any()
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-3 * other.grad.abs().max().item())
