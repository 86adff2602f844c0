"""The training loop of every framework: it calls the steps of an engine and handles log, checkpoints and Ctrl-C.

A run that is killed at any time and started again has the same losses, bit for bit, as a run without interruption.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

from harness.distributed.group import SINGLE_PROCESS, ProcessGroup, Stopped
from harness.engines.ema import power_part
from harness.engines.interfaces import Engine, Parts
from harness.engines.memory import USABLE_SHARE, host_free_bytes
from harness.errors import RunError, UserError
from harness.io import files
from harness.io.progress import Bar
from harness.loggers import Loggers
from harness.runs import checkpoints
from harness.runs.checkpoints import Checkpoint
from harness.runs.provenance import TrainingTime, versions_in_turn
from harness.runs.run import Run, training_plugins

logger = logging.getLogger(__name__)

MAX_LOST_SECONDS = 300.0  # a kill loses at most this much work, or one step
# Writing checkpoints takes at most this share of the time, unless more than MAX_LOST_SECONDS of work could then be lost,
# which is so if one takes more than about CHECKPOINT_SHARE * MAX_LOST_SECONDS = 6 s (the 11 GB of XL/2 on a slow disk). The
# training goes on meanwhile, but a disk and a processor are busy.
CHECKPOINT_SHARE = 0.02
MIN_CHECKPOINT_SECONDS = 2.0  # between two checkpoints
COPY_BYTES = (
    2  # free memory that a copy of the state needs, in its own size: pinned blocks are rounded up to powers of two
)
GRACE_SHARE = (
    0.9  # of the seconds between SIGTERM and SIGKILL, for the checkpoint; the rest is for the end of the process
)
DISK_BYTES_PER_SECOND = 1e9  # assumed until a checkpoint has been written
LOG_SECONDS = 0.5  # between two transfers of losses from the device to the log
# The processes of a group agree on stopping and on checkpoints every AGREE_STEPS steps, or about every AGREE_SECONDS if
# that is sooner. They exchange one number, and each gets the largest: STOP (of an interrupted process), plus, of the main
# process only, 2 * (steps to the next agreement) + (1 if a checkpoint is due), which is always less than STOP.
AGREE_STEPS = 10
AGREE_SECONDS = 2.0
STOP = 1 << 16


def train(
    run: Run,
    engine: Engine,
    until: int,
    *,
    gflops_step: float,
    state_bytes: int,
    device: str,
    group: ProcessGroup = SINGLE_PROCESS,
    loggers: Sequence[str] = (),
    snapshot_steps: Collection[int] = (),
    grace: float = math.inf,
) -> None:
    """Train `run` from its newest checkpoint until `until` steps are done, and keep the EMA weights of that step.

    gflops_step: training compute of a step, for the progress bar. state_bytes: size of a checkpoint. device: the device's
    name, under which checkpoints record the training time. group: the processes that train together. loggers: names of
    `harness list loggers`. snapshot_steps: further steps whose averages of the recipe's `ema_widths` are kept. grace:
    seconds from Ctrl-C or SIGTERM in which the process must end; if they do not suffice for a checkpoint, the one before is
    kept.

    Raises Stopped after Ctrl-C or SIGTERM, when the checkpoint is written; UserError if the run is past step `until` and
    the EMA weights of that step were not kept; RunError if a loss or a weight is not finite.
    """
    if group.broadcast(int(until in run.ema_checkpoint_steps())):
        return
    checkpoint = newest_checkpoint(run.checkpoints, group)
    done = 0 if checkpoint is None else checkpoint.step
    if checkpoint is not None:
        if done > until:
            raise UserError(
                f"{run.folder} has been trained to step {done} and kept no EMA checkpoint of step {until}; "
                f"ask for --steps {done} or more, or train anew with another --out"
            )
        for name, _ in engine.state_dicts():
            engine.load(name, checkpoint.part(name))
        logger.info(f"continues from the checkpoint of step {done}")
    snapshots_due = {*snapshot_steps, until} if run.recipe.widths else set()
    # The process may have been killed after it wrote the checkpoint.
    if group.is_main and checkpoint is not None and done in snapshots_due:
        keep_snapshot(run, checkpoint)
    training_time = TrainingTime(None if checkpoint is None else checkpoint.state, device)
    plugins = training_plugins(run.backbone, run.recipe)
    versions = versions_in_turn(None if checkpoint is None else checkpoint.state, run.framework, plugins.values())
    batch = run.recipe.batch
    with (
        _log(run.log, done, group) as log,
        closing(Loggers(loggers if group.is_main else (), run, done, engine.loss_terms)) as open_loggers,
        _interrupt(grace) as (interrupted, deadline),
        Bar("train", until, "it", done) as bar,
        checkpoints.Writer(deadline) as writer,
    ):
        manager = CheckpointManager(
            run, engine, log, open_loggers, done, training_time, cost=state_bytes / DISK_BYTES_PER_SECOND,
            versions=versions, group=group, state_bytes=state_bytes, newest=checkpoint, writer=writer,
        )  # fmt: skip
        stop = bool(group.all_max(int(interrupted())))
        # A process of a group must not leave a step alone: the others would wait for it. `decide` stops all of them.
        interrupted_in_step = interrupted if group.size == 1 else lambda: False
        while manager.done < until and not stop:
            if engine.step(manager.done + 1, interrupted_in_step):
                manager.count_step()
                note = ""
                if manager.loss is not None:
                    speed = (
                        f"{bar.rate:.2f} it/s  {bar.rate * batch:.0f} images/s  {bar.rate * gflops_step:.0f} Gflop/s"
                    )
                    note = f"loss {manager.loss:.4f}  {speed}"
                bar.advance(1, note)
                stop, checkpoint_due = manager.decide(interrupted())
                if checkpoint_due or manager.done in snapshots_due:
                    manager.checkpoint(keep=manager.done in snapshots_due)
            else:  # interrupted within the step, which does not count
                stop = True
        manager.checkpoint()
        manager.wait()
        stop = stop or bool(group.all_max(int(interrupted())))  # during the last checkpoint
    if stop:
        late = "" if manager.saved == manager.done else f"{grace:g} s were too short for step {manager.done}; "
        logger.info(
            f"stopped; {late}checkpoint of step {manager.saved} is in {run.checkpoints}; the same command continues"
        )
        raise Stopped
    if group.is_main:
        assert manager.newest is not None
        keep_ema_checkpoint(run, manager.newest)
    group.barrier("the EMA checkpoint is kept")


def newest_checkpoint(root: Path, group: ProcessGroup) -> Checkpoint | None:
    """The newest intact checkpoint below `root`, as the main process finds it; None if there are none.

    The main process alone reads the files for their checksums. Errors as of `checkpoints.newest`, and `UserError` in a process
    that does not see the checkpoint.
    """
    checkpoint = checkpoints.newest(root) if group.is_main else None
    step = group.broadcast(0 if checkpoint is None else checkpoint.step)
    if group.is_main or not step:
        return checkpoint
    folder = checkpoints.folder_of(root, step)
    group.await_file(folder / "state.json")
    return checkpoints.verify(folder, hashes=False)


def keep_ema_checkpoint(run: Run, checkpoint: Checkpoint) -> None:
    """Keep the EMA weights of the checkpoint for sampling, in the folder of the EMA checkpoint."""
    _keep_parts(checkpoint, run.ema_checkpoint(checkpoint.step), ["ema"])


def keep_snapshot(run: Run, checkpoint: Checkpoint) -> None:
    """Keep the averages of the recipe's `ema_widths` in the checkpoint, unless they were kept before."""
    if checkpoint.step not in run.posthoc_steps():
        _keep_parts(checkpoint, run.posthoc_checkpoint(checkpoint.step), list(map(power_part, run.recipe.widths)))


