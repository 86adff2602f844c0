"""Names of the devices of a run, for people and records."""

from __future__ import annotations

from harness.distributed.group import ProcessGroup
from harness.engines.backend import get_backend
from harness.engines.interfaces import DeviceInfo
from harness.runs.run import Run


def device_of(run: Run, group: ProcessGroup) -> str:
    """The name of the devices that work on `run` now. They may differ from those that it was created on."""
    # One of several processes works on a device of its own, so the index of the run's device does not hold for it.
    name = run.resolved.device if group.size == 1 else run.resolved.device.partition(":")[0]
    return device_names(get_backend(run.framework).resolve_device(name), group)


def device_names(device: DeviceInfo, group: ProcessGroup) -> str:
    """The name of the devices of all processes of a group; all are assumed to be like this process's device."""
    return device.name if group.size == 1 else f"{group.size} x {device.name}"
