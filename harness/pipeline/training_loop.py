"""The training loop's book-keeping, the same for every framework.

The engine does the arithmetic; here are the log, the checkpoints, Ctrl-C, and the promise that a run killed at any
instant continues to the bit-identical sequence of losses.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, Protocol

import numpy as np

from harness.distributed.group import SINGLE_PROCESS, ProcessGroup, Stopped
from harness.errors import RunError, UserError
from harness.io import files
from harness.io.progress import Bar
from harness.loggers import Loggers
from harness.runs import checkpoints
from harness.runs.provenance import TrainingTime
from harness.runs.run import Run

MAX_LOST_SECONDS = 300.0  # at most this much work, or one step, is lost to a kill
CHECKPOINT_SHARE = 0.02  # of the time goes to checkpoints, while that does not mean losing more than the above: a
# checkpoint that takes longer than 9 s, as XL/2's 11 GB do on a slow disk, costs more than 3 %
SHORTEST_SECONDS = 2.0
DISK_BYTES_PER_SECOND = 1e9
DRAIN_SECONDS = 0.5  # how long losses may stay on the device, unread
AGREE_STEPS = (
    10  # after so many, or so many seconds, a process group agrees on whether to stop or to write a checkpoint
)
AGREE_SECONDS = 2.0
STOP = 1 << 16  # in the number that is agreed on


class Engine(Protocol):
    """What a framework provides to the loop."""

    terms: Mapping[str, float]  # what the log holds of a step, with its weight in the loss: {"mse": 1, "vb": 1}

    def step(self, step: int, interrupted: Callable[[], bool]) -> bool:
        """Do optimiser step `step` (from 1). False: interrupted before the update, nothing has changed."""

    def pop_losses(self) -> list[tuple[float, ...]]:
        """The terms of the steps since the last drain, in order."""

    def finite(self) -> bool:
        """Whether every weight is finite."""

    def state_dicts(self) -> list[tuple[str, Callable[[], dict[str, np.ndarray]]]]:
        """The state, as named parts; "ema" is one of them."""

    def load(self, part: str, path: Path) -> None:
        """Take a part back from a safetensors file."""


def train(
    run: Run,
    engine: Engine,
    until: int,
    *,
    gflops_step: float,
    state_bytes: int,
    device: str,
    say: Callable[[str], None],
    group: ProcessGroup = SINGLE_PROCESS,
    loggers: Sequence[str] = (),
) -> None:
    """Train `run` until `until` steps are done and keep the EMA weights of that step as a snapshot.

    `gflops_step` is the training compute of one step, for the bar; `state_bytes` is the size of a checkpoint; `device` is
    what the checkpoints call what the time was spent on. `group`: the processes that train together. `loggers`: names of harness.loggers.LOGGERS. Raises Stopped after Ctrl-C or SIGTERM and its checkpoint; UserError for a step that was passed without keeping it; RunError when a loss or a weight is not finite.
    """
    if group.broadcast(int(until in run.ema_checkpoint_steps())):
        return
    checkpoint = checkpoints.newest(run.checkpoints, say)
    done, state = 0, None
    found = 0 if checkpoint is None else checkpoint.step
    if found != group.broadcast(found):
        raise UserError(
            f"process {group.index} finds another newest checkpoint in {run.checkpoints} than the leader; the processes of a "
            "run share a file system"
        )
    if checkpoint is not None:
        if checkpoint.step > until:
            raise UserError(
                f"{run.folder} has been trained to step {checkpoint.step} and kept no snapshot of step {until}; "
                f"ask for --steps {checkpoint.step} or more, or train anew with another --out"
            )
        for name, _ in engine.state_dicts():
            engine.load(name, checkpoint.part(name))
        done, state = checkpoint.step, checkpoint.state
        say(f"continues from the checkpoint of step {done}")
    images = run.recipe.batch
    with (
        _log(run.log, done, group) as log,
        closing(Loggers(loggers if group.is_main else (), run, done, engine.loss_terms, say)) as watched,
        _interrupt(group) as interrupted,
        Bar("train", until, "it", done) as bar,
    ):
        spent, cost = TrainingTime(state, device), state_bytes / DISK_BYTES_PER_SECOND
        keeper = CheckpointManager(run, engine, log, watched, done, spent, cost=cost, group=group)
        stop = bool(group.all_max(int(interrupted())))
        while keeper.done < until and not stop:
            if engine.step(keeper.done + 1, interrupted if group.size == 1 else lambda: False):
                keeper.stepped()
                note = ""
                if keeper.loss is not None:
                    speed = (
                        f"{bar.rate:.2f} it/s  {bar.rate * images:.0f} images/s  {bar.rate * gflops_step:.0f} Gflop/s"
                    )
                    note = f"loss {keeper.loss:.4f}  {speed}"
                bar.advance(1, note)
                stop, due = keeper.decide(interrupted())
                if due:
                    keeper.checkpoint()
            else:
                stop = True
        keeper.checkpoint()
    if stop:
        say(f"stopped; checkpoint of step {keeper.done} is in {run.checkpoints}; the same command continues")
        raise Stopped
    if group.is_main:
        keep_ema_checkpoint(run, until)
    group.barrier("the snapshot is kept")


def keep_ema_checkpoint(run: Run, step: int) -> None:
    """Keep the EMA weights of the checkpoint of `step` for sampling: a hard link, so it costs no disk."""
    checkpoint = checkpoints.verify(run.checkpoints / f"step-{step:08d}")
    folder = run.ema_checkpoint(step)
    with files.explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / "ema.safetensors"
        target.unlink(missing_ok=True)
        try:
            os.link(checkpoint.part("ema"), target)
        except OSError:  # a file system without hard links
            files.write_bytes(target, checkpoint.part("ema").read_bytes())
    entry = checkpoint.state["files"]["ema.safetensors"]
    state = {key: checkpoint.state[key] for key in ("schema", "step", "seconds", "spent") if key in checkpoint.state}
    files.write_json(folder / "state.json", {**state, "files": {"ema.safetensors": entry}})


class CheckpointManager:
    """Log and checkpoints of one stretch of training."""

    def __init__(
        self,
        run: Run,
        engine: Engine,
        log: IO[str],
        watched: Loggers,
        done: int,
        spent: TrainingTime,
        cost: float,
        group: ProcessGroup = SINGLE_PROCESS,
    ):
        self.run, self.engine, self.log, self.watched, self.group = run, engine, log, watched, group
        self.done = self.written = self.saved = done  # steps: trained, in the log, in a checkpoint
        self.loss: float | None = None
        self._spent = spent
        self._cost = cost  # of a checkpoint, in seconds: a guess until one has been written
        self._drained = self._saved_at = self._agreed_at = time.monotonic()
        self._agreed = done  # the step of the last agreement
        self._apart = 1  # steps from there to the next

    def stepped(self) -> None:
        self.done += 1
        if (
            self.group.size > 1
        ):  # a loss that is not finite stops all of them at one step: nobody waits for who has gone
            due = self.done == self._agreed + self._apart
        else:
            due = time.monotonic() - self._drained > DRAIN_SECONDS
        if due:
            self.pop_losses()

    def pop_losses(self) -> None:
        """Move losses from the device to the log; stop at one that is not finite."""
        before, self._drained = self._drained, time.monotonic()
        speed = (self.done - self.written) / max(self._drained - before, 1e-9)
        weights = self.engine.loss_terms
        for values in self.engine.pop_losses():
            step, row = self.written + 1, dict(zip(weights, values, strict=True))
            if not all(map(math.isfinite, values)):
                text = ", ".join(f"{name} {value}" for name, value in row.items())
                self._fail(f"the loss is not finite at step {step} ({text})")
            self.log.write(json.dumps({"step": step, **row}) + "\n")
            self.watched.write(step, row, speed if step == self.done else None)
            self.written = step
            self.loss = sum(weight * row[name] for name, weight in weights.items())
        with files.explained(self.run.log):
            self.log.flush()  # for who watches it

    def decide(self, interrupted: bool) -> tuple[bool, bool]:
        """Whether to stop, and whether to write a checkpoint: the same in every process of the process group.

        Any of them may be told to stop; the leader says the rest, and when to ask again.
        """
        if self.group.size == 1:
            return interrupted, self.due()
        if self.done != self._agreed + self._apart:
            return False, False
        now = time.monotonic()
        seconds = (now - self._agreed_at) / self._apart
        self._agreed, self._agreed_at = self.done, now
        steps = min(AGREE_STEPS, max(1, int(AGREE_SECONDS / max(seconds, 1e-9))))
        told = self.group.all_max(STOP * interrupted + (2 * steps + self.due()) * self.group.is_main)
        self._apart = told % STOP // 2 or 1
        return told >= STOP, bool(told & 1)

    def due(self) -> bool:
        """Whether work since the last checkpoint is worth its cost by now, or too much to lose."""
        wait = min(MAX_LOST_SECONDS, max(SHORTEST_SECONDS, self._cost / CHECKPOINT_SHARE))
        return time.monotonic() - self._saved_at >= wait

    def checkpoint(self) -> None:
        self.pop_losses()
        if self.saved == self.done:
            return
        if not self.engine.finite():
            self._fail(f"a weight is not finite after step {self.done}")
        if not self.group.is_main:
            for _, tensors in self.engine.state_dicts():  # what every process has a part of, the leader collects
                tensors()
            self.saved = self.done
            return
        begin = time.monotonic()
        with files.explained(self.run.log):
            self.log.flush()
            os.fsync(self.log.fileno())  # the log never lags behind a checkpoint
        self.watched.flush()  # nor do the others
        spent = self._spent.now()
        state = {"seconds": sum(spent.values()), "spent": spent}
        checkpoints.write(self.run.checkpoints, self.done, self.engine.state_dicts(), state)
        self.saved = self.done
        self._saved_at = time.monotonic()
        self._cost = self._saved_at - begin

    def _fail(self, what: str) -> None:
        self.log.flush()
        good = f"the last good checkpoint is of step {self.saved}" if self.saved else "there is no checkpoint yet"
        raise RunError(
            f"{what}; {good} in {self.run.checkpoints}. Try a lower learning rate (--set learning_rate=...), "
            "--set clip_norm=1, or --precision float32, with another --out"
        )


@contextmanager
def _log(path: Path, done: int, group: ProcessGroup) -> Iterator[IO[str]]:
    """The log, cut to the first `done` steps, open for appending; of a process group the leader's alone."""
    if not group.is_main:
        with Path(os.devnull).open("a", encoding="ascii") as file:
            yield file
        return
    with files.explained(path):
        if path.exists():
            lines = path.read_bytes().splitlines(keepends=True)[:done]
            if not (path.is_file() and sum(map(len, lines)) == path.stat().st_size):
                files.write_bytes(path, b"".join(lines))
        elif done == 0:
            path.touch()
        with path.open("a", encoding="ascii") as file:
            yield file


@contextmanager
def _interrupt(group: ProcessGroup = SINGLE_PROCESS) -> Iterator[Callable[[], bool]]:
    """Turn Ctrl-C and SIGTERM into a question the loop asks; a second Ctrl-C stops at once.

    A second SIGTERM does not: who stops a job of several processes sends it to each, and some pass it on.
    """
    asked = False

    def handle(number: int, frame: object) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if asked:
            return
        asked = True
        if group.is_main:
            print("stopping: writing a checkpoint (Ctrl-C once more to stop at once)", file=sys.stderr, flush=True)  # noqa: T201

    if threading.current_thread() is not threading.main_thread():  # signals belong to the main thread
        yield lambda: False
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