def _keep_parts(checkpoint: Checkpoint, folder: Path, parts: Sequence[str]) -> None:
    """Keep these parts of the checkpoint in `folder`.

    They are hard links where the file system has these: they take no disk space while the checkpoint exists.
    """
    entries = {}
    with files.explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for part in parts:
            target = folder / checkpoint.part(part).name
            target.unlink(missing_ok=True)
            try:
                os.link(checkpoint.part(part), target)
            except OSError:  # a file system without hard links
                files.write_bytes(target, checkpoint.part(part).read_bytes())
            entries[target.name] = checkpoint.state["files"][target.name]
    # old checkpoints have no "spent" and no "trained_with"
    kept = ("schema", "step", "seconds", "spent", "trained_with")
    state = {key: checkpoint.state[key] for key in kept if key in checkpoint.state}
    files.write_json(folder / "state.json", state | {"files": entries})


class CheckpointManager:
    """Writes the log and the checkpoints while a run is trained.

    done: training steps done so far. cost: estimated seconds for writing a checkpoint; measured once one is written.
    versions: of `versions_in_turn`. state_bytes: size of a checkpoint. newest: the checkpoint from which training continues.
    """

    def __init__(
        self,
        run: Run,
        engine: Engine,
        log: IO[str],
        loggers: Loggers,
        done: int,
        training_time: TrainingTime,
        cost: float,
        versions: Sequence[Mapping[str, str]] = (),
        group: ProcessGroup = SINGLE_PROCESS,
        state_bytes: int = 0,
        newest: Checkpoint | None = None,
        writer: checkpoints.Writer | None = None,
    ):
        self.run, self.engine, self.log, self.loggers, self.group = run, engine, log, loggers, group
        self.done = self.logged = done  # last step that is trained, in the log
        self.newest = newest  # complete checkpoint, in the main process
        self.loss: float | None = None  # of the newest step in the log
        self._writer = writer or checkpoints.Writer()
        self._begun = done  # step of the checkpoint that was begun last
        self._beside = True  # whether the training went on while that one was written
        self._training_time = training_time
        self._versions = versions
        self._state_bytes, self._cost = state_bytes, cost
        # times at which losses were last logged, a checkpoint was last begun, and the group last agreed
        self._logged_at = self._saved_at = self._agreed_at = time.monotonic()
        self._agreed = done  # step at which the group last agreed
        self._agree_steps = 1  # steps from there to the next agreement

    @property
    def saved(self) -> int:
        """The step of the newest checkpoint that is complete; 0 without one."""
        return 0 if self.newest is None else self.newest.step

    def count_step(self) -> None:
        """Count a step as done, and log the losses if that is due. Raises the error of a checkpoint that failed."""
        self.done += 1
        if self._writer.done:
            self.wait()
        if self.group.size > 1:
            # All processes log at the same step, because logging raises for a loss that is not finite: a process that
            # stopped alone would leave the others waiting in a collective.
            log_due = self.done == self._agreed + self._agree_steps
        else:
            log_due = time.monotonic() - self._logged_at > LOG_SECONDS
        if log_due:
            self.log_losses(wait=False)

    def log_losses(self, wait: bool = True) -> None:
        """Move the losses from the device to the log and the loggers. Raises RunError for one that is not finite.

        wait: for those of all steps; if not, the newest may be left for the next time, see `Engine.pop_losses`.
        """
        loss_terms, rows = self.engine.loss_terms, self.engine.pop_losses(wait)
        previous, self._logged_at = self._logged_at, time.monotonic()
        steps_per_second = len(rows) / max(self._logged_at - previous, 1e-9)
        last = self.logged + len(rows)
        for values in rows:
            step, row = self.logged + 1, dict(zip(loss_terms, values, strict=True))
            if not all(map(math.isfinite, values)):
                text = ", ".join(f"{name} {value}" for name, value in row.items())
                self._fail(f"the loss is not finite at step {step} ({text})")
            self.log.write(json.dumps({"step": step, **row}) + "\n")
            # The speed is the mean over these steps, so it is written once, with the last of them.
            self.loggers.write(step, row, steps_per_second if step == last else None)
            self.logged = step
            self.loss = sum(weight * row[name] for name, weight in loss_terms.items())
        with files.explained(self.run.log):
            self.log.flush()  # for people who watch the file

    def decide(self, interrupted: bool) -> tuple[bool, bool]:
        """Return (stop, checkpoint): whether to stop, and whether to write a checkpoint now; the same in every process.

        interrupted: whether this process was. All stop if any process was interrupted. The main process decides whether
        a checkpoint is due, and after how many steps the group agrees again; at the steps between, both are False.
        """
        if self.group.size == 1:
            return interrupted, self.checkpoint_due()
        if self.done != self._agreed + self._agree_steps:
            return False, False
        now = time.monotonic()
        step_seconds = (now - self._agreed_at) / self._agree_steps
        self._agreed, self._agreed_at = self.done, now
        steps = min(AGREE_STEPS, max(1, int(AGREE_SECONDS / max(step_seconds, 1e-9))))
        agreed = self.group.all_max(STOP * interrupted + (2 * steps + self.checkpoint_due()) * self.group.is_main)
        # The number is STOP alone, with 0 steps, if only another process than the main one was interrupted.
        self._agree_steps = agreed % STOP // 2 or 1
        return agreed >= STOP, bool(agreed & 1)

    def checkpoint_due(self) -> bool:
        """Whether a checkpoint is due: the last one is old enough for CHECKPOINT_SHARE, or for MAX_LOST_SECONDS.

        Only the main process's answer counts: the others do not note when a checkpoint was written.
        """
        most = MAX_LOST_SECONDS
        if self._beside:  # a kill while the next one is written loses the work of this time, too
            most = max(most - self._cost, self._cost)
        wait = min(most, max(MIN_CHECKPOINT_SECONDS, self._cost / CHECKPOINT_SHARE))
        return time.monotonic() - self._saved_at >= wait

    def checkpoint(self, keep: bool = False) -> None:
        """Log the losses, and begin a checkpoint unless that of this step was begun. Waits for the one before.

        The training may go on meanwhile, unless the memory is too small for a copy of its state: then this writes the
        checkpoint before it returns. keep: whether to `keep_snapshot` of it. Raises RunError if a weight is not finite, and the
        error of the checkpoint before.
        """
        self.log_losses()
        if self._begun == self.done:
            return
        if not self.engine.finite():
            self._fail(f"a weight is not finite after step {self.done}")
        self.wait()
        begin = time.monotonic()
        room = host_free_bytes() * USABLE_SHARE > COPY_BYTES * self._state_bytes
        self._beside = bool(self.group.broadcast(int(room)))  # the main process has the copy
        parts = self.engine.state_dicts(copy=self._beside)
        self._begun, self._saved_at = self.done, begin
        if not self.group.is_main:
            for _, tensors in parts:  # all processes take part in collecting sharded tensors
                tensors()
            return
        with files.explained(self.run.log):
            self.log.flush()
        self.loggers.flush()  # so that the loggers hold all steps of the checkpoint
        spent = self._training_time.now()
        state = {"seconds": sum(spent.values()), "spent": spent, "trained_with": self._versions}
        self._writer.start(partial(self._write, self.done, parts, state, begin, keep), beside=self._beside)
        if not self._beside:
            self.wait()
            self._saved_at = time.monotonic()

    def _write(
        self, step: int, parts: Parts, state: dict[str, Any], begin: float, keep: bool, give_up: Callable[[], bool]
    ) -> Checkpoint:
        """Write the checkpoint of `step`, in the thread of the writer. begin: time at which it was begun."""
        with files.explained(self.run.log):
            os.fsync(self.log.fileno())  # so that the log holds all steps of a checkpoint
        # Without a copy, all processes gather each part while it is written: if this one gave up, the others would wait.
        together = self.group.size > 1 and not self._beside
        written = checkpoints.write(self.run.checkpoints, step, parts, state, (lambda: False) if together else give_up)
        if keep:
            keep_snapshot(self.run, written)
        self._cost = time.monotonic() - begin
        return written

    def wait(self) -> None:
        """Wait for the checkpoint that is being written. Raises its error."""
        self.newest = self._writer.wait() or self.newest

    def _fail(self, what: str) -> None:
        """Raise RunError with the reason `what` and the last good checkpoint."""
        self.log.flush()
        with suppress(RunError):  # the reason counts
            self.wait()
        last_good = f"the last good checkpoint is of step {self.saved}" if self.saved else "there is no checkpoint yet"
        raise RunError(
            f"{what}; {last_good} in {self.run.checkpoints}. Try a lower learning rate (--set learning_rate=...), "
            "--set clip_norm=1, or --precision float32, with another --out"
        )


