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
from harness.engines.jax.errors import errors_in_one_line
from harness.engines.jax.trainer import COMPUTE_DTYPES, matmul_context, split
from harness.engines.memory import Measured, fit_micro_batch, one_image_error, state_bytes
from harness.errors import UserError
from harness.runs.run import Resolved
from harness.spec import BackboneSpec

PROBE_IMAGES = 16  # for each CPU device, at most: the speeds of precisions are compared on a batch of this size
PROBE_REPEATS = 3
LONG_SECONDS = 20.0  # a pass that takes longer is not repeated
FAR_SLOWER = 4  # a pass that takes more than this many times as long as one in another precision is not repeated either
LESS_MEMORY = "give a smaller --micro-batch or --gradient-checkpointing"


def refuse_torch_options(precision: str = "float32", compile: str = "off", deterministic: bool = False) -> None:
    """Raise UserError for the options that only torch has: precision "tf32", compile "on" and deterministic algorithms."""
    if precision == "tf32":
        raise UserError("precision tf32 belongs to --framework torch; jax has float32 and bfloat16")
    if compile == "on":
        raise UserError("--compile belongs to --framework torch; jax always compiles")
    if deterministic:
        raise UserError(
            "--deterministic belongs to --framework torch; jax has XLA_FLAGS=--xla_gpu_deterministic_ops=true"
        )


