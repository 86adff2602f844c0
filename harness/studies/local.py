"""The local launcher: runs the commands of a study on this machine, a fixed number at a time, until all are done.

It can be killed at any time and started again. It reads from the folders of the runs what is done, detects by their locks
which runs still have a process, and waits for these processes.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from harness.errors import UserError
from harness.io import files
from harness.io.processors import processors
from harness.io.progress import duration
from harness.runs.run import lock_folder
from harness.studies import jobs
from harness.studies.expand import Expansion, StudyRun
from harness.studies.state import Overview, Progress, failure_path, is_running, log_path, progress_of

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.2
DRAW_SECONDS = 2.0  # between two updates of the display


@dataclass(kw_only=True)
class _Active:
    """A run that occupies a slot.

    process: started by the launcher; None: another process works on the run, and the launcher waits until it ends.
    """

    run: StudyRun
    slot: int  # 0 ... processes - 1
    process: subprocess.Popen | None
    commands: list[tuple[str, ...]] = field(default_factory=list)  # the current command first
    began: float = field(default_factory=time.monotonic)


class Launcher:
    """Launches the runs of a study that are not done.

    processes: number of runs at the same time. draw: called about every two seconds with the progress.
    """

    def __init__(
        self,
        study: Expansion,
        *,
        processes: int,
        retry_failed: bool,
        draw: Callable[[Overview], object],
    ):
        self.study, self.processes, self.retry_failed = study, processes, retry_failed
        self.draw = draw
        self.stopping = 0  # number of requests to stop
        self._rows: dict[str, Progress] = {}
        self._active: dict[str, _Active] = {}
        # Runs that were queued again after another process had worked on them. This is done once for each: if the other
        # process failed, the launcher's own attempt reports the error.
        self._queued_again: set[str] = set()
        self._devices = accelerators() if processes > 1 else []  # assigned to slots; a single slot sees all of them

    def launch(self) -> Overview:
        """Launch runs until nothing is left that can be done now, or until a signal to stop. Returns the final progress."""
        try:
            with lock_folder(self.study.folder), self._signals():
                self._rows = {run.name: progress_of(self.study, run) for run in self.study.runs}
                queue = [run for run in self.study.runs if self._to_launch(run)]
                self._loop(queue)
        except UserError as error:
            if "another process is using" not in str(error):  # the message of `lock_folder`
                raise
            raise UserError(
                f"another `harness study` is already running study {self.study.study.name!r}; `--status` shows its progress"
            ) from None
        return self._overview()

    def _overview(self) -> Overview:
        return Overview(study=self.study, rows=tuple(self._rows.values()))

    def _to_launch(self, run: StudyRun) -> bool:
        """Whether the run has work that this launcher does or waits for."""
        state = self._rows[run.name].state
        return state in ("to do", "interrupted", "running") or (state == "failed" and self.retry_failed)

    def _loop(self, queue: list[StudyRun]) -> None:
        """Run the queue to its end. The queue is changed in place."""
        # Runs on which another process works come first: they occupy a slot until that process ends.
        queue.sort(key=lambda run: self._rows[run.name].state != "running")
        stops_handled, last_draw = 0, 0.0
        while self._active or (queue and not self.stopping):
            while queue and not self.stopping and len(self._active) < self.processes:
                self._begin(queue.pop(0))
            for active in list(self._active.values()):
                if self._ended(active):
                    queue += self._finish(active)
            if self.stopping > stops_handled:
                stops_handled = self.stopping
                self._stop(kill=stops_handled > 1)
            if time.monotonic() - last_draw > DRAW_SECONDS:
                last_draw = time.monotonic()
                for name, active in self._active.items():
                    self._rows[name] = progress_of(self.study, active.run)
                self.draw(self._overview())
            time.sleep(POLL_SECONDS)

    def _begin(self, run: StudyRun) -> None:
        """Start the run's first command, or wait for the other process that works on it."""
        slot = min(set(range(self.processes)) - {each.slot for each in self._active.values()})
        active = _Active(run=run, slot=slot, process=None)
        self._active[run.name] = active
        waiting = f"waiting {run.label}: another process works on it"
        if is_running(self.study, run):
            logger.info(waiting)
            return
        self._rows[run.name] = row = progress_of(self.study, run)
        active.commands = list(row.pending)
        if row.state == "done" or not active.commands:  # another process has finished it since it was queued
            del self._active[run.name]
            return
        with files.explained(self.study.folder):
            failure_path(self.study, run).unlink(missing_ok=True)
        self._start(active)
        started = f"started {run.label}  (log {log_path(self.study, run)})"
        logger.info(waiting if active.process is None else started)

    def _start(self, active: _Active) -> None:
        """Start the first of the remaining commands. `active.process` is then None if another process has the log."""
        active.process = jobs.start(
            active.commands[0], log_path(self.study, active.run), self._environment(active.slot)
        )

    def _environment(self, slot: int) -> dict[str, str]:
        """Environment variables of the process in `slot`: its share of the CPU cores and, if there are several, one GPU."""
        share: dict[str, str] = {}
        if self.processes > 1 and "OMP_NUM_THREADS" not in os.environ:
            share["OMP_NUM_THREADS"] = str(max(1, processors() // self.processes))
        if len(self._devices) > 1:
            share["CUDA_VISIBLE_DEVICES"] = self._devices[slot % len(self._devices)]
        return share

    def _ended(self, active: _Active) -> bool:
        """Whether there is nothing to wait for: the launcher's process has ended or, where another process works on the
        run, that one has ended or the launcher is asked to stop.
        """
        if active.process is None:
            return self.stopping > 0 or not is_running(self.study, active.run)
        return active.process.poll() is not None

    def _finish(self, active: _Active) -> list[StudyRun]:
        """After a process of a run has ended: start the run's next command, or log the result.

        Returns the runs to put into the queue again: [run] if another process worked on it, else [].
        """
        run, process = active.run, active.process
        if process is not None and process.returncode == 0 and active.commands[1:] and not self.stopping:
            active.commands.pop(0)
            self._start(active)
            return []
        del self._active[run.name]
        code = None if process is None else process.returncode
        # exit code 2 is a UserError: here that of `lock_folder`, because another process works on the run
        other_process = code is None or (code == 2 and files.is_locked(run.folder / "lock"))
        log = log_path(self.study, run)
        if code and not other_process and not self.stopping and not jobs.interrupted(log, code):
            jobs.write_failure(failure_path(self.study, run), active.commands[0], log, code)
        self._rows[run.name] = row = progress_of(self.study, run)
        if code == 0 and not self.stopping and row.state != "done":  # a failure, or each launch would start it again
            missing = f"ended without an error, but {row.sets - row.sets_done} sample sets are missing"
            jobs.write_failure(failure_path(self.study, run), active.commands[0], log, 0, missing)
            self._rows[run.name] = row = progress_of(self.study, run)
        if other_process and not self.stopping and row.state != "done" and run.name not in self._queued_again:
            self._queued_again.add(run.name)
            return [run]
        messages = {
            "done": f"done    {run.label} in {duration(time.monotonic() - active.began)}",
            "failed": f"failed  {run.label}: {row.reason}  (log {row.log})",
            "running": f"left    {run.label} to the other process",
        }
        logger.info(messages.get(row.state, f"stopped {run.label} at step {row.steps_done} of {run.steps}"))
        return []

    def _stop(self, kill: bool) -> None:
        """Terminate the child processes, which write a checkpoint first; or kill them."""
        processes = [each.process for each in self._active.values() if each.process is not None]
        if processes:
            end = "killed" if kill else "writing checkpoints"
            logger.info(f"stopping: {len(processes)} {'process' if len(processes) == 1 else 'processes'}, {end}")
        for process in processes:
            if process.poll() is None:
                process.kill() if kill else process.terminate()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Count in `self.stopping`: 1 (Ctrl-C or SIGTERM) stops the runs, 2 (Ctrl-C again) kills them."""

        def handle(number: int, frame: object) -> None:
            # A second SIGTERM is no request to kill: a scheduler and a launcher may both send one.
            if number == signal.SIGINT or not self.stopping:
                self.stopping += 1

        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def accelerators() -> list[str]:
    """The NVIDIA devices that may be used, in the form of CUDA_VISIBLE_DEVICES. Imports no framework."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [each for each in named.split(",") if each]
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(number) for number, line in enumerate(done.stdout.splitlines()) if line.startswith("GPU ")]