@contextmanager
def _log(path: Path, done: int, group: ProcessGroup) -> Iterator[IO[str]]:
    """The log, cut to its first `done` steps and open for appending; /dev/null in all but the main process."""
    if not group.is_main:
        with Path(os.devnull).open("a", encoding="ascii") as file:
            yield file
        return
    with files.explained(path):
        if path.exists():
            lines = path.read_bytes().splitlines(keepends=True)[:done]
            needs_cut = sum(map(len, lines)) != path.stat().st_size
            if needs_cut or not path.is_file():  # a device, such as /dev/null, is replaced by a file
                files.write_bytes(path, b"".join(lines))
        with path.open("a", encoding="ascii") as file:
            yield file


@contextmanager
def _interrupt(grace: float) -> Iterator[tuple[Callable[[], bool], Callable[[], float]]]:
    """Yields functions that return whether Ctrl-C or SIGTERM was received, and when the last checkpoint is given up.

    grace: seconds that the process then has. A second Ctrl-C raises KeyboardInterrupt.
    A second SIGTERM has no effect: a scheduler sends one to every process, and some launchers pass theirs on as well.
    """
    received, deadline = False, math.inf

    def handle(number: int, frame: object) -> None:
        nonlocal received, deadline
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        if received:
            return
        received, deadline = True, time.monotonic() + GRACE_SHARE * grace
        logger.info("stopping: writing a checkpoint (Ctrl-C once more to stop at once)")

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set signal handlers
        yield lambda: False, lambda: math.inf
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received, lambda: deadline
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
