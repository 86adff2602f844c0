"""Device, precision, micro-batch and threads of a run: chosen once, when it is created, and applied at every start."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from typing import Any

import torch

from harness.distributed.mesh import MeshShape
from harness.engines.memory import (
    Measured,
    device_error,
    fit_micro_batch,
    host_free_bytes,
    one_image_error,
    processor_name,
    state_bytes,
)
from harness.engines.torch import compiling, parallel, process_group
from harness.errors import RunError, UserError, one_line
from harness.io.processors import processors
from harness.runs.run import Resolved
from harness.spec import BackboneSpec

logger = logging.getLogger(__name__)

PRECISIONS = ("float32", "bfloat16")  # that `--precision auto` chooses from
NAMED_PRECISIONS = ("float32", "tf32", "bfloat16")
PROBE_IMAGES = 16  # at most on a CPU: the speeds of precisions are compared on a batch of this size
PROBE_REPEATS = 3
# A precision in which a product of matrices of this side takes more than FAR_SLOWER times as long is not measured.
FAR_SLOWER = 4
PRODUCT_SIDE = 512
CUDA_PRODUCT_SIDE = 4096  # on a GPU a smaller product takes as long in either: the time of a launch
CUBLAS_WORKSPACE = ":4096:8"  # a workspace of fixed size, with which cuBLAS is deterministic
LONG_SECONDS = 20.0  # a pass that takes longer is not repeated


def pick_device(name: str | None) -> torch.device:
    """The device of that name; None: cuda if there is one, else cpu. Raises UserError where it is not available.

    Of several processes each takes the GPU of its local rank, so `name` must not have an index then:
    `harness.engines.torch.process_group.gpu`.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if process_group.size() > 1:
        platform, colon, _ = name.partition(":")
        if colon:
            raise UserError(
                f"--device {name} is one device, and {process_group.size()} processes work here; give --device {platform}"
            )
        name = f"{platform}:{process_group.gpu(process_group.local_rank())}" if platform == "cuda" else name
    try:
        device = torch.device(name)
        torch.empty(1, device=device)  # fails if the device is not available
    except (RuntimeError, AssertionError) as error:  # AssertionError: this torch is built without CUDA
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--device {name} is not available here ({reason}); try --device cpu, see `harness doctor`"
        ) from error
    if device.type == "meta":
        raise UserError("--device meta computes nothing; use cpu or cuda")
    return device


def device_name(device: torch.device) -> str:
    """The model of the processor or of the accelerator, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor_name()} ({torch.backends.cpu.get_cpu_capability()})"


def free_bytes(device: torch.device) -> int:
    """Memory on `device` that this process can allocate now, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return host_free_bytes() // process_group.local_size()


def inputs_of(
    kind: str, images: int, arguments: dict[str, Any], device: torch.device, time_form: str = "timestep", times: int = 1
) -> tuple[torch.Tensor, ...]:
    """Random inputs of a network of `kind`, in the order of its call. kind: of `harness.spec.KINDS`, except "generator".

    x float32 (images, C, H, W), t int64 (images,), or float32 of another form of time than timesteps
    (`harness.spec.TIMES`), float32 (images, 2) of two times, y int64 (images,) unless it is a classifier, and for an upsampler the image at low resolution,
    float32 (images, C, s, s).
    """
    generator = torch.Generator().manual_seed(0)
    channels, size = arguments["in_channels"], arguments["input_size"]
    x = torch.randn((images, channels, size, size), generator=generator)
    t = torch.randint(0, 1000, (images,), generator=generator)
    if time_form != "timestep":
        t = t / 1000
    if times == 2:
        t = torch.stack([t.float(), t / 2], dim=1)
    # A network without classes (num_classes 0) is given label 0, which it does not read.
    y = torch.randint(0, max(arguments["num_classes"], 1), (images,), generator=generator)
    inputs: tuple[torch.Tensor, ...] = (x, t) if kind == "classifier" else (x, t, y)
    if kind == "upsampler":
        low = arguments["low_res_size"]
        inputs += (torch.randn((images, channels, low, low), generator=generator),)
    return tuple(tensor.to(device) for tensor in inputs)


def measure(
    net: torch.nn.Module, images: int, arguments: dict[str, Any], device: torch.device, precision: str,
    kind: str = "denoiser", time_form: str = "timestep", times: int = 1,
) -> float:  # fmt: skip
    """Seconds of forward and backward for one image, by `measure_here`, in the slowest process.

    All processes must call this.
    """
    return process_group.all_max(
        measure_here(net, images, arguments, device, precision, kind, time_form=time_form, times=times)
    )


