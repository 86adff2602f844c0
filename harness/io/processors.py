"""How many processors this process may use, and whether others use them too."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
BUSY = 0.5  # load of other processes, as a share of the processors, from which a machine counts as shared


def processors() -> int:
    """Processors that this process may use: those it is bound to, or fewer where its container's quota allows less time."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = quota()
    return bound if limit is None else max(1, min(bound, int(limit)))


def quota(cgroup: Path = CGROUP) -> float | None:
    """Processor time that the container allows, in processors, such as 1.5; None: no limit is known.

    cgroup: folder of the control group, of version 2 (cpu.max) or 1 (cpu.cfs_quota_us in cpu/).
    """
    # OSError: no such file; ValueError: "max" or -1 microseconds, which mean no limit
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        allowed, period = (cgroup / "cpu.max").read_text().split()
        return int(allowed) / int(period)
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        allowed, period = ((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(allowed) / int(period) if int(allowed) > 0 else None
    return None


def load() -> float:
    """Mean number of running processes over the last minute, this process's own included; 0 where it is not known."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
