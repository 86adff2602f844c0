"""Where, with what and how long: the description that a number carries. No part of what a run or a record is."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from harness._version import VERSION
from harness.errors import UserError
from harness.runs.samples import read_sidecar

LIBRARIES = (
    "torch",
    "numpy",
    "jax",
    "jaxlib",
    "flax",
    "tensorflow",
    "tensorflow-cpu",
    "safetensors",
    "scikit-learn",
    "pillow",
    "clean-fid",
)


UNKNOWN = "not recorded"  # the device of checkpoints that knew seconds alone


def environment(device: str) -> dict[str, Any]:
    """What made a number, as plain data: device, versions, commit of the working folder's code, time."""
    return {
        "device": device,
        "versions": {"python": platform.python_version(), **_versions()},
        "git_commit": _commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "harness_version": VERSION,
    }


class TrainingTime:
    """Seconds of a run's training by device, counted on from those of a checkpoint's state (None: from nothing)."""

    def __init__(self, state: Mapping[str, Any] | None, device: str):
        self._before = {} if state is None else dict(state.get("spent", {UNKNOWN: state["seconds"]}))
        self._device, self._began = device, time.monotonic()

    def now(self) -> dict[str, float]:
        """What has been spent up to now; pauses, and work that a kill has lost, are not in it."""
        here = self._before.get(self._device, 0.0) + time.monotonic() - self._began
        return self._before | {self._device: here}


def timing_of(samples: Path) -> dict[str, Any]:
    """What the sidecar of a sample set says of time, as fields of `results.records.Environment`.

    Only what the same devices did from beginning to end: other seconds compare with nothing.
    """
    found: dict[str, Any] = {}
    try:
        data = read_sidecar(samples)
        spent, drawn = data.get("spent", {}), data.get("drawn", {})
        if len(spent) == 1 and UNKNOWN not in spent:
            ((found["training_device"], found["training_seconds"]),) = spent.items()
        if drawn.get("seconds") is not None:
            found["sampling_device"] = drawn["device"]
            found["sampling_seconds_per_image"] = drawn["seconds"] / data["images"]
    except (UserError, KeyError, TypeError, AttributeError, ZeroDivisionError):
        return {}  # no sidecar, or one of another kind
    return found


def _versions() -> dict[str, str]:
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """The commit of the checkout that this code runs from, "+" behind it if files differ; None when installed."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        run = lambda *words: subprocess.run(  # noqa: E731
            ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        return run("rev-parse", "HEAD") + ("+" if run("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
