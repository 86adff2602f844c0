"""Check that a network keeps as much memory for its backward pass as plans assume."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harness.compute.activations import activation_bytes
from harness.compute.meta_torch import FusedAttention, build_on_meta, example_inputs, neutral_state
from harness.conformance.network import Failure
from harness.conformance.subject import Subject

TOLERANCE = 1.1  # times the plan: small tensors may stay alive for other reasons


class _Storages(TorchDispatchMode):
    """Notes the storages that operations make, without keeping them alive."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def alive(self) -> dict[int, int]:
        """Address -> bytes of the storages that something still holds."""
        return {address: size for address, (reference, size) in self._made.items() if not reference.expired()}


def check_memory(subject: Subject) -> None:
    """Raise `Failure` where an image leaves more in memory until the backward pass than plans and micro-batches count.

    They count what autograd is given to save, on the meta device; here everything counts that stays alive there.
    """
    planned = activation_bytes(subject.spec, **subject.arguments)
    kept = _kept_bytes(subject)
    if kept > TOLERANCE * planned:
        raise Failure(
            f"expected {planned:,} bytes an image to be kept for the backward pass, as plans count them, came {kept:,}: keep "
            "tensors with ctx.save_for_backward, not as attributes of ctx or of a module"
        )


def _kept_bytes(subject: Subject) -> int:
    """Bytes that a forward pass of one image leaves in memory, without parameters, buffers, inputs and output."""
    with neutral_state(), torch.enable_grad():
        net = build_on_meta(subject.spec, subject.arguments).train()
        inputs = example_inputs(subject.spec, subject.arguments)
        with _Storages() as storages, FusedAttention():
            out = net(*inputs)
    excluded = {tensor.untyped_storage()._cdata for tensor in (*net.parameters(), *net.buffers(), *inputs, out)}
    return sum(size for address, size in storages.alive().items() if address not in excluded)