def inputs_of(
    kind: str, images: int, arguments: dict[str, Any], seed: int = 0, time_form: str = "timestep", times: int = 1
) -> tuple[np.ndarray, ...]:
    """Random inputs of a network of `kind`, in the order of its call. kind: of `harness.spec.KINDS`, except "generator".

    x float32 (images, C, H, W), t int32 (images,), or float32 of another form of time than timesteps
    (`harness.spec.TIMES`), float32 (images, 2) of two times, y int32 (images,) unless it is a classifier, and for an upsampler the image at low resolution,
    float32 (images, C, s, s).
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    channels, size = arguments["in_channels"], arguments["input_size"]
    x = generator.standard_normal((images, channels, size, size), np.float32)
    steps = generator.integers(0, 1000, images)
    t = steps.astype(np.int32) if time_form == "timestep" else (steps / 1000).astype(np.float32)
    if times == 2:
        t = np.stack([t, t / 2], axis=1).astype(np.float32)
    # A network without classes (num_classes 0) is given label 0, which it does not read.
    y = generator.integers(0, max(arguments["num_classes"], 1), images).astype(np.int32)
    inputs: tuple[np.ndarray, ...] = (x, t) if kind == "classifier" else (x, t, y)
    if kind == "upsampler":
        low = arguments["low_res_size"]
        inputs += (generator.standard_normal((images, channels, low, low), np.float32),)
    return inputs


def measure(
    net: nnx.Module, images: int, arguments: dict[str, Any], mesh: Mesh, precision: str, spec: BackboneSpec,
    stop_seconds: float,
) -> float:  # fmt: skip
    """Seconds of forward and backward for one image: the best of PROBE_REPEATS passes over `images` images each.

    Compilation does not count. stop_seconds: if the first pass takes longer, it is the only one. Sets the compute dtype of
    `net`, and leaves its weights as they are.
    """
    set_compute_dtype(net, COMPUTE_DTYPES[precision])
    graph, params, rest = split(net)

    def loss(params: nnx.State, rest: nnx.State, *inputs: Array) -> Array:
        return (nnx.merge(graph, params, rest)(*inputs).astype(jnp.float32) ** 2).mean()

    sharding, shardings = devices.batch_sharding(mesh), devices.weight_shardings(mesh, (params, rest))
    function = jit(jax.grad(loss), mesh.devices.flat[0].platform, out_shardings=shardings[0])
    best = float("inf")
    with errors_in_one_line("a first training step", LESS_MEMORY), matmul_context(precision):
        inputs = tuple(
            devices.to_device(array, sharding)
            for array in inputs_of(spec.kind, images, arguments, time_form=spec.time, times=spec.times)
        )
        params, rest = devices.to_device((params, rest), shardings)
        compiled = function.lower(params, rest, *inputs).compile()
        for _ in range(PROBE_REPEATS):
            began = time.perf_counter()
            jax.block_until_ready(compiled(params, rest, *inputs))
            best = min(best, time.perf_counter() - began)
            if best > stop_seconds:
                break
    return best / images


def resolve(
    spec: BackboneSpec,
    net: nnx.Module,
    arguments: dict[str, Any],
    *,
    batch: int,  # of all devices together
    device: str,  # the platform of the mesh, or the name of its only device
    mesh: Mesh,
    precision: str,  # "auto", or a key of COMPUTE_DTYPES
    micro_batch: int | None,  # of all devices together; None: the largest that fits
    activation_bytes: int,  # of one image in float32
    gradient_checkpointing: bool,
    averages: int = 1,  # of the weights, the EMA included
) -> Measured:
    """Choose the precision if it is "auto" and the micro-batch if it is None. The weights of `net` stay as they are."""
    parameters = sum(param.size for param in jax.tree.leaves(nnx.state(net, nnx.Param)))
    platform, count = mesh.devices.flat[0].platform, mesh.devices.size
    free = devices.free_bytes(mesh) + 4 * parameters  # the network is already in memory and was counted as used
    # How many times the weights are in the memory that `free` counts. On accelerators that is the memory of all devices, and
    # every row of the mesh along "data" has its own copy; for CPUs it is the memory of this host.
    copies = 1 if platform == "cpu" else mesh.shape["data"]
    # The largest micro-batch that fits in memory, over all devices.
    fitting = devices.broadcast(fit_micro_batch(batch, parameters * copies, activation_bytes, free, averages))
    if fitting == 0:
        raise one_image_error(spec.name, parameters, activation_bytes, device, free, averages)
    chosen = min(micro_batch or _even_micro_batch(batch, fitting, count), batch)
    if batch % count or chosen % count:  # otherwise the last, smaller micro-batch can be divided, too
        raise UserError(
            f"batches of {batch} in micro-batches of {chosen} cannot be divided over {count} devices; give a "
            "--micro-batch and a batch (--set batch=...) that are multiples of them, or a smaller --mesh"
        )
    # An accelerator is measured with the micro-batch that will run: a smaller one would not fill it.
    images = min(chosen, PROBE_IMAGES * count) if platform == "cpu" else chosen
    candidates = list(COMPUTE_DTYPES) if precision == "auto" else [precision]
    seconds: dict[str, float] = {}  # of training on one image, by precision
    for candidate in candidates:
        # A pass that shows this precision to be far slower than another is not repeated.
        stop_seconds = min([LONG_SECONDS, *(FAR_SLOWER * images * other for other in seconds.values())])
        seconds[candidate] = measure(net, images, arguments, mesh, candidate, spec, stop_seconds)
    # All processes take the precision that is fastest in the main process. `broadcast` takes an integer: its index.
    local_fastest = candidates.index(min(seconds, key=lambda name: seconds[name]))
    fastest = candidates[devices.broadcast(local_fastest)]
    resolved = Resolved(
        device=device,
        device_name=devices.device_name(mesh),
        precision=fastest,
        micro_batch=chosen,
        threads=devices.threads(),
        gradient_checkpointing=gradient_checkpointing,
        mesh=str(devices.shape_of(mesh)),
    )
    need = state_bytes(parameters * copies, fastest, averages) + chosen * activation_bytes
    return Measured(resolved=resolved, seconds=seconds, memory_bytes=need, free_bytes=free)


def _even_micro_batch(batch: int, fitting: int, count: int) -> int:
    """The largest micro-batch up to `fitting` that divides the batch and is a multiple of `count`, the number of devices.

    `fitting` if there is none; `resolve` then refuses it where it cannot be divided over the devices.
    """
    sizes = [size for size in range(count, min(fitting, batch) + 1, count) if batch % size == 0]
    return max(sizes, default=fitting)