def product_slowdown(device: torch.device, precision: str) -> float:
    """How many times as long a matrix product takes in `precision`, "bfloat16", as in float32; in the slowest process.

    Sets the arithmetic of this process to float32. Far more than 1 on a processor without units for it. All processes must call this.
    """
    set_arithmetic(device, "float32")
    best = {}
    side = CUDA_PRODUCT_SIDE if device.type == "cuda" else PRODUCT_SIDE
    for dtype in (torch.float32, getattr(torch, precision)):
        factor = torch.ones(side, side, dtype=dtype, device=device)
        best[dtype] = float("inf")
        for _ in range(PROBE_REPEATS):  # the first one may include set-up
            begin = time.perf_counter()
            _ = factor @ factor
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best[dtype] = min(best[dtype], time.perf_counter() - begin)
    return process_group.all_max(best[getattr(torch, precision)] / best[torch.float32])


def measure_here(
    net: torch.nn.Module, images: int, arguments: dict[str, Any], device: torch.device, precision: str,
    kind: str = "denoiser", repeats: int = PROBE_REPEATS, time_form: str = "timestep",
    times: int = 1,
) -> float:  # fmt: skip
    """Seconds of forward and backward for one image in this process: the best of `repeats` passes after a first one.

    repeats: 0 takes the first pass. A pass of more than LONG_SECONDS is the last, and counts even if it is the first. Does
    not wait for other processes. Leaves weights and buffers as they are, and no gradients.
    """
    set_arithmetic(device, precision)
    inputs = inputs_of(kind, images, arguments, device, time_form, times)
    best = float("inf")
    buffers = [buffer.clone() for buffer in net.buffers()]
    try:
        for repeat in range(repeats + 1):
            begin = time.perf_counter()
            with autocast(device, precision):
                loss = net(*inputs).float().square().mean()
            loss.backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - begin
            if repeat or not repeats:  # the first pass only warms up, unless it is the only one
                best = min(best, seconds)
            if seconds > LONG_SECONDS:
                best = min(best, seconds)
                break
    finally:
        net.zero_grad(set_to_none=True)
        for buffer, before in zip(net.buffers(), buffers, strict=True):  # such as running statistics
            buffer.copy_(before)
    return best / images


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Context for calls of the network: "bfloat16" turns torch.autocast on, any other precision turns it off."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def check_precision(device: torch.device, precision: str) -> None:
    """Raise UserError for "tf32" on a device without TF32, where torch would silently compute in float32."""
    if precision != "tf32":
        return
    if device.type != "cuda":
        raise UserError(f"precision tf32 is that of NVIDIA's matrix units, and {device} has none; use float32")
    if torch.cuda.get_device_capability(device) < (8, 0):
        raise UserError(
            f"precision tf32 begins with NVIDIA's Ampere, and {device} is {device_name(device)}; use float32"
        )


def set_arithmetic(device: torch.device, precision: str) -> None:
    """Let matrix products and convolutions of float32 use TF32 (10 bits of mantissa) under "tf32", and all 23 bits otherwise.

    By default, torch lets convolutions use TF32 on a GPU. This is a setting of the process and not a context around the
    forward pass, because it must hold in the backward pass, too.
    """
    check_precision(device, precision)
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


def set_deterministic(device: torch.device, deterministic: bool) -> None:
    """On a GPU, let this process use deterministic algorithms alone, or any. Nothing elsewhere: a CPU's are.

    Called before the first matrix product, because cuBLAS reads its setting then.
    """
    if device.type != "cuda":
        return
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACE)
    torch.use_deterministic_algorithms(deterministic)


def _seconds_by_precision(
    net: torch.nn.Module, images: dict[str, int], arguments: dict[str, Any], device: torch.device, spec: BackboneSpec,
) -> dict[str, float]:  # fmt: skip
    """Precision -> seconds of training on one image with all processes at work. All processes must call this.

    images: precision -> images of the pass that is measured.
    Left out if another one works: a precision in which the network fails, such as bfloat16 in an operation without it, and
    one that this device has no units for.
    """
    seconds: dict[str, float] = {}
    for precision, count in images.items():
        if seconds and (slowdown := product_slowdown(device, precision)) > FAR_SLOWER:
            logger.info(f"  {precision} is not measured: a matrix product takes {slowdown:.3g} times as long in it")
            continue
        try:
            local_seconds = measure(net, count, arguments, device, precision, spec.kind, spec.time, spec.times)
        except (RuntimeError, TypeError, NotImplementedError) as error:
            if device.type == "cuda" and torch.are_deterministic_algorithms_enabled() and "deterministic" in str(error):
                raise UserError(
                    f"--deterministic: the network uses an operation that has no deterministic algorithm ({one_line(error)[:160]}); "
                    "leave the flag out"
                ) from error
            if not seconds or isinstance(error, (RunError, torch.OutOfMemoryError)):
                raise
            logger.info(f"  {precision} is left out: the network fails in it with {one_line(error)}")
            continue
        seconds[precision] = local_seconds / process_group.size()
    return seconds


