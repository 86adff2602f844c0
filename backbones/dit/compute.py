"""Closed-form compute and parameters of a DiT; the convention is `harness.compute.CONVENTION`.

It reproduces the parameters of all 16 networks of the paper (arXiv:2212.09748, Table 4) and the Gflops of 15: for
DiT-B/4 it gives 5.57, the paper prints 5.56. Parts are named by module path.
"""

from __future__ import annotations

from backbones.dit.layout import MLP_RATIO, TIME_FEATURES, check_arguments
from harness.spec import Compute, ComputeRow


def count(
    *,
    input_size: int,
    in_channels: int,
    num_classes: int,
    out_channels: int | None,
    depth: int,
    width: int,
    heads: int,
    patch: int,
    block: str,
    gradient_checkpointing: bool = False,
) -> Compute:
    """Compute of one forward pass on one image, by part. `heads` and `gradient_checkpointing` have no effect.

    Raises UserError for arguments from which no network can be built.
    """
    check_arguments(
        input_size=input_size,
        in_channels=in_channels,
        num_classes=num_classes,
        out_channels=out_channels,
        depth=depth,
        width=width,
        heads=heads,
        patch=patch,
        block=block,
        gradient_checkpointing=gradient_checkpointing,
    )
    d = width
    image_tokens = (input_size // patch) ** 2
    tokens = image_tokens + (2 if block == "in-context" else 0)  # inside the blocks; 2: timestep and class
    patch_in = patch * patch * in_channels
    patch_out = patch * patch * (2 * in_channels if out_channels is None else out_channels)
    chunks = {"adaln-zero": 6, "adaln": 4}.get(block, 0)  # number of shifts, scales and gates that a block regresses

    rows: list[ComputeRow] = []
    params = 0

    def linear(part: str, inputs: int, outputs: int, vectors: int, kind: str = "linear") -> None:
        """Add a linear layer with bias, applied to a number of vectors. kind: "conv" for the patch embedding."""
        nonlocal params
        params += (inputs + 1) * outputs
        rows.append(ComputeRow(part, kind, inputs * outputs * vectors))

    def layer_norm(part: str, vectors: int, *, affine: bool, counted: bool = True) -> None:
        """Add a layer norm. counted: whether the paper's Gflops include it; its parameters are added in any case."""
        nonlocal params
        params += 2 * d if affine else 0
        if counted:
            rows.append(ComputeRow(part, "norm", vectors * d))

    def attention(part: str, queries: int, keys: int) -> None:
        """Add scaled dot-product attention; the number of heads does not change the compute."""
        rows.append(ComputeRow(part, "attention", 2 * queries * keys * d))  # scores, and the weighted sum of values

    linear("t_embedder.mlp.0", TIME_FEATURES, d, vectors=1)
    linear("t_embedder.mlp.2", d, d, vectors=1)
    params += (num_classes + 1) * d  # label table: a look-up is free
    linear("x_embedder.proj", patch_in, d, image_tokens, kind="conv")

    affine = chunks == 0  # without adaLN, the layer norms have learned scales and shifts
    for index in range(depth):
        path = f"blocks.{index}"
        if chunks:
            linear(f"{path}.adaLN_modulation.1", d, chunks * d, vectors=1)
        layer_norm(f"{path}.norm1", tokens, affine=affine)
        linear(f"{path}.attn.qkv", d, 3 * d, tokens)
        attention(f"{path}.attn", tokens, tokens)
        linear(f"{path}.attn.proj", d, d, tokens)
        if block == "cross-attention":
            layer_norm(f"{path}.norm_cross", tokens, affine=True, counted=False)
            linear(f"{path}.cross_attn.q", d, d, tokens)
            linear(f"{path}.cross_attn.kv", d, 2 * d, vectors=2)  # two conditioning tokens: timestep and class
            attention(f"{path}.cross_attn", tokens, 2)
            linear(f"{path}.cross_attn.proj", d, d, tokens)
        layer_norm(f"{path}.norm2", tokens, affine=affine)
        linear(f"{path}.mlp.fc1", d, MLP_RATIO * d, tokens)
        linear(f"{path}.mlp.fc2", MLP_RATIO * d, d, tokens)

    if chunks:
        linear("final_layer.adaLN_modulation.1", d, 2 * d, vectors=1)
    layer_norm("final_layer.norm_final", image_tokens, affine=affine, counted=False)
    linear("final_layer.linear", d, patch_out, image_tokens)
    return Compute(params=params, rows=tuple(rows))
