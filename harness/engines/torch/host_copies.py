"""The tensors of a checkpoint on the host: as they are, or as copies, which a thread writes while the training goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from harness.engines.interfaces import Parts
from harness.engines.torch import process_group
from harness.engines.torch.parallel import full_tensor
from harness.errors import one_line

logger = logging.getLogger(__name__)

FREE_SHARE = 0.5  # of the memory that a training step leaves free which copies may take


def peak_bytes(device: torch.device) -> int:
    """The most memory that tensors have taken on a GPU since this process began; 0 elsewhere."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


@process_group.translate_dist_errors()
def whole_arrays(tensors: Callable[[], dict[str, Tensor]]) -> dict[str, np.ndarray]:
    """The whole tensors as arrays in the main process, and an empty dict in the others. All processes must call this.

    An array shares the memory of a tensor on the CPU.

    torch.distributed.checkpoint would let every process write its shards, in two thirds of the time (dit-b-2 over two
    processes, one disk). But it writes pickles, which this project never reads; and one complete set of files with checksums
    serves any number of processes, both frameworks, and sampling.
    """
    arrays = {}
    for name, value in tensors().items():
        full = full_tensor(value)
        if process_group.index() == 0:
            arrays[name] = full.cpu().numpy()
    return arrays


@process_group.translate_dist_errors()
def host_copies(
    parts: list[tuple[str, Callable[[], dict[str, Tensor]]]], device: torch.device, step_bytes: int
) -> Parts:
    """`state_dicts(copy=True)` of the whole tensors of `parts`. All processes must call this.

    step_bytes: `peak_bytes` of a training step without such copies.
    """
    copy = _CudaCopy(device, step_bytes) if device.type == "cuda" else _HostCopy()
    found: Parts = []
    for part, tensors in parts:
        copies = {}
        for name, value in tensors().items():
            full = full_tensor(value)
            if process_group.index() == 0:
                copies[name] = copy(full)
        found.append((part, partial(_arrays, copies, copy.ready())))
    return found


def _arrays(copies: dict[str, Tensor], wait: Callable[[], object]) -> dict[str, np.ndarray]:
    wait()
    return {name: copied.numpy() for name, copied in copies.items()}


class _HostCopy:
    """Copies tensors to the host at once."""

    def __call__(self, tensor: Tensor) -> Tensor:
        return torch.from_numpy(tensor.cpu().numpy().copy())  # numpy asks for huge pages: half the time of a clone

    def ready(self) -> Callable[[], object]:
        return lambda: None


class _CudaCopy:
    """Copies tensors from a GPU to pinned memory, in the order of its current stream, without waiting.

    While there is room, a copy is made on the GPU first, and a stream of its own brings that to the host: then the next
    training step does not wait for the transfer, only for the copy. The rest is brought to the host in the current stream.
    Where the system gives no pinned memory (a limit of locked pages), the host waits for each tensor.
    """

    def __init__(self, device: torch.device, step_bytes: int):
        self._current, self._side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        # What the allocator holds beyond the needs of the next step is as good as free memory: it keeps the blocks of the
        # copies before.
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - step_bytes
        self._room = FREE_SHARE * max(free, 0)
        self._pins = True

    def __call__(self, tensor: Tensor) -> Tensor:
        pinned = self._pinned_like(tensor)
        if pinned is None:
            return tensor.to("cpu", copy=True)
        if tensor.nbytes > self._room:
            return pinned.copy_(tensor, non_blocking=True)
        self._room -= tensor.nbytes
        copied = tensor.clone()
        self._side.wait_stream(self._current)
        with torch.cuda.stream(self._side):
            pinned.copy_(copied, non_blocking=True)
        copied.record_stream(self._side)  # its memory is free for others after the transfer
        return pinned

    def _pinned_like(self, tensor: Tensor) -> Tensor | None:
        """Pinned memory on the host for `tensor`; None once there was none."""
        if not self._pins:
            return None
        try:
            return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        except RuntimeError as error:
            self._pins = False
            logger.warning(f"no pinned memory for a checkpoint ({one_line(error)}); the training waits for its copy")
            return None

    def ready(self) -> Callable[[], object]:
        """A function that waits, in any thread, until the copies up to now are on the host."""
        self._side.wait_stream(self._current)
        done = torch.cuda.Event(blocking=True)  # waits asleep
        done.record(self._side)
        return done.synchronize
