"""The layout of a run over its processes: batches are divided among all of them, weights where --mesh asks for it.

`--mesh DATAxMODEL`: with MODEL 1 every process holds all weights (DistributedDataParallel). Otherwise weights, averages
and moments are sharded over MODEL processes (fully_shard, FSDP2). Noise, timesteps and flips belong to images, so any mesh
makes the same run up to the order of sums, and on CPUs the same mesh makes the same bits. The masks of a network's own
dropout are the exception: the first image of a micro-batch seeds them, so another division into micro-batches draws other
masks of the same distribution.
"""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist

from harness.distributed.mesh import MeshShape
from harness.engines.torch import process_group
from harness.errors import UserError
from harness.runs.run import Resolved

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def mesh_of(shape: str | None, created: str = "1x1") -> MeshShape:
    """The mesh of the processes at work now.

    shape: of `--mesh`; None keeps MODEL of `created`, the mesh that the run was created with, and adapts DATA.

    Raises UserError where the number of processes does not fit.
    """
    size = process_group.size()
    if shape is None:
        model = MeshShape.parse(created).model
        if size % model:
            raise UserError(
                f"the run divides its weights over {model} processes, and {size} work here; give --mesh DATAxMODEL"
            )
        return MeshShape(size // model, model)
    mesh = MeshShape.parse(shape)
    if mesh.size != size:
        start = f"torchrun --nproc-per-node {mesh.size} -m harness ..."
        raise UserError(f"--mesh {shape} takes {mesh.size} processes, and {size} work here; start them with {start}")
    return mesh


def adapt_to_processes(resolved: Resolved, mesh: str | None, batch: int) -> Resolved:
    """`resolved`, adapted to the processes at work now, which may be more or fewer than when the run was created.

    The same number of processes gives the same bits. Micro-batches do not grow. The threads of all processes together do
    not grow either, except that each process has at least one.
    """
    return dataclasses.replace(
        resolved,
        mesh=str(mesh_of(mesh, resolved.mesh)),
        micro_batch=min(resolved.micro_batch, local_batch(batch)),
        threads=threads(resolved),
    )


def threads(resolved: Resolved) -> int:
    """Threads of each process: an equal share of the sum when the run was created, rounded down, and at least 1.

    For a result of `adapt_to_processes` these are `resolved.threads`: its mesh has as many processes as work now.
    """
    return max(1, resolved.threads * MeshShape.parse(resolved.mesh).size // process_group.size())


def local_batch(batch: int) -> int:
    """The number of images of a global batch for each process. Raises UserError if the batch cannot be divided."""
    size = process_group.size()
    if batch % size:
        raise UserError(
            f"batches of {batch} cannot be divided over {size} processes; start a number of them that divides it, or "
            "give another --set batch=N"
        )
    return batch // size


def shard(net: torch.nn.Module, mesh: MeshShape, device: torch.device) -> torch.nn.Module:
    """Shard the weights of `net` over MODEL processes, in place, and return it.

    Does nothing if MODEL is 1 or `net` is sharded already. Raises UserError if this version of torch has no FSDP2.
    """
    if mesh.model == 1:
        return net
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard
    except ImportError as error:
        raise UserError(f"--mesh {mesh} needs torch 2.6 or newer; give --mesh {mesh.size}x1") from error
    if isinstance(net, FSDPModule):
        return net
    # FSDP2 warns at each pass that the network's output must not be written to. Nothing here does.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    with process_group.translate_dist_errors():
        # Over two axes, fully_shard replicates the weights over the first and shards them over the second.
        if mesh.data == 1:
            devices = init_device_mesh(device.type, (mesh.model,), mesh_dim_names=("model",))
        else:
            devices = init_device_mesh(device.type, (mesh.data, mesh.model), mesh_dim_names=("data", "model"))
        for block in blocks(net):
            fully_shard(block, mesh=devices)
        fully_shard(net, mesh=devices)  # the weights outside the blocks
    return net


def blocks(net: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Yields the modules that FSDP gathers as units: the items of the network's outermost ModuleLists.

    For ModuleLists of ModuleLists, the items of the inner ones. Nothing inside an item is a unit of its own.
    """
    for child in net.children():
        if isinstance(net, torch.nn.ModuleList) and not isinstance(child, torch.nn.ModuleList):
            yield child
        else:
            yield from blocks(child)


def largest_block(net: torch.nn.Module) -> int:
    """The number of parameters of the largest block of `net`; 0 if it has no blocks."""
    return max((sum(weight.numel() for weight in block.parameters()) for block in blocks(net)), default=0)


class DataParallelModel:
    """A network over the processes of the group: `call`, its forward pass for the trainer, and sums over all processes.

    net: sharded already where the mesh shards weights, see `shard`; otherwise it is wrapped in DistributedDataParallel,
    if there are several processes.
    """

    def __init__(self, net: torch.nn.Module, mesh: MeshShape):
        self.size, self._index = process_group.size(), process_group.index()
        self._sharded = mesh.model > 1
        self._net = net
        self._ddp: torch.nn.parallel.DistributedDataParallel | None = None
        if self.size > 1 and not self._sharded:
            ddp = torch.nn.parallel.DistributedDataParallel
            with process_group.translate_dist_errors():
                # Buffers are copied once a step, by `broadcast_buffers`, and not at each forward pass. Newer versions of
                # torch have another name for this option.
                new = "forward_sync_buffers" in signature(ddp).parameters
                options: dict[str, Any] = {"forward_sync_buffers" if new else "broadcast_buffers": False}
                self._ddp = ddp(net, gradient_as_bucket_view=True, **options)
        self.call: Callable[..., torch.Tensor] = net if self._ddp is None else self._ddp

    @property
    def needs_warmup(self) -> bool:
        """Whether the results of the first forward and backward pass in this process have to be thrown away.

        DDP assigns gradients to new buckets after its first pass, and sums in another order from then on. The first step
        of a continued run would therefore have other bits than the same step of a run that was never interrupted.
        """
        return self._ddp is not None

    def local_part(self, positions: range) -> range:
        """This process's part, N / size positions, of the N of a global batch."""
        share = len(positions) // self.size
        assert share * self.size == len(positions)  # or `local_batch` had raised
        return positions[self._index * share :][:share]

    def micro_batch_context(self, last: bool) -> AbstractContextManager[None]:
        """Context for the passes of one micro-batch. last: whether it is the last of the global batch.

        DDP averages gradients over processes in the last micro-batch only. Sharded weights average them in each one, so that
        no process holds all gradients.
        """
        return nullcontext() if last or self._ddp is None else self._ddp.no_sync()

    def clip(self, weights: Sequence[torch.Tensor], norm: float) -> None:
        """Scale the gradients of `weights` down, in place, to a total L2 norm of at most `norm`."""
        if not self._sharded:
            torch.nn.utils.clip_grad_norm_(weights, norm, foreach=True)
            return
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        total = full_tensor(torch.nn.utils.get_total_norm(gradients, foreach=True))  # of the shards of all processes
        torch.nn.utils.clip_grads_with_norm_(weights, norm, total, foreach=True)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Replace `values` by their sum over all processes, in place, and return them. All processes must call this."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def all(self, condition: torch.Tensor) -> bool:
        """Whether the bool scalar `condition` holds in every process. All processes must call this."""
        return bool(self.sum((~condition).int()) == 0)  # the number of processes in which it does not hold

    def broadcast_buffers(self) -> None:
        """Copy the main process's buffers, such as running statistics, to all processes."""
        if self.size > 1:
            for buffer in self._net.buffers():
                dist.broadcast(buffer, 0)


def is_sharded(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    """Whether the tensor is a DTensor. Only fully_shard makes them, which imports their module; it takes a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process holds, as a plain detached tensor that shares its memory.

    Of a tensor that is not sharded, the whole.
    """
    tensor = tensor.detach()
    return tensor._local_tensor if is_sharded(tensor) else tensor


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor, detached. All processes must call this if it is sharded."""
    tensor = tensor.detach()
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def shard_slice(tensor: torch.Tensor) -> tuple[slice, ...]:
    """Where the part that this process holds lies in the whole tensor: a slice for each axis. The part may be empty."""
    if not is_sharded(tensor):
        return tuple(slice(None) for _ in tensor.shape)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(begin, begin + side) for begin, side in zip(offset, shape, strict=True))
