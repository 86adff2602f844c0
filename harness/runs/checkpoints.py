"""Checkpoints: safetensors files and a JSON state in a folder, which gets its name when it is complete.

    step-00000400/{model,ema,first_moment,second_moment}.safetensors, state.json (step, checksums, training time)
    and one ema-WIDTH.safetensors for each of the recipe's ema_widths; heads, heads_first_moment and heads_second_moment
    with an auxiliary loss

Nothing in them can execute code. Every part is checked against its SHA-256 before it is used.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np

from harness.errors import UserError
from harness.io import files, tensor_files

logger = logging.getLogger(__name__)

SCHEMA = 1
KEPT = 2  # checkpoints that are kept: the newest, and the one before it in case the newest is damaged

Tensors = Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint on disk whose checksums were correct when it was opened, by this process or by the main one."""

    folder: Path
    step: int
    state: dict[str, Any]  # of state.json

    def part(self, name: str) -> Path:
        """The file of a part: "model", "ema", "first_moment", "second_moment", or "ema-0.05" with `ema_widths`."""
        return self.folder / f"{name}.safetensors"

    def sha256(self, part: str) -> str:
        return self.state["files"][f"{part}.safetensors"]["sha256"]


class GivenUp(Exception):
    """The writing of a checkpoint was given up. Nothing of it is left."""


def write(
    root: Path,
    step: int,
    parts: Iterable[tuple[str, Callable[[], Tensors]]],
    state: dict[str, Any],
    give_up: Callable[[], bool] = lambda: False,
) -> Checkpoint:
    """Write the checkpoint of `step` below `root`, and remove others, so that at most KEPT exist: the one before it stays.

    parts: pairs of a name and a function that returns the tensors. The functions are called one at a time, because copies
    of all parts may not fit in memory. state: further items of state.json. give_up: asked before every few megabytes; GivenUp
    is raised once it returns True. Raises RunError if the checkpoint cannot be written, for example because the disk is
    full. After either no partial checkpoint is left.
    """

    def before_piece() -> None:
        if give_up():
            raise GivenUp

    final = folder_of(root, step)
    partial = root / f"{final.name}{files.PARTIAL}"
    with files.explained(final):
        root.mkdir(parents=True, exist_ok=True)
        for stale in root.glob(f"*{files.PARTIAL}"):
            files.remove(stale)
        # Before writing, so that the disk never needs room for more than KEPT, the new one included. Training has gone on from
        # one before this step, so those after it are damaged.
        steps = _steps(root)
        kept = [each for each in steps if each < step][-(KEPT - 1) :]
        for other in set(steps) - {*kept, step}:
            files.remove(folder_of(root, other))
        partial.mkdir()
        entries = {}
        try:
            for name, get_tensors in parts:
                path = partial / f"{name}.safetensors"
                entries[path.name] = tensor_files.write(path, get_tensors(), before_piece)
            state = {"schema": SCHEMA, "step": step, "files": entries, **state}
            files.write_json(partial / "state.json", state)
            if final.exists():  # the same step again, after a resume from an older checkpoint; it has the same bytes
                files.remove(final)
            partial.replace(final)
            files.sync_folder(root)
        except BaseException:
            files.remove(partial)
            raise
    return Checkpoint(folder=final, step=step, state=state)


class Writer:
    """Writes checkpoints in a thread, one after the other, while the training goes on.

    A context manager, which waits at its end for the checkpoint that is being written; after KeyboardInterrupt that one is
    given up. deadline: returns the time, of `time.monotonic`, at which a checkpoint is given up.
    """

    def __init__(self, deadline: Callable[[], float] = lambda: math.inf):
        self._deadline = deadline
        self._interrupted = False
        self._written: Future[Checkpoint] | None = None  # of the checkpoint that `wait` has not returned yet

    def start(self, write: Callable[[Callable[[], bool]], Checkpoint], *, beside: bool) -> None:
        """Call `write` with the function that says whether to give up. `wait` must have been called before.

        beside: in a thread, beside the caller; else `write` has ended when this returns.
        """
        assert self._written is None
        written: Future[Checkpoint] = Future()

        def run() -> None:
            try:
                written.set_result(write(self._give_up))
            except BaseException as error:  # for the training's thread, which raises it
                written.set_exception(error)

        self._written = written
        if not beside:
            run()
            return
        try:
            # A daemon, because a process that is interrupted twice must end without it.
            Thread(target=run, name="checkpoint", daemon=True).start()
        except RuntimeError:  # the system allows no further one
            run()

    def _give_up(self) -> bool:
        return self._interrupted or time.monotonic() > self._deadline()

    @property
    def done(self) -> bool:
        """Whether `wait` has a result that it returns, or an error that it raises, at once."""
        return self._written is not None and self._written.done()

    def wait(self) -> Checkpoint | None:
        """Wait until the checkpoint is written, and return it; None if none was started since the last call, or if it was
        given up. Raises what `write` raised."""
        if self._written is None:
            return None
        try:
            return self._written.result()
        except GivenUp:
            return None
        finally:
            if self._written.done():  # else Ctrl-C ended the waiting
                self._written = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        if kind is None:
            self.wait()
        else:  # whose error is the one to raise
            with suppress(Exception):
                self.wait()


def folder_of(root: Path, step: int) -> Path:
    """The folder below `root` of the checkpoint of `step`."""
    return root / f"step-{step:08d}"


def newest(root: Path) -> Checkpoint | None:
    """The newest intact checkpoint below `root`; None if there are no checkpoints. Logs a warning for damaged ones.

    Raises UserError if all are damaged.
    """
    steps = _steps(root)
    newest_damage = ""
    for step in reversed(steps):
        try:
            return verify(folder_of(root, step))
        except UserError as error:
            newest_damage = newest_damage or str(error)
            logger.warning(f"{error}; trying the one before it")
    if steps:
        raise UserError(
            f"no intact checkpoint is left in {root} (newest: {newest_damage}); begin again with another --out"
        )
    return None


def verify(folder: Path, *, hashes: bool = True) -> Checkpoint:
    """The checkpoint, or EMA checkpoint, in `folder`, after a comparison of all its files with their checksums.

    hashes: False compares their sizes alone, in a process that relies on the main process for the rest.
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
            intact = path.stat().st_size == entry["bytes"]
            if not intact or (hashes and files.sha256_file(path) != entry["sha256"]):
                raise UserError(f"checkpoint {folder} is corrupt: {name} does not match its checksum")
        _check_items(state)
        return Checkpoint(folder=folder, step=int(state["step"]), state=state)
    except UserError:  # which is a ValueError
        raise
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
