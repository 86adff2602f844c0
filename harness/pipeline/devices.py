"""Where, with what and how long: the description that a number carries. No part of what a run or a record is."""

from __future__ import annotations

from harness.distributed.group import ProcessGroup
from harness.engines.backend import DeviceInfo, get_backend
from harness.runs.run import Run


def device_of(run: Run, group: ProcessGroup) -> str:
    """What a person calls the devices that work on `run`, which this process is set up for: maybe others than those that
    it was created on."""
    device = run.resolved.device
    return device_names(
        get_backend(run.framework).resolve_device(device if group.size == 1 else device.partition(":")[0]), group
    )


def device_names(place: DeviceInfo, group: ProcessGroup) -> str:
    """What a person calls the devices of all processes of a group, taken to be like this one's."""
    return place.name if group.size == 1 else f"{group.size} x {place.name}"
