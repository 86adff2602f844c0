"""Memory of the activations that a training step stores for its backward pass, measured on the meta device."""

from __future__ import annotations

from typing import Any

import torch

from harness.compute.meta_torch import FusedAttention, build_on_meta, example_inputs, neutral_state
from harness.spec import BackboneSpec

UNET_BLOCK_SHARE = 4  # the largest block of a U-Net stores less than 1/4 of all activations


def activation_bytes(spec: BackboneSpec, **overrides: object) -> int:
    """Bytes that the float32 forward pass of one image stores for the backward pass.

    The sum of all storages that autograd saves, without parameters and inputs, and without the memory of the loss and
    the backward pass. With `gradient_checkpointing`: the inputs of all blocks and the activations inside one block.
    """
    saved = _saved_bytes(spec, overrides)
    arguments = spec.arguments(**overrides)
    if arguments.get("gradient_checkpointing"):
        everything = _saved_bytes(spec, {**overrides, "gradient_checkpointing": False})
        saved += max(everything - saved, 0) // (arguments.get("depth") or UNET_BLOCK_SHARE)
    return saved


def _saved_bytes(spec: BackboneSpec, overrides: dict[str, Any]) -> int:
    arguments = spec.arguments(**overrides)
    storages: dict[int, torch.UntypedStorage] = {}  # by address; stored, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    with neutral_state(), torch.enable_grad():
        net = build_on_meta(spec, overrides).train()
        inputs = example_inputs(spec, arguments)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), FusedAttention():
            out = net(*inputs)
    excluded = {tensor.untyped_storage()._cdata for tensor in [*net.parameters(), *net.buffers(), *inputs]}
    total = sum(storage.nbytes() for address, storage in storages.items() if address not in excluded)
    del out
    return total
