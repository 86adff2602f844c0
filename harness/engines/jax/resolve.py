"""Devices, precision, micro-batch and threads of a run: chosen once, when it is created."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from backbones.flax_layers import set_compute_dtype
from harness.engines.jax import mesh as devices
from harness.engines.jax.compiling import jit
from harness.engines.jax.errors import one_line
from harness.engines.jax.trainer import COMPUTE_DTYPES, exact, split
from harness.engines.memory import Measured, fit_micro_batch, one_image_error, state_bytes
from harness.errors import UserError
from harness.runs.run import Resolved
from harness.spec import BackboneSpec

PROBE_IMAGES = 16  # for each device, at most: the speeds of two precisions are compared on so many images
PROBE_REPEATS = 3
LONG_SECONDS = 20.0  # a pass that takes longer is not repeated
FAR_SLOWER = 4  # nor one that takes so many times as long as in another precision
LESS_MEMORY = "give a smaller --micro-batch or --gradient-checkpointing"


def refuse_torch_options(precision: str = "float32", compile: str = "off") -> None:
    """Raise UserError for the options that only torch has."""
    if precision == "tf32":
        raise UserError("precision tf32 belongs to --framework torch; jax has float32 and bfloat16")
    if compile == "on":
        raise UserError("--compile belongs to --framework torch; jax always compiles")


def inputs_of(kind: str, images: int, arguments: dict[str, Any], seed: int = 0) -> tuple[np.ndarray, ...]:
    """Random inputs of a network of `kind`, in the order of its call."""
    generator = np.random.Generator(np.random.PCG64(seed))
    channels, size = arguments["in_channels"], arguments["input_size"]
    x = generator.standard_normal((images, channels, size, size), np.float32)
    t = generator.integers(0, 1000, images).astype(np.int32)
    y = generator.integers(0, max(arguments["num_classes"], 1), images).astype(np.int32)
    inputs: tuple[np.ndarray, ...] = (x, t) if kind == "classifier" else (x, t, y)
    if kind == "upsampler":
        low = arguments["low_res_size"]
        inputs += (generator.standard_normal((images, channels, low, low), np.float32),)
    return inputs


def measure(
    net: nnx.Module, images: int, arguments: dict[str, Any], mesh: Mesh, precision: str, kind: str, enough: float
) -> float:
    """Seconds of forward and backward for one image: the best of a few passes after compilation.

    enough: seconds of a pass after which there is no other.
    """
    set_compute_dtype(net, COMPUTE_DTYPES[precision])
    graph, params, rest = split(net)

    def loss(params: nnx.State, rest: nnx.State, *inputs: Array) -> Array:
        return (nnx.merge(graph, params, rest)(*inputs).astype(jnp.float32) ** 2).mean()

    sharding, shardings = devices.batch_sharding(mesh), devices.weight_shardings(mesh, (params, rest))
    function = jit(jax.grad(loss), mesh.devices.flat[0].platform, out_shardings=shardings[0])
    best = float("inf")
    with one_line("a first training step", LESS_MEMORY), exact(precision):
        inputs = tuple(devices.to_device(each, sharding) for each in inputs_of(kind, images, arguments))
        params, rest = devices.to_device((params, rest), shardings)
        compiled = function.lower(params, rest, *inputs).compile()
        for _ in range(PROBE_REPEATS):
            began = time.perf_counter()
            jax.block_until_ready(compiled(params, rest, *inputs))
            best = min(best, time.perf_counter() - began)
            if best > enough:
                break
    return best / images


def resolve(
    spec: BackboneSpec,
    net: nnx.Module,
    arguments: dict[str, Any],
    *,
    batch: int,
    device: str,  # the platform of the mesh, or the name of its only device
    mesh: Mesh,
    precision: str,
    micro_batch: int | None,
    activation_bytes: int,
    gradient_checkpointing: bool,
) -> Measured:
    """Choose precision and micro-batch where they are left open. The weights of `net` stay as they are."""
    parameters = sum(each.size for each in jax.tree.leaves(nnx.state(net, nnx.Param)))
    platform, count = mesh.devices.flat[0].platform, mesh.devices.size
    free = devices.free_bytes(mesh) + 4 * parameters  # the network is already in memory and was counted as used
    copies = 1 if platform == "cpu" else mesh.shape["data"]  # of the weights, which are not sharded over "data"
    fitting = devices.broadcast(fit_micro_batch(batch, parameters * copies, activation_bytes, free))
    if fitting == 0:
        raise one_image_error(spec.name, parameters, activation_bytes, device, free)
    chosen = min(micro_batch or _divided(batch, fitting, count), batch)
    if batch % count or chosen % count or (batch % chosen) % count:
        raise UserError(
            f"batches of {batch} in micro-batches of {chosen} cannot be divided over {count} devices; give a "
            "--micro-batch and a batch (--set batch=...) that are multiples of them, or a smaller --mesh"
        )
    images = min(chosen, PROBE_IMAGES * count)
    wanted = list(COMPUTE_DTYPES) if precision == "auto" else [precision]
    speeds: dict[str, float] = {}
    for each in wanted:
        enough = min([LONG_SECONDS, *(FAR_SLOWER * images * other for other in speeds.values())])
        speeds[each] = measure(net, images, arguments, mesh, each, spec.kind, enough)
    fastest = wanted[devices.broadcast(wanted.index(min(speeds, key=lambda each: speeds[each])))]
    resolved = Resolved(
        device=device,
        device_name=devices.device_name(mesh),
        precision=fastest,
        micro_batch=chosen,
        threads=devices.threads(),
        gradient_checkpointing=gradient_checkpointing,
        mesh=str(devices.shape_of(mesh)),
    )
    need = state_bytes(parameters * copies, fastest) + chosen * activation_bytes
    return Measured(resolved=resolved, seconds=speeds, memory_bytes=need, free_bytes=free)


def _divided(batch: int, fitting: int, count: int) -> int:
    """The largest micro-batch of at most `fitting` images that divides the batch and is divided by the devices."""
    sizes = [size for size in range(count, min(fitting, batch) + 1, count) if batch % size == 0]
    return max(sizes, default=fitting)
