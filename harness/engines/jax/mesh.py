"""Devices in jax: a single one, or a mesh that batches and weights are sharded over; in one process or in several.

The mesh has the axes "data" and "model". A batch is sharded over both. Weights, averages and moments are sharded over
"model" alone, as in ZeRO and FSDP: every device holds its part, and the compiler gathers a layer where it is computed. The
mesh changes nothing else: randomness belongs to images, so one device and eight make the same run up to the order of sums.

The user's launcher starts several processes with the same command. JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
JAX_PROCESS_ID identify a process; on SLURM and Cloud TPU the cluster does, and JAX_NUM_PROCESSES is enough.
"""

from __future__ import annotations

import os
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from harness.distributed.mesh import MeshShape
from harness.engines.memory import device_error, host_free_bytes, processor_name
from harness.errors import UserError
from harness.runs.run import Resolved

Tree = TypeVar("Tree")

AXES = ("data", "model")
MIN_SHARDED = 1024  # elements: smaller parameters are replicated


def initialize() -> None:
    """Join the other processes, if there are any. Must be called before any other function of jax."""
    count = os.environ.get("JAX_NUM_PROCESSES")
    if count is None or jax.distributed.is_initialized():
        return
    process_id = os.environ.get("JAX_PROCESS_ID")  # None: the cluster tells it
    try:
        jax.distributed.initialize(num_processes=int(count), process_id=None if process_id is None else int(process_id))
    except (ValueError, RuntimeError, IndexError) as error:  # IndexError: an address without a port
        raise UserError(
            f"the {count} processes of JAX_NUM_PROCESSES cannot be joined ({str(error).splitlines()[0]}); set "
            "JAX_COORDINATOR_ADDRESS=HOST:PORT and JAX_PROCESS_ID as well, or unset all three for one process"
        ) from error


def pick_devices(name: str | None) -> list[jax.Device]:
    """All devices of a platform ("cpu", "cuda", "tpu"; None: jax's default), or one of them ("cuda:1").

    In a group of processes, the devices of all of them. Raises UserError where they are not available.
    """
    initialize()
    platform, colon, number = (name or "").partition(":")
    try:
        devices = jax.devices(platform or None)
    except RuntimeError as error:
        raise UserError(_unavailable(name, error)) from error
    if not colon:
        return devices
    if jax.process_count() > 1:
        raise UserError(
            f"--device {name} is one device, and {jax.process_count()} processes work here; give --device {platform}"
        )
    if not number.isdecimal() or int(number) >= len(devices):
        raise UserError(f"--device {name} is not available here: jax sees {len(devices)} of {platform}")
    return [devices[int(number)]]


def _unavailable(name: str | None, error: RuntimeError) -> str:
    """The message for a device that jax does not find. error: jax's, from the search for it."""
    try:
        platforms = ", ".join(sorted({device.platform for device in jax.devices()}))
    except RuntimeError:  # JAX_PLATFORMS names a platform that is absent, so no --device works
        return f"jax finds no devices here ({str(error).splitlines()[0]})"
    return f"--device {name} is not available to jax here (it has: {platforms}); see `harness doctor`"


def platform_name(mesh: Mesh) -> str:
    """The name of the mesh's platform, for `pick_devices`: "cuda" where jax itself says "gpu" for NVIDIA's."""
    platform = mesh.devices.flat[0].platform
    return "cuda" if platform == "gpu" and "cuda" in mesh.devices.flat[0].client.platform_version.lower() else platform


def make_mesh(devices: list[jax.Device], shape: str | None) -> Mesh:
    """The mesh of `shape`, "DATAxMODEL", over the first devices; None puts all devices along "data".

    Raises UserError if there are too few devices, or if several processes would leave some out.
    """
    sides = MeshShape(len(devices), 1) if shape is None else MeshShape.parse(shape)
    # With several processes no device may be left out: every process takes part in the computation, with all its devices.
    if sides.size > len(devices) or (jax.process_count() > 1 and sides.size != len(devices)):
        raise UserError(f"--mesh {sides} takes {sides.size} devices, and jax sees {len(devices)}")
    return Mesh(np.asarray(devices[: sides.size]).reshape(sides), AXES)


