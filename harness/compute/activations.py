"""Memory of the activations that a training step stores for its backward pass, measured on the meta device."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from harness.compute.meta_torch import FusedAttention, GpuAutocast, build_on_meta, example_inputs, neutral_state
from harness.spec import BackboneSpec

UNET_EQUAL_BLOCKS = 4  # a U-Net counts as 4 equal blocks: its largest block stores less than 1/4 of all activations


def activation_bytes(spec: BackboneSpec, **overrides: object) -> int:
    """Bytes that the float32 forward pass of one image stores for the backward pass.

    The sum of all storages that autograd saves, without parameters and inputs, and without the memory of the loss and
    the backward pass. With `gradient_checkpointing`: what the checkpointed network saves, such as the inputs of its
    blocks, plus the activations inside one block, which are recomputed. overrides: arguments of the builder.
    """
    return _activation_bytes(spec, overrides, "float32")


def activation_bytes_by_precision(spec: BackboneSpec, **overrides: object) -> dict[str, int]:
    """`activation_bytes` by precision. In bfloat16: of autocast on a GPU, which keeps normalisations in float32.

    Of a network that fails in bfloat16 it is the figure of float32.
    """
    full = activation_bytes(spec, **overrides)
    try:
        lower = min(_activation_bytes(spec, overrides, "bfloat16"), full)
    except (RuntimeError, TypeError, NotImplementedError):
        lower = full
    return {"float32": full, "tf32": full, "bfloat16": lower}


def _activation_bytes(spec: BackboneSpec, overrides: dict[str, Any], precision: str) -> int:
    """`activation_bytes` in "float32" or "bfloat16"."""
    saved = _saved_bytes(spec, overrides, precision)
    arguments = spec.arguments(**overrides)
    if arguments.get("gradient_checkpointing"):
        without_checkpointing = _saved_bytes(spec, {**overrides, "gradient_checkpointing": False}, precision)
        saved += max(without_checkpointing - saved, 0) // (arguments.get("depth") or UNET_EQUAL_BLOCKS)
    return saved


def _saved_bytes(spec: BackboneSpec, overrides: dict[str, Any], precision: str) -> int:
    """Bytes of the storages that autograd saves in a forward pass of one image, without parameters, buffers and inputs."""
    arguments = spec.arguments(**overrides)
    # address -> storage. Views share a storage, which counts once. The dict keeps a storage alive, so that no other one
    # gets its address.
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    with neutral_state(), torch.enable_grad():
        net = build_on_meta(spec, overrides).train()
        inputs = example_inputs(spec, arguments)
        autocast = GpuAutocast()
        keep = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with keep, FusedAttention(), autocast if precision == "bfloat16" else nullcontext():
            net(*inputs)
    others = [*net.parameters(), *net.buffers(), *inputs, *autocast.casts.values()]
    excluded = {tensor.untyped_storage()._cdata for tensor in others}
    return sum(storage.nbytes() for address, storage in storages.items() if address not in excluded)
