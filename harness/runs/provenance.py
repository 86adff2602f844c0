"""How a number was made: device, library versions and times. These facts are never part of an identity."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TypedDict

from harness._version import VERSION
from harness.errors import UserError
from harness.plugins.code import Code
from harness.runs.samples import find_sidecar

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


# Those that decide the numbers of a training, by framework; "harness" and "git_commit" are added to them.
TRAINING_LIBRARIES = {"torch": ("torch", "numpy"), "jax": ("jax", "jaxlib", "flax", "numpy")}

UNKNOWN = "not recorded"  # name of the device of old checkpoints, whose state has only seconds


class EnvironmentFields(TypedDict):
    """Fields of `results.records.Environment` that `environment` fills in."""

    device: str
    versions: dict[str, str]
    git_commit: str | None
    time: str
    harness_version: str


class Timing(TypedDict, total=False):
    """Fields of `results.records.Environment` that `timing_of` fills in, where they are known."""

    training_seconds: float
    training_device: str
    training_versions: dict[str, str]
    sampling_seconds_per_image: float
    sampling_device: str


def environment(device: str) -> EnvironmentFields:
    """The environment of a number that is made now, as plain data. time: ISO 8601, UTC."""
    return {
        "device": device,
        "versions": {"python": platform.python_version(), **_versions()},
        "git_commit": _commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "harness_version": VERSION,
    }


def versions_in_turn(
    state: Mapping[str, Any] | None, framework: str, plugins: Iterable[Code] = ()
) -> list[dict[str, str]]:
    """The versions that have trained a run in turn, those of now last; each is a dict of library -> version.

    state: of the checkpoint from which training continues; None: training begins. A checkpoint from before versions were
    recorded counts as an empty dict. plugins: whose code trains; a file has its hash as version.
    """
    now = {
        "harness": VERSION,
        **{name: version for name, version in _versions().items() if name in TRAINING_LIBRARIES.get(framework, ())},
    }
    now |= {code.name: code.version or code.sha256[:12] for code in plugins}
    if commit := _commit():
        now["git_commit"] = commit
    before = [] if state is None else list(state.get("trained_with", [{}]))
    return before if before and before[-1] == now else [*before, now]


class TrainingTime:
    """Measures the training time of a run, in seconds by device.

    state: state of the checkpoint from which training continues, whose seconds are added; None: training begins. device:
    name of the device that trains now.
    """

    def __init__(self, state: Mapping[str, Any] | None, device: str):
        # seconds by device, at the checkpoint
        self._before = {} if state is None else dict(state.get("spent", {UNKNOWN: state["seconds"]}))
        self._device, self._began = device, time.monotonic()

    def now(self) -> dict[str, float]:
        """Seconds of training up to now by device, without pauses and without work that a kill has lost."""
        on_this_device = self._before.get(self._device, 0.0) + time.monotonic() - self._began
        return self._before | {self._device: on_this_device}


def timing_of(samples: Path) -> Timing:
    """The times and versions that the sidecar of a sample set states; empty without a sidecar of the harness.

    Training time is left out if several devices shared the training, because such a sum cannot be compared. Sampling time
    is left out if the sampling was resumed, because the time before is not known.
    """
    timing: Timing = {}
    try:
        if (data := find_sidecar(samples)) is None:
            return timing
        spent, drawn = data.get("spent", {}), data.get("drawn", {})
        if len(spent) == 1 and UNKNOWN not in spent:
            (device_and_seconds,) = spent.items()
            timing["training_device"], timing["training_seconds"] = device_and_seconds
        if drawn.get("seconds") is not None:
            timing["sampling_device"] = drawn["device"]
            timing["sampling_seconds_per_image"] = drawn["seconds"] / data["images"]
        if trained_with := data.get("trained_with"):
            names = sorted({name for versions in trained_with for name in versions})
            # dict.fromkeys: without repetitions, in order
            texts = {name: dict.fromkeys(versions.get(name, UNKNOWN) for versions in trained_with) for name in names}
            timing["training_versions"] = {name: ", then ".join(found) for name, found in texts.items()}
    except (UserError, KeyError, TypeError, AttributeError, ZeroDivisionError):
        return {}  # no sidecar, or one of another program
    return timing


def _versions() -> dict[str, str]:
    """The versions of those LIBRARIES that are installed, by name."""
    versions: dict[str, str] = {}
    for library in LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _commit() -> str | None:
    """The git commit of the checkout that this code runs from, with "+" if tracked files were changed.

    None if the code does not run from a checkout, or if git fails.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