def resolve(
    spec: BackboneSpec,
    net: torch.nn.Module,
    arguments: dict[str, Any],
    *,
    batch: int,  # of all processes together
    device: torch.device,
    mesh: MeshShape,
    precision: str,  # "auto", or one of NAMED_PRECISIONS
    micro_batch: int | None,  # None: the largest that fits
    activation_bytes: Mapping[str, int],  # of one image, by precision
    gradient_checkpointing: bool,
    averages: int = 1,  # of the weights, the EMA included
    compile: str,  # of compiling.CHOICES
    deterministic: bool = False,
    steps: int,  # of the run
) -> Measured:
    """Choose precision, micro-batch and compilation if they are "auto" or None, by measurements of `net`.

    `net` is sharded over `mesh` and on `device`. Its weights stay as they are. All processes must call this.
    """
    if "OMP_NUM_THREADS" not in os.environ:  # a container's quota, which torch does not know
        torch.set_num_threads(min(torch.get_num_threads(), processors()))
    parameters = sum(weight.numel() for weight in net.parameters())
    local_parameters = parameters  # in the memory of each process
    if mesh.model > 1:  # its shard, and the block that is gathered
        local_parameters = parameters // mesh.model + parallel.largest_block(net)
    local_batch = parallel.local_batch(batch)
    free = free_bytes(device) + 4 * local_parameters  # the network is already in memory and was counted as used
    check_precision(device, precision)
    chosen: dict[str, int] = {}  # micro-batch by precision
    for candidate in PRECISIONS if precision == "auto" else (precision,):
        # The largest micro-batch that fits in every process: the minimum, as the negative of a maximum.
        local = fit_micro_batch(local_batch, local_parameters, activation_bytes[candidate], free, averages, candidate)
        if fitting := -int(process_group.all_max(-local)):
            chosen[candidate] = min(micro_batch or fitting, local_batch)  # that of the user is not checked for memory
    if not chosen:
        least = min(activation_bytes.values()) if precision == "auto" else activation_bytes[precision]
        raise one_image_error(spec.name, local_parameters, least, str(device), free, averages)
    # A GPU is measured with the micro-batch that will run: with fewer images it would wait for the launches of its kernels.
    images = {each: min(size, PROBE_IMAGES) if device.type == "cpu" else size for each, size in chosen.items()}
    processes = process_group.size()
    seconds = _seconds_by_precision(net, images, arguments, device, spec)
    fastest = min(seconds, key=lambda name: seconds[name])
    unavailable = compiling.unavailable_reason(device)
    # Either all processes measure compiled code or none: they wait for each other in `choose`.
    if process_group.all_max(float(unavailable is not None)) and unavailable is None:
        unavailable = "torch.compile is not available in another process"
    choice = compiling.choose(
        compile, net, unavailable=unavailable, seconds=seconds[fastest] * processes, images=local_batch * steps,
        measure=lambda: measure_here(
            net, images[fastest], arguments, device, fastest, spec.kind, time_form=spec.time, times=spec.times
        ),
        all_max=process_group.all_max,
    )  # fmt: skip
    name = device_name(device)
    resolved = Resolved(
        device=str(device) if processes == 1 else device.type,
        device_name=name if processes == 1 else f"{processes} x {name}",
        precision=fastest,
        micro_batch=chosen[fastest],
        threads=torch.get_num_threads(),
        gradient_checkpointing=gradient_checkpointing,
        mesh=str(mesh),
        compile=choice.mode,
        deterministic=deterministic,
    )
    need = state_bytes(local_parameters, fastest, averages) + chosen[fastest] * activation_bytes[fastest]
    return Measured(
        resolved=resolved, seconds=seconds, memory_bytes=need, free_bytes=free, compiled=f"{choice.mode} ({choice.reason})",
        compiled_seconds=None if choice.seconds is None else choice.seconds / processes,
    )  # fmt: skip


def apply_resolved(resolved: Resolved) -> torch.device:
    """Return the device of a run, and set the number of threads of this process to the run's share for it.

    Precision is not applied here: see `set_arithmetic` and `autocast`. Raises UserError, with the flag that forks the run, if
    this machine does not have the device or cannot compile.
    """
    name = resolved.device
    if process_group.size() > 1:  # a run that one process began on "cuda:1": now each process takes its own GPU
        name = name.partition(":")[0]
    try:
        device = pick_device(name)
    except UserError as error:
        raise device_error(resolved) from error
    if resolved.compile == "on" and (reason := compiling.unavailable_reason(device)):
        raise UserError(
            f"the run was created with compiled code, and {reason}; or continue it as another run with "
            "--fork RUN --out NEW --compile off"
        )
    torch.set_num_threads(parallel.threads(resolved))
    set_deterministic(device, resolved.deterministic)
    return device
