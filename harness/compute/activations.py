"""Memory of the activations that a training step stores for its backward pass, measured on the meta device."""

from __future__ import annotations

from typing import Any

import torch

from harness.compute.meta_torch import FusedAttention, build_on_meta, example_inputs, neutral_state
from harness.spec import BackboneSpec

UNET_EQUAL_BLOCKS = 4  # a U-Net counts as 4 equal blocks: its largest block stores less than 1/4 of all activations


def activation_bytes(spec: BackboneSpec, **overrides: object) -> int:
    """Bytes that the float32 forward pass of one image stores for the backward pass.

    The sum of all storages that autograd saves, without parameters and inputs, and without the memory of the loss and
    the backward pass. With `gradient_checkpointing`: what the checkpointed network saves, such as the inputs of its
    blocks, plus the activations inside one block, which are recomputed. overrides: arguments of the builder.
    """
    saved = _saved_bytes(spec, overrides)
    arguments = spec.arguments(**overrides)
    if arguments.get("gradient_checkpointing"):
        without_checkpointing = _saved_bytes(spec, {**overrides, "gradient_checkpointing": False})
        saved += max(without_checkpointing - saved, 0) // (arguments.get("depth") or UNET_EQUAL_BLOCKS)
    return saved


def _saved_bytes(spec: BackboneSpec, overrides: dict[str, Any]) -> int:
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
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), FusedAttention():
            net(*inputs)
    excluded = {tensor.untyped_storage()._cdata for tensor in [*net.parameters(), *net.buffers(), *inputs]}
    return sum(storage.nbytes() for address, storage in storages.items() if address not in excluded)
