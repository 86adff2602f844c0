"""Devices: one, or a mesh of them over which batches and weights are laid out; one process, or several.

The mesh has two axes. A batch is divided over both; weights, averages and moments over "model" alone (as in ZeRO and
FSDP: every device holds its part, the compiler gathers a layer where it is computed). Nothing else changes with the
mesh: what is random belongs to images, so one device and eight make the same run up to the order of sums.

Several processes are started by the user's own launcher. Each gets the same command; JAX_COORDINATOR_ADDRESS,
JAX_NUM_PROCESSES and JAX_PROCESS_ID say who it is, or the cluster does (SLURM, Cloud TPU: JAX_NUM_PROCESSES alone).
"""

from __future__ import annotations

import os
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from harness.distributed.launch import mesh_sides
from harness.engines.memory import host_free_bytes, processor_name, refuse_device
from harness.errors import UserError
from harness.runs.run import Resolved

AXES = ("data", "model")
SMALLEST = 1024  # elements: smaller parameters are whole on every device


def start() -> None:
    """Join the other processes, if there are any. To be called before anything else is asked of jax."""
    count = os.environ.get("JAX_NUM_PROCESSES")
    if count is None or jax.distributed.is_initialized():
        return
    number = os.environ.get("JAX_PROCESS_ID")
    try:
        jax.distributed.initialize(num_processes=int(count), process_id=None if number is None else int(number))
    except (ValueError, RuntimeError, IndexError) as error:  # IndexError: an address without a port
        raise UserError(
            f"the {count} processes of JAX_NUM_PROCESSES cannot be joined ({str(error).splitlines()[0]}); set "
            "JAX_COORDINATOR_ADDRESS=HOST:PORT and JAX_PROCESS_ID as well, or unset all three for one process"
        ) from error


def pick_devices(name: str | None) -> list[jax.Device]:
    """All devices of a platform (cpu, cuda, tpu; None: the best there is), or one of them ("cuda:1").

    Of several processes the devices of all.
    """
    start()
    platform, colon, number = (name or "").partition(":")
    try:
        devices = jax.devices(platform or None)
    except RuntimeError as error:
        raise UserError(_lacking(name, error)) from error
    if not colon:
        return devices
    if jax.process_count() > 1:
        raise UserError(
            f"--device {name} is one device, and {jax.process_count()} processes work here; give --device {platform}"
        )
    if not number.isdecimal() or int(number) >= len(devices):
        raise UserError(f"--device {name} is not to be had here: jax sees {len(devices)} of {platform}")
    return [devices[int(number)]]


def _lacking(name: str | None, error: RuntimeError) -> str:
    try:
        have = ", ".join(sorted({each.platform for each in jax.devices()}))
    except RuntimeError:  # of JAX_PLATFORMS, whatever --device says
        return f"jax finds no devices here ({str(error).splitlines()[0]})"
    return f"--device {name} is not to be had by jax here (it has: {have}); see `harness doctor`"


def platform_name(mesh: Mesh) -> str:
    """What `pick_devices` calls the devices of the mesh."""
    platform = mesh.devices.flat[0].platform
    return "cuda" if platform == "gpu" and "cuda" in mesh.devices.flat[0].client.platform_version.lower() else platform


def make_mesh(devices: list[jax.Device], shape: str | None) -> Mesh:
    """The mesh of `shape`, "DATAxMODEL"; None lays all devices along "data"."""
    if shape is None:
        shape = f"{len(devices)}x1"
    data, model = mesh_sides(shape)
    if data * model > len(devices) or (jax.process_count() > 1 and data * model != len(devices)):
        raise UserError(f"--mesh {shape} takes {data * model} devices, and jax sees {len(devices)}")
    return Mesh(np.asarray(devices[: data * model]).reshape(data, model), AXES)


def own(mesh: Mesh) -> Mesh:
    """The mesh for what a process does by itself: of several, its own devices, all along "data"."""
    if jax.process_count() == 1:
        return mesh
    devices = jax.local_devices(backend=mesh.devices.flat[0].platform)
    return Mesh(np.asarray(devices).reshape(-1, 1), AXES)


def shape_of(mesh: Mesh) -> str:
    return "x".join(str(side) for side in mesh.devices.shape)


def device_name(mesh: Mesh) -> str:
    """What a person calls the devices."""
    first, count = mesh.devices.flat[0], mesh.devices.size
    name = processor_name() if first.platform == "cpu" else first.device_kind
    return name if count == 1 else f"{count} x {name}"


def free_bytes(mesh: Mesh) -> int:
    """Memory that a run can take now on all devices of the mesh together."""
    devices = list(mesh.devices.flat)
    if devices[0].platform == "cpu":
        return host_free_bytes()
    each = [device.memory_stats() or {} for device in devices if device.process_index == jax.process_index()]
    free = min(one.get("bytes_limit", 0) - one.get("bytes_in_use", 0) for one in each)
    return free * len(devices)


def threads() -> int:
    """Threads that XLA computes with on a CPU: it takes one for each processor that the process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def apply_resolved(resolved: Resolved) -> Mesh:
    """The mesh that the run was created with, or a refusal with the flag that makes another run of it."""
    try:
        mesh = make_mesh(pick_devices(resolved.device), resolved.mesh)
    except UserError as error:
        raise refuse_device(resolved, f"mesh {resolved.mesh}, which is not to be had here") from error
    if resolved.device == "cpu" and resolved.threads != threads():
        raise refuse_device(resolved, f"with {resolved.threads} threads, and jax takes {threads()} here")
    return mesh


def agreed(number: int) -> int:
    """The leader's number, in every process: what is measured differs between them."""
    if jax.process_count() == 1:
        return number
    from jax.experimental.multihost_utils import broadcast_one_to_all

    return int(broadcast_one_to_all(np.int32(number)))


def on_batch(mesh: Mesh) -> NamedSharding:
    """The first axis divided over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def everywhere(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def layout(mesh: Mesh, tree: Any) -> Any:
    """Shardings for a tree of arrays: the longest axis that "model" divides, where there is one."""
    parts = mesh.shape["model"]

    def one(array: Any) -> NamedSharding:
        fitting = [axis for axis, side in enumerate(array.shape) if side % parts == 0]
        if parts == 1 or not fitting or np.prod(array.shape) < SMALLEST:
            return everywhere(mesh)
        axis = max(fitting, key=lambda each: array.shape[each])
        return NamedSharding(mesh, PartitionSpec(*(None,) * axis, "model"))

    return jax.tree.map(one, tree)


def place(tree: Any, shardings: Any) -> Any:
    """Host arrays, the same in every process, as arrays laid out over the mesh."""

    def one(value: Any, sharding: NamedSharding) -> jax.Array:
        value = np.asarray(value)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return jax.tree.map(one, tree, shardings)


def gather(array: jax.Array) -> np.ndarray:
    """The whole array on the host, in every process; all of them must ask."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental.multihost_utils import process_allgather

    return np.asarray(process_allgather(array, tiled=True))
