"""Memory: what is free on a machine, what training needs, and which micro-batch fits. The same for every framework."""

from __future__ import annotations

import contextlib
import platform
from pathlib import Path
from typing import NamedTuple

import psutil

from harness.errors import UserError
from harness.runs.run import Resolved

USABLE_SHARE = 0.85  # of free memory that a run may plan with; the rest is for fragmentation
RUNTIME_BYTES = 600_000_000  # interpreter, libraries, buffers
STATE_BYTES = 16  # per parameter in float32: weight, gradient and the two moments of AdamW
EMA_BYTES = 4  # per parameter and average


class NotEnoughMemory(UserError):
    """The memory of this machine is too small for the request."""


class Measured(NamedTuple):
    """The speed and memory of a new run on this machine, and the choices that follow from them."""

    resolved: Resolved  # the choices, which are frozen in the run
    seconds: dict[str, float]  # of training on one image, by precision
    memory_bytes: int  # that training needs
    free_bytes: int  # that are available
    compiled: str = ""  # "on (REASON)" or "off (REASON)"; empty if the framework has no choice
    compiled_seconds: float | None = None  # of training on one image, compiled; None: not measured


def processor_name() -> str:
    """The model of the processor, for people."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def host_free_bytes() -> int:
    """Memory of the host that a process can allocate now, in bytes."""
    free = psutil.virtual_memory().available
    cgroup = Path("/sys/fs/cgroup")
    # A container may be allowed less than the machine has. ValueError: the limit is "max", which means none.
    with contextlib.suppress(OSError, ValueError):
        limit, used = ((cgroup / name).read_text() for name in ("memory.max", "memory.current"))
        free = min(free, int(limit) - int(used))
    return max(free, 0)


def state_bytes(parameters: int, precision: str, averages: int = 1) -> int:
    """Memory that does not depend on the batch, in bytes: weights, gradients, moments, EMA, and a copy in bfloat16.

    averages: of the weights; more than the EMA with the recipe's `ema_widths`. Writing a checkpoint copies one of its parts, so one more set of weights is counted.
    """
    copy = 2 if precision == "bfloat16" else 0
    return parameters * (STATE_BYTES + EMA_BYTES * averages + 4 + copy) + RUNTIME_BYTES


def fit_micro_batch(
    batch: int, parameters: int, activation_bytes: int, free: int, averages: int = 1, precision: str = "bfloat16"
) -> int:
    """A micro-batch that fits in `free` bytes; 0 if not even one image fits.

    It divides the batch, unless that takes more than twice as many micro-batches as fit: then all but the last have one
    size. A batch of 100, of which 64 images fit, gives 50; one of 97 gives 49. activation_bytes: of one image in `precision`;
    those of float32 with the default precision, which needs more for the training state, fit in either. averages: as in
    `state_bytes`.
    """
    room = int(free * USABLE_SHARE) - state_bytes(parameters, precision, averages)
    fitting = min(batch, room // max(activation_bytes, 1))  # 0 activation bytes: not counted, so that all images fit
    if fitting < 1:
        return 0
    fewest = -(-batch // fitting)  # micro-batches; rounded up
    passes = next((number for number in range(fewest, 2 * fewest + 1) if batch % number == 0), fewest)
    return -(-batch // passes)


def check_room(name: str, parameters: int, device: str, free: int, averages: int = 1) -> None:
    """Raise NotEnoughMemory where the training state alone does not fit in `free` bytes, before the network is built."""
    # The precision is not chosen yet, and bfloat16 needs more: a second copy of the weights.
    need = state_bytes(parameters, "bfloat16", averages)
    if need > free * USABLE_SHARE:
        raise NotEnoughMemory(
            f"{name} needs {need / 1e9:.1f} GB on {device} for weights, gradients and optimiser, and "
            f"{free * USABLE_SHARE / 1e9:.1f} GB are available; choose a smaller backbone or another --device"
        )


def one_image_error(
    name: str, parameters: int, activation_bytes: int, device: str, free: int, averages: int = 1
) -> UserError:
    """The error for a network of which not even one image fits in memory."""
    need = state_bytes(parameters, "bfloat16", averages) + activation_bytes
    return NotEnoughMemory(
        f"{name} needs {need / 1e9:.1f} GB to train even one image at a time and {free * USABLE_SHARE / 1e9:.1f} GB "
        f"are available on {device}; choose a smaller backbone or --gradient-checkpointing"
    )


def device_error(resolved: Resolved, reason: str = "which is not available here") -> UserError:
    """The error for a run whose device this machine does not have, or has in another form. reason: is put after a comma."""
    return UserError(
        f"the run was created on {resolved.device} ({resolved.device_name}), {reason}; "
        "continue it as another run with --fork RUN --out NEW"
    )
