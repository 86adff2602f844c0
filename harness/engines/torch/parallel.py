"""How a run lies over its processes: every batch divided among them, and weights, averages and moments where asked.

`--mesh DATAxMODEL` names both: with MODEL 1 each process holds all weights (DistributedDataParallel), else each holds
its part of them over MODEL processes (fully_shard, FSDP2). What is random belongs to images, so any mesh makes the same
run up to the order of sums; the same mesh makes the same bits. Not so the masks of a network's own dropout: the first image
of a micro-batch seeds them, and another division into micro-batches draws others, of the same distribution.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from inspect import signature

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from harness.distributed.launch import mesh_sides
from harness.engines.torch import process_group
from harness.errors import UserError
from harness.runs.run import Resolved


def mesh_of(shape: str | None, created: str = "1x1") -> tuple[int, int]:
    """DATA and MODEL of these processes. None: MODEL as the run was created, DATA what that leaves."""
    size = process_group.size()
    if shape is None:
        model = mesh_sides(created)[1]
        if size % model:
            raise UserError(
                f"the run divides its weights over {model} processes, and {size} work here; give --mesh DATAxMODEL"
            )
        return size // model, model
    data, model = mesh_sides(shape)
    if data * model != size:
        start = f"torchrun --nproc-per-node {data * model} -m harness ..."
        raise UserError(f"--mesh {shape} takes {data * model} processes, and {size} work here; start them with {start}")
    return data, model


def here(resolved: Resolved, mesh: str | None, batch: int) -> Resolved:
    """What was frozen, as it holds for the processes of now, which may be more or fewer than when the run was created.

    An equal number gives an equal result. Micro-batches grow no larger, and threads no more in all.
    """
    data, model = mesh_of(mesh, resolved.mesh)
    return dataclasses.replace(
        resolved,
        mesh=f"{data}x{model}",
        micro_batch=min(resolved.micro_batch, check_batch(batch)),
        threads=threads(resolved),
    )


def threads(resolved: Resolved) -> int:
    """Of each process, so that all have as many as when the run was created."""
    data, model = mesh_sides(resolved.mesh)
    return max(1, resolved.threads * data * model // process_group.size())


def check_batch(batch: int) -> int:
    """Images of a batch for each process; what cannot be divided is refused."""
    size = process_group.size()
    if batch % size:
        raise UserError(
            f"batches of {batch} cannot be divided over {size} processes; start a number of them that divides it, or "
            "give another --set batch=N"
        )
    return batch // size


def shard(net: torch.nn.Module, mesh: tuple[int, int], device: torch.device) -> torch.nn.Module:
    """Divide the weights of `net` over MODEL processes, in place, unless they are; MODEL 1 leaves them."""
    data, model = mesh
    if model == 1:
        return net
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard
    except ImportError as error:
        raise UserError(f"--mesh {data}x{model} needs torch 2.6 or newer; give --mesh {data * model}x1") from error
    if isinstance(net, FSDPModule):
        return net
    # Nothing writes into the network's output, of which FSDP2 warns at each pass.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    with process_group.translate_dist_errors():
        if data == 1:
            over = init_device_mesh(device.type, (model,), mesh_dim_names=("model",))
        else:
            over = init_device_mesh(device.type, (data, model), mesh_dim_names=("data", "model"))
        for unit in units(net):
            fully_shard(unit, mesh=over)
        fully_shard(net, mesh=over)
    return net


def units(net: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """What is gathered as one while it computes: the blocks of a network, which it keeps in lists."""
    for child in net.children():
        if isinstance(net, torch.nn.ModuleList) and not isinstance(child, torch.nn.ModuleList):
            yield child
        else:
            yield from units(child)


def largest_unit(net: torch.nn.Module) -> int:
    """Parameters of the largest block of `net`."""
    return max((sum(each.numel() for each in unit.parameters()) for unit in units(net)), default=0)


class DataParallelModel:
    """A network over the processes of the process group: what the trainer calls, and the sums over all of them."""

    def __init__(self, net: torch.nn.Module, mesh: tuple[int, int]):
        self.size, self._index = process_group.size(), process_group.index()
        self._sharded = mesh[1] > 1
        self._net = net
        self.call: Callable[..., torch.Tensor] = net
        if self.size > 1 and not self._sharded:
            ddp = torch.nn.parallel.DistributedDataParallel
            aside = (
                "forward_sync_buffers" if "forward_sync_buffers" in signature(ddp).parameters else "broadcast_buffers"
            )
            with process_group.translate_dist_errors():
                self.call = ddp(net, gradient_as_bucket_view=True, **{aside: False})

    @property
    def warmup(self) -> bool:
        """Whether a first pass is to be thrown away. DDP divides gradients into buckets anew after it; a run that
        continues would sum in another order than one that went on."""
        return self.call is not self._net

    def mine(self, positions: torch.Tensor) -> torch.Tensor:
        """Of a global batch (N,) the images of this process, (N / size,)."""
        return positions.tensor_split(self.size)[self._index]

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Around the passes of a micro-batch. Gradients are averaged over processes with the last one, and where weights
        are divided with each, so that nobody holds all of them."""
        return nullcontext() if last or self._sharded or self.size == 1 else self.call.no_sync()

    def clip(self, weights: list[torch.Tensor], norm: float) -> None:
        """Scale gradients down to `norm` over all of them."""
        if not self._sharded:
            torch.nn.utils.clip_grad_norm_(weights, norm, foreach=True)
            return
        total = torch.nn.utils.get_total_norm([each.grad for each in weights], foreach=True)
        torch.nn.utils.clip_grads_with_norm_(weights, norm, total.full_tensor(), foreach=True)

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over processes."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def everywhere(self, holds: torch.Tensor) -> bool:
        """Whether it holds in every process."""
        return bool(self.total((~holds).int()) == 0)

    def leaders_buffers(self) -> None:
        """Running statistics of a network that keeps some are the leader's."""
        if self.size > 1:
            for buffer in self._net.buffers():
                dist.broadcast(buffer, 0)


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor, as a plain one that shares its memory."""
    return tensor.detach()._local_tensor if isinstance(tensor, DTensor) else tensor.detach()


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor; where it is divided every process must ask."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_slice(tensor: torch.Tensor) -> tuple[slice, ...]:
    """Which part of the whole this process holds."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(None) for _ in tensor.shape)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(begin, begin + side) for begin, side in zip(offset, shape, strict=True))
