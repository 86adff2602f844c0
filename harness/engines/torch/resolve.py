"""What is measured or found once, when a run is created: device, precision, micro-batch, threads."""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from harness.errors import Refusal
from harness.runs import Resolved
from harness.spec import BackboneSpec

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SPARE = 0.85  # share of free memory that a run may plan with; the rest is for the allocator's fragments
RUNTIME_BYTES = 600_000_000  # interpreter, libraries, buffers
STATE_BYTES = 16  # a parameter in float32: weight, gradient, two moments of AdamW
EMA_BYTES = 4
PROBE_IMAGES = 16  # the speed of two precisions is compared on at most so many images
PROBE_REPEATS = 3


class Measured(NamedTuple):
    """What this machine offers a run: what to freeze, seconds an image by precision, memory needed and free (bytes)."""

    resolved: Resolved
    seconds: dict[str, float]
    memory_bytes: int
    free_bytes: int


def pick_device(name: str | None) -> torch.device:
    """The device of that name, or cuda if there is one, else cpu; one that is absent is refused."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise Refusal(
            f"--device {name} is not to be had here ({reason}); try --device cpu, see `harness doctor`"
        ) from error
    if device.type == "meta":
        raise Refusal("--device meta computes nothing; use cpu or cuda")
    return device


def device_name(device: torch.device) -> str:
    """What a person calls the device: the model of the processor or of the accelerator."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model} ({torch.backends.cpu.get_cpu_capability()})"


def free_bytes(device: torch.device) -> int:
    """Memory that a run can take on `device` now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    for limit, used in (("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),):
        try:  # a container may be allowed less than the machine has
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):
            continue
    return max(free, 0)


def state_bytes(parameters: int, precision: str) -> int:
    """Memory that does not depend on the batch: weights, gradients, moments, EMA, and autocast's copy of the weights.

    Writing a checkpoint copies one of its parts, so one more set of weights is counted.
    """
    copy = 2 if precision == "bfloat16" else 0
    return parameters * (STATE_BYTES + EMA_BYTES + 4 + copy) + RUNTIME_BYTES


def fit_micro_batch(batch: int, parameters: int, activation_bytes: int, free: int) -> int:
    """The largest micro-batch that fits `free` bytes, evened out over the batch; 0 if not one image fits.

    activation_bytes is what one image keeps for the backward pass in float32; bfloat16 takes less, so the plan is safe.
    """
    room = int(free * SPARE) - state_bytes(parameters, "bfloat16")
    fitting = min(batch, room // max(activation_bytes, 1))
    if fitting < 1:
        return 0
    passes = -(-batch // fitting)
    return -(-batch // passes)


def check_room(spec: BackboneSpec, parameters: int, device: torch.device) -> None:
    """Refuse a network whose training state alone does not fit, before it is built."""
    need, free = state_bytes(parameters, "bfloat16"), free_bytes(device) * SPARE
    if need > free:
        raise Refusal(
            f"{spec.name} needs {need / 1e9:.1f} GB on {device} for weights, gradients and optimiser, and "
            f"{free / 1e9:.1f} GB can be had; choose a smaller backbone or another --device"
        )


def inputs_of(kind: str, images: int, arguments: dict, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Random inputs in the order of the call of a network of `kind`."""
    generator = torch.Generator().manual_seed(0)
    channels, size = arguments["in_channels"], arguments["input_size"]
    x = torch.randn((images, channels, size, size), generator=generator)
    t = torch.randint(0, 1000, (images,), generator=generator)
    y = torch.randint(0, max(arguments["num_classes"], 1), (images,), generator=generator)
    inputs: tuple[torch.Tensor, ...] = (x, t) if kind == "classifier" else (x, t, y)
    if kind == "upsampler":
        low = arguments["low_res_size"]
        inputs += (torch.randn((images, channels, low, low), generator=generator),)
    return tuple(each.to(device) for each in inputs)


def measure(
    net: torch.nn.Module, images: int, arguments: dict, device: torch.device, precision: str, kind: str = "denoiser"
) -> float:
    """Seconds that forward and backward take for one image, the best of a few passes. Weights are left as they are."""
    inputs = inputs_of(kind, images, arguments, device)
    best = float("inf")
    buffers = [buffer.clone() for buffer in net.buffers()]
    for repeat in range(PROBE_REPEATS + 1):
        begin = time.perf_counter()
        with autocast(device, precision):
            loss = net(*inputs).float().square().mean()
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - begin
        if repeat:  # the first pass warms up
            best = min(best, seconds)
        if seconds > 20:  # a network this slow has shown enough
            best = min(best, seconds)
            break
    net.zero_grad(set_to_none=True)
    for buffer, before in zip(net.buffers(), buffers, strict=True):  # running statistics of a network that keeps some
        buffer.copy_(before)
    return best / images


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which the network runs: float32 as it is, or bfloat16 for what autocast trusts to it."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def resolve(
    spec: BackboneSpec,
    net: torch.nn.Module,
    arguments: dict,
    *,
    batch: int,
    device: torch.device,
    precision: str,
    micro_batch: int | None,
    activation_bytes: int,
    gradient_checkpointing: bool,
) -> Measured:
    """Choose what is left open. The weights of `net` are left as they were."""
    parameters = sum(each.numel() for each in net.parameters())
    free = free_bytes(device) + 4 * parameters  # the network is already there and was counted as used
    fitting = fit_micro_batch(batch, parameters, activation_bytes, free)
    if fitting == 0:
        need = state_bytes(parameters, "bfloat16") + activation_bytes
        raise Refusal(
            f"{spec.name} needs {need / 1e9:.1f} GB to train even one image at a time and {free * SPARE / 1e9:.1f} GB "
            f"can be had on {device}; choose a smaller backbone or --gradient-checkpointing"
        )
    chosen = min(micro_batch or fitting, batch)
    images = min(chosen, PROBE_IMAGES)
    wanted = list(PRECISIONS) if precision == "auto" else [precision]
    speeds = {each: measure(net, images, arguments, device, each, spec.kind) for each in wanted}
    fastest = min(speeds, key=lambda each: speeds[each])
    resolved = Resolved(
        device=str(device),
        device_name=device_name(device),
        precision=fastest,
        micro_batch=chosen,
        threads=torch.get_num_threads(),
        gradient_checkpointing=gradient_checkpointing,
    )
    need = state_bytes(parameters, fastest) + chosen * activation_bytes
    return Measured(resolved=resolved, seconds=speeds, memory_bytes=need, free_bytes=free)


def honour(resolved: Resolved) -> torch.device:
    """Set this process up as the run was created, or refuse with the flag that makes another run of it."""
    try:
        device = pick_device(resolved.device)
    except Refusal as error:
        raise Refusal(
            f"the run was created on {resolved.device} ({resolved.device_name}), which is not to be had here; "
            "continue it as another run with --fork RUN --out NEW"
        ) from error
    torch.set_num_threads(resolved.threads)
    return device