def local_mesh(mesh: Mesh) -> Mesh:
    """The mesh for work that a process does alone. In a group of processes: this process's devices, all along "data"."""
    if jax.process_count() == 1:
        return mesh
    devices = jax.local_devices(backend=mesh.devices.flat[0].platform)
    return Mesh(np.asarray(devices).reshape(-1, 1), AXES)


def shape_of(mesh: Mesh) -> MeshShape:
    """The number of devices along "data" and "model"."""
    return MeshShape(*mesh.devices.shape)


def device_name(mesh: Mesh) -> str:
    """The model of the devices, with their number where there are several; for people."""
    first, count = mesh.devices.flat[0], mesh.devices.size
    name = processor_name() if first.platform == "cpu" else first.device_kind
    return name if count == 1 else f"{count} x {name}"


def free_bytes(mesh: Mesh) -> int:
    """Memory that a run can allocate now, in bytes, on all devices of the mesh together.

    On accelerators: the least that is free on a device of this process, times the number of devices; 0 if jax does not know.
    On CPUs: what is free on this host.
    """
    devices = list(mesh.devices.flat)
    if devices[0].platform == "cpu":
        return host_free_bytes()
    stats = [device.memory_stats() or {} for device in devices if device.process_index == jax.process_index()]
    free = min(device_stats.get("bytes_limit", 0) - device_stats.get("bytes_in_use", 0) for device_stats in stats)
    return free * len(devices)


def threads() -> int:
    """Threads that XLA computes with on a CPU: one for each processor that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def apply_resolved(resolved: Resolved) -> Mesh:
    """The mesh that the run was created with. Raises UserError, with the flag that forks the run, if it is not available."""
    try:
        mesh = make_mesh(pick_devices(resolved.device), resolved.mesh)
    except UserError as error:
        raise device_error(resolved, f"mesh {resolved.mesh}, which is not available here") from error
    # The number of threads decides the order of sums on a CPU, and XLA takes as many as there are processors.
    if resolved.device == "cpu" and resolved.threads != threads():
        raise device_error(resolved, f"with {resolved.threads} threads, and jax takes {threads()} here")
    return mesh


def broadcast(number: int) -> int:
    """The main process's number (int32), in every process, so that all decide alike though they measure different values."""
    if jax.process_count() == 1:
        return number
    from jax.experimental.multihost_utils import broadcast_one_to_all

    return int(broadcast_one_to_all(np.int32(number)))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: its first axis is divided over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding in which every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def weight_shardings(mesh: Mesh, tree: Tree) -> Tree:
    """The tree with a sharding in place of each array: over the mesh's axis "model".

    An array is divided along its longest axis whose length is a multiple of the number of devices along "model". Arrays
    without such an axis, and arrays of less than MIN_SHARDED elements, are replicated.
    """
    parts = mesh.shape["model"]

    def sharding_of(array: jax.Array | jax.ShapeDtypeStruct) -> NamedSharding:
        divisible = [axis for axis, side in enumerate(array.shape) if side % parts == 0]
        if parts == 1 or not divisible or np.prod(array.shape) < MIN_SHARDED:
            return replicated(mesh)
        axis = max(divisible, key=lambda axis: array.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*(None,) * axis, "model"))

    return jax.tree.map(sharding_of, tree)


def to_device(tree: object, shardings: object) -> Any:
    """The host arrays of `tree` as jax arrays on the devices. shardings: a tree of the same form.

    Every process whose devices are in the mesh must call this, with the same arrays; each copies the parts for its devices.
    """

    def put(value: ArrayLike, sharding: NamedSharding) -> jax.Array:
        array = np.asarray(value)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, tree, shardings)


def gather(array: jax.Array) -> np.ndarray:
    """The whole array on the host, in every process. All processes must call this."""
    if array.is_fully_addressable or array.is_fully_replicated:  # this process has all of it
        return np.asarray(array)
    from jax.experimental.multihost_utils import process_allgather

    return np.asarray(process_allgather(array, tiled=True))
