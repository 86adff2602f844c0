"""Memory that a training step holds for its backward pass, measured without running it."""

from __future__ import annotations

from typing import Any

import torch

from harness.compute.meta_torch import FusedAttention, build_on_meta, example_inputs, neutral_state
from harness.spec import BackboneSpec

UNEQUAL_BLOCKS = 4  # the largest block of a U-Net keeps less than this part of the whole


def activation_bytes(spec: BackboneSpec, **overrides: Any) -> int:
    """Bytes that one image's forward pass in float32 leaves for the backward pass: an estimate of a step's memory.

    Distinct storages that autograd saves, without parameters and inputs. What the loss and the backward pass itself
    need is not in it. With `gradient_checkpointing` it is the inputs of the blocks and the inside of one block.
    """
    saved = _saved_bytes(spec, overrides)
    arguments = spec.arguments(**overrides)
    if arguments.get("gradient_checkpointing"):
        everything = _saved_bytes(spec, {**overrides, "gradient_checkpointing": False})
        saved += max(everything - saved, 0) // (arguments.get("depth") or UNEQUAL_BLOCKS)
    return saved


def _saved_bytes(spec: BackboneSpec, overrides: dict[str, Any]) -> int:
    arguments = spec.arguments(**overrides)
    storages: dict[int, torch.UntypedStorage] = {}  # holding them keeps their addresses from being used again

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
