"""Memory of a run, for every framework: what a machine has free, what training needs, which micro-batch fits."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import NamedTuple

import psutil

from harness.errors import UserError
from harness.runs.run import Resolved

SPARE = 0.85  # share of free memory that a run may plan with; the rest is for the allocator's fragments
RUNTIME_BYTES = 600_000_000  # interpreter, libraries, buffers
STATE_BYTES = 16  # a parameter in float32: weight, gradient, two moments of AdamW
EMA_BYTES = 4


class NotEnoughMemory(UserError):
    """What is asked for does not fit the memory of this machine."""


class Measured(NamedTuple):
    """What this machine offers a run: what to freeze, seconds an image by precision, memory needed and free (bytes).

    compiled: what became of `--compile`, in words, where the framework has it; its seconds an image, where measured.
    """

    resolved: Resolved
    seconds: dict[str, float]
    memory_bytes: int
    free_bytes: int
    compiled: str = ""
    compiled_seconds: float | None = None


def processor_name() -> str:
    """The model of the processor, as a person calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def host_free_bytes() -> int:
    """Memory of the host that a process can take now."""
    free = psutil.virtual_memory().available
    for limit, used in (("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),):
        try:  # a container may be allowed less than the machine has
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):
            continue
    return max(free, 0)


def state_bytes(parameters: int, precision: str) -> int:
    """Memory that does not depend on the batch: weights, gradients, moments, EMA, and the copy in bfloat16.

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


def check_room(name: str, parameters: int, device: str, free: int) -> None:
    """Refuse a network whose training state alone does not fit in `free` bytes, before it is built."""
    need = state_bytes(parameters, "bfloat16")
    if need > free * SPARE:
        raise NotEnoughMemory(
            f"{name} needs {need / 1e9:.1f} GB on {device} for weights, gradients and optimiser, and "
            f"{free * SPARE / 1e9:.1f} GB can be had; choose a smaller backbone or another --device"
        )


def refuse_one_image(name: str, parameters: int, activation_bytes: int, device: str, free: int) -> UserError:
    """The refusal of a network of which not one image fits."""
    need = state_bytes(parameters, "bfloat16") + activation_bytes
    return NotEnoughMemory(
        f"{name} needs {need / 1e9:.1f} GB to train even one image at a time and {free * SPARE / 1e9:.1f} GB "
        f"can be had on {device}; choose a smaller backbone or --gradient-checkpointing"
    )


def refuse_device(resolved: Resolved, reason: str = "which is not to be had here") -> UserError:
    """The refusal of a machine that is not what the run was created on."""
    return UserError(
        f"the run was created on {resolved.device} ({resolved.device_name}), {reason}; "
        "continue it as another run with --fork RUN --out NEW"
    )
