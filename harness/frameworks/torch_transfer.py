"""Copies between the host and a torch device for which neither waits for the other, where the device can do that.

On a GPU a copy is queued like a kernel, if the memory on the host is pinned. Elsewhere all of this is plain copying.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

ALIGNMENT = 16  # bytes: where a tensor begins in a packed buffer


def queues_copies(device: torch.device) -> bool:
    """Whether copies to and from `device` are queued behind its work, so that the host need not wait for them."""
    return device.type == "cuda"


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on `device`. A GPU copies it from pinned memory, without waiting for the work before it."""
    if not queues_copies(device) or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Packed:
    """Tensors of the host that go to a device in one copy.

    The constructor may run in another thread than `to_device`: it does the work of the host, and launches nothing.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], device: torch.device):
        self._tensors, self._device = list(tensors), device
        self._buffer: torch.Tensor | None = None
        if not queues_copies(device):
            return
        self._starts, end = [], 0
        for tensor in tensors:
            self._starts.append(end)
            end += math.ceil(tensor.nbytes / ALIGNMENT) * ALIGNMENT
        self._buffer = pinned_bytes(end)
        for tensor, view in zip(tensors, self._views(self._buffer), strict=True):
            view.copy_(tensor)

    def to_device(self) -> list[torch.Tensor]:
        """The tensors on the device, in the order given."""
        if self._buffer is None:
            return [tensor.to(self._device) for tensor in self._tensors]
        return self._views(self._buffer.to(self._device, non_blocking=True))

    def _views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        return [
            buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for start, tensor in zip(self._starts, self._tensors, strict=True)
        ]


def pinned_bytes(count: int) -> torch.Tensor:
    """uint8 (count,) of pinned memory, not filled."""
    return torch.empty(count, dtype=torch.uint8, pin_memory=True)


class HostCopy:
    """The values of a tensor on the host, which a GPU copies there when it has them. `tensor` must not change later."""

    def __init__(self, tensor: torch.Tensor):
        self._values, self._event = tensor, None
        if queues_copies(tensor.device):
            self._values = tensor.to("cpu", non_blocking=True)  # torch makes the target of such a copy pinned
            self._event = torch.cuda.current_stream(tensor.device).record_event()

    def wait(self) -> torch.Tensor:
        """The values, on the CPU. Waits until they are there, and for no work that was queued after them."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.cpu()
