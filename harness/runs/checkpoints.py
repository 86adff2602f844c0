"""Checkpoints: safetensors files and a JSON state in a folder, which gets its name when it is complete.

    step-00000400/{model,ema,first_moment,second_moment}.safetensors, state.json (step, checksums, training time)
    and one ema-WIDTH.safetensors for each of the recipe's ema_widths; heads, heads_first_moment and heads_second_moment
    with an auxiliary loss

Nothing in them can execute code. Every part is checked against its SHA-256 before it is used.
"""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.errors import UserError
from harness.io import files

logger = logging.getLogger(__name__)

SCHEMA = 1
KEPT = 2  # checkpoints that are kept: the newest, and the one before it in case the newest is damaged

Tensors = Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint on disk whose checksums were correct when it was opened."""

    folder: Path
    step: int
    state: dict[str, Any]  # of state.json

    def part(self, name: str) -> Path:
        """The file of a part: "model", "ema", "first_moment", "second_moment", or "ema-0.05" with `ema_widths`."""
        return self.folder / f"{name}.safetensors"

    def sha256(self, part: str) -> str:
        return self.state["files"][f"{part}.safetensors"]["sha256"]


def write(
    root: Path, step: int, parts: Iterable[tuple[str, Callable[[], Tensors]]], state: dict[str, Any]
) -> Checkpoint:
    """Write the checkpoint of `step` below `root`, and remove older ones, so that at most KEPT exist.

    parts: pairs of a name and a function that returns the tensors. The functions are called one at a time, because
    safetensors copies what it writes, and copies of all four parts of XL/2 would not fit in memory beside the training
    state. state: further items of state.json. Raises RunError if it cannot be written, for example because the disk is
    full; no partial checkpoint is left then.
    """
    from safetensors.numpy import save_file

    final = root / f"step-{step:08d}"
    partial = root / f"{final.name}{files.PARTIAL}"
    with files.explained(final):
        root.mkdir(parents=True, exist_ok=True)
        for stale in root.glob(f"*{files.PARTIAL}"):
            files.remove(stale)
        # Before writing, so that the disk never needs room for more than KEPT, the new one included.
        for old in _steps(root)[: -(KEPT - 1)]:
            files.remove(root / f"step-{old:08d}")
        partial.mkdir()
        entries = {}
        try:
            for name, get_tensors in parts:
                path = partial / f"{name}.safetensors"
                save_file(dict(get_tensors()), path)
                path.chmod(0o644)  # safetensors lets only the owner read it, but people share runs
                files.sync_file(path)
                entries[path.name] = {"sha256": files.sha256_file(path), "bytes": path.stat().st_size}
            files.write_json(partial / "state.json", {"schema": SCHEMA, "step": step, "files": entries, **state})
            if final.exists():  # the same step again, after a resume from an older checkpoint; it has the same bytes
                files.remove(final)
            partial.replace(final)
            files.sync_folder(root)
        except BaseException as error:
            files.remove(partial)
            if _disk_full(error):  # as OSError, which `files.explained` turns into the RunError for a full disk
                raise OSError(errno.ENOSPC, "No space left on device") from error
            raise
    return Checkpoint(folder=final, step=step, state=files.read_json(final / "state.json", "checkpoint"))


def newest(root: Path) -> Checkpoint | None:
    """The newest intact checkpoint below `root`; None if there are no checkpoints. Logs a warning for damaged ones.

    Raises UserError if all are damaged.
    """
    steps = _steps(root)
    newest_damage = ""
    for step in reversed(steps):
        try:
            return verify(root / f"step-{step:08d}")
        except UserError as error:
            newest_damage = newest_damage or str(error)
            logger.warning(f"{error}; trying the one before it")
    if steps:
        raise UserError(
            f"no intact checkpoint is left in {root} (newest: {newest_damage}); begin again with another --out"
        )
    return None


def verify(folder: Path) -> Checkpoint:
    """The checkpoint, or EMA checkpoint, in `folder`, after a comparison of all its files with their checksums.

    Raises UserError, which names the part, if one is missing or damaged.
    """
    state = files.read_json(folder / "state.json", "checkpoint")
    try:
        for name, entry in state["files"].items():
            if Path(name).name != name:
                raise UserError(f"checkpoint {folder} names a file outside itself ({name!r})")
            path = folder / name
            if not path.exists():
                raise UserError(f"checkpoint {folder} is incomplete: {name} is missing")
            if path.stat().st_size != entry["bytes"] or files.sha256_file(path) != entry["sha256"]:
                raise UserError(f"checkpoint {folder} is corrupt: {name} does not match its checksum")
        _check_items(state)
        return Checkpoint(folder=folder, step=int(state["step"]), state=state)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"checkpoint {folder} has a state.json of another form ({error})") from error


def _check_items(state: Mapping[str, Any]) -> None:
    """TypeError for items of another type than the training writes. Older checkpoints have only some of them."""
    seconds = [state.get("seconds", 0.0), *dict(state.get("spent", {})).values()]
    if wrong := [each for each in seconds if isinstance(each, bool) or not isinstance(each, int | float)]:
        raise TypeError(f"{wrong[0]!r} is no number of seconds")
    if not all(isinstance(each, dict) for each in state.get("trained_with", [])):
        raise TypeError("trained_with is no list of versions")


# (name, shape) of a tensor -> one slice for each axis; None: the whole tensor
Slices = Callable[[str, tuple[int, ...]], tuple[slice, ...] | None]


def tensors(path: Path, slices: Slices | None = None) -> Iterable[tuple[str, np.ndarray]]:
    """Yields (name, tensor) for each tensor of a safetensors file.

    slices: a function that chooses the part of each tensor that is read; None: whole tensors. Raises UserError for an
    unreadable file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                wanted = slices and slices(name, tuple(file.get_slice(name).get_shape()))
                # safetensors cannot read an empty slice, so such a tensor is read whole and sliced by numpy. A scalar has
                # no slices: ().
                if not wanted or any(each.stop is not None and each.start == each.stop for each in wanted):
                    array = file.get_tensor(name)
                    yield name, array[wanted] if wanted else array
                else:
                    yield name, file.get_slice(name)[wanted]
    except SafetensorError as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from error


def _steps(root: Path) -> list[int]:
    """The steps of the complete checkpoints below `root`, ascending."""
    matches = (re.fullmatch(r"step-(\d+)", path.name) for path in root.glob("step-*"))
    return sorted(int(match.group(1)) for match in matches if match)


def _disk_full(error: BaseException) -> bool:
    """Whether the error means that the disk is full; safetensors reports errors of the system as text only."""
    return "No space left on device" in str(error) or "os error 28" in str(error)
