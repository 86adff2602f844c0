"""How far the runs of a study are, read from the runs' folders alone: no second file can contradict them.

The study's folder adds what a run's does not hold: `logs/RUN.log`, the output of its commands, which is locked while one
is at work, and `failures/RUN.json`, the reason of the last failure.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.autoencoders.files import read_identity
from harness.errors import UserError
from harness.io import files
from harness.pipeline.evaluate import existing_records
from harness.pipeline.sidecar import read_fields
from harness.planning.request import Request
from harness.runs.run import Run, identity_difference, open_run
from harness.runs.sample_set import sample_request
from harness.runs.samples import read_sidecar, sidecar_path
from harness.settings import RunOptions
from harness.studies.expand import Expansion, StudyRun

STATES = ("done", "running", "queued", "failed", "interrupted", "to do")
TAIL_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The state of one run of a study."""

    run: StudyRun
    state: str  # one of STATES
    steps_done: int  # of run.steps
    sets_done: int  # sample sets that are sampled and measured
    sets: int
    gflops_left: float
    seconds_step: float | None  # of a training step, measured in this run; None: not yet
    reason: str | None = None  # of the last failure
    pending: tuple[tuple[str, ...], ...] = ()  # commands that still have work to do
    log: Path | None = None

    @property
    def training_steps_left(self) -> float:
        """The remaining work in training steps, sampling included."""
        return self.gflops_left / self.run.gflops_step


def log_path(study: Expansion, run: StudyRun) -> Path:
    """The output of the run's commands; locked while one is at work."""
    return study.folder / "logs" / f"{run.name}.log"


def failure_path(study: Expansion, run: StudyRun) -> Path:
    """The reason of the last command's failure; missing if it did not fail."""
    return study.folder / "failures" / f"{run.name}.json"


def at_work(study: Expansion, run: StudyRun) -> bool:
    """Whether a process works on the run, started by the study or by hand."""
    return files.is_locked(log_path(study, run)) or files.is_locked(run.folder / "lock")


def look(study: Expansion, run: StudyRun, in_queue: str | None = None) -> Progress:
    """The progress of a run. in_queue: "running" or "queued" where a cluster has a job of it."""
    log = log_path(study, run)
    reason, made = None, None
    working = at_work(study, run)  # before anything else is read: a process that ends meanwhile counts as running
    try:
        made = open_run(run.folder) if (run.folder / "run.json").exists() else None
        if made is not None and made.identity != run.spec.identity:
            difference = identity_difference(made.identity, run.spec.identity)
            reason, made = f"{run.folder} holds another run ({difference}); move it away", None
    except UserError as error:
        reason = str(error)
    left = list(_left(made, run, study))
    steps_done = _steps_done(made, run.steps)
    sets = len(run.marks) * sum(len(request.sampling.steps) for request in run.requests)
    failure = _failure(failure_path(study, run))
    if not left:
        state, failure = "done", None
    elif working or in_queue == "running":  # another machine's locks may be invisible here
        state, failure = "running", None
    elif in_queue is not None:
        state, failure = in_queue, None
    elif reason or failure:
        state = "failed"
    else:
        state = "interrupted" if log.exists() else "to do"
    gflops = (run.steps - steps_done) * run.gflops_step
    gflops += sum(request.gflops_image(steps) * request.samples for request, steps in left)
    pending = [words for request, words in zip(run.requests, run.commands, strict=True) if request in _requests(left)]
    return Progress(
        run=run, state=state, steps_done=steps_done, sets_done=sets - len(left), sets=sets,
        gflops_left=gflops if left else 0.0, seconds_step=_seconds_step(made), pending=tuple(pending),
        reason=reason or failure, log=log if log.exists() else None,
    )  # fmt: skip


def _requests(left: list[tuple[Request, int]]) -> list[Request]:
    return [request for request, _ in left]


def _left(made: Run | None, run: StudyRun, study: Expansion) -> Iterator[tuple[Request, int]]:
    """The sample sets that are not sampled or not measured: request and sampler steps."""
    for request, options in zip(run.requests, run.options, strict=True):
        for mark in run.marks:
            for steps in request.sampling.steps:
                if made is None or not _complete(made, request, options, mark, steps):
                    yield request, steps


def _complete(made: Run, request: Request, options: RunOptions, mark: int, steps: int) -> bool:
    """Whether the sample set of training step `mark` with `steps` sampler steps is there and measured.

    Hashes are taken as the files state them: comparing them with the contents would take minutes at every status.
    """
    from evaluators.suites import get_suite

    try:
        wanted = sample_request(
            made, mark, request.sampling, steps, request.samples, gflops_image=request.gflops_image(steps),
            precision=options.sampling_precision, batch=options.sampling_batch,
            decoder=None if options.decoder is None else _decoder_identity(options.decoder),
        )  # fmt: skip
        path = made.folder / "samples" / wanted.name(made) / "samples.npz"
        if not (path.exists() and sidecar_path(path).exists()):
            return False
        sidecar = read_sidecar(path)
        if sidecar["identity"] != wanted.identity(made):
            return False
        fields, protocol = read_fields(path, sidecar["sha256"]), request.protocol
        return existing_records(made.records, fields, protocol, get_suite(protocol.suite), None) is not None
    except (UserError, KeyError, TypeError):  # missing or damaged: the command will say which
        return False


@functools.cache
def _decoder_identity(name: str) -> dict[str, Any]:
    """Identity of the decoder that a study names, by its files. Kept: its weights are large, and hashed for it."""
    return read_identity(name, "decoder")


def _steps_done(made: Run | None, most: int) -> int:
    """Training steps: by the last line of the log, or by the newest EMA checkpoint where that is further."""
    if made is None:
        return 0
    done = max([0, *made.ema_checkpoint_steps()])
    try:
        with made.log.open("rb") as file:
            file.seek(max(0, made.log.stat().st_size - TAIL_BYTES))
            whole = file.read().rpartition(b"\n")[0]
        done = max(done, int(json.loads(whole.rpartition(b"\n")[2])["step"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no complete line yet
    return min(done, most)


def _seconds_step(made: Run | None) -> float | None:
    """Seconds of a training step, from the newest checkpoint of either kind; None: there is none."""
    if made is None:
        return None
    found = [*made.checkpoints.glob("step-*/state.json"), *(made.folder / "snapshots").glob("step-*/state.json")]
    best: tuple[int, float | None] = (0, None)
    for path in found:
        try:
            state = files.read_json(path, "state")
            step, seconds = int(state["step"]), float(state["seconds"])
        except (UserError, KeyError, TypeError, ValueError):
            continue
        if step > best[0] and math.isfinite(seconds):
            best = (step, seconds / step)
    return best[1]


def _failure(path: Path) -> str | None:
    try:
        return str(files.read_json(path, "failure")["reason"])
    except (UserError, KeyError, TypeError):
        return None


@dataclass(frozen=True, kw_only=True)
class Overview:
    """The progress of all runs of a study."""

    study: Expansion
    rows: tuple[Progress, ...]

    def count(self, state: str) -> int:
        """The number of runs in `state`, one of STATES."""
        return sum(row.state == state for row in self.rows)

    @property
    def gflops_left(self) -> float:
        """The remaining compute of all runs."""
        return sum(row.gflops_left for row in self.rows)

    def seconds_step(self, row: Progress) -> float | None:
        """Seconds of a training step: the run's, or the median of its backbone's runs; None: not measured yet."""
        if row.seconds_step is not None:
            return row.seconds_step
        of_same = [each for each in self.rows if each.run.spec.backbone == row.run.spec.backbone]
        known = sorted(each.seconds_step for each in of_same if each.seconds_step is not None)
        return known[len(known) // 2] if known else None

    def seconds_left(self, row: Progress) -> float | None:
        """Seconds of the remaining work at the speed of training; None where that is not known."""
        if not row.gflops_left:
            return 0.0
        seconds_step = self.seconds_step(row)
        return None if seconds_step is None else seconds_step * row.training_steps_left

    def as_dict(self) -> dict[str, Any]:
        """Plain data, JSON-ready."""
        seconds = [self.seconds_left(row) for row in self.rows]
        return {
            "study": self.study.study.name,
            "folder": str(self.study.folder),
            "protocol": self.study.protocol.name,
            "counts": {state: self.count(state) for state in STATES},
            "gflops_left": self.gflops_left,
            "seconds_left": sum(each for each in seconds if each is not None),
            "runs_of_unknown_speed": seconds.count(None),
            "disk_bytes": sum(row.run.disk_bytes for row in self.rows),
            "runs": [
                {
                    "name": row.run.name,
                    "folder": str(row.run.folder),
                    "backbone": row.run.spec.backbone,
                    "seed": row.run.spec.seed,
                    "state": row.state,
                    "reason": row.reason,
                    "log": None if row.log is None else os.fspath(row.log),
                    "steps_done": row.steps_done,
                    "marks": list(row.run.marks),
                    "sample_sets_done": row.sets_done,
                    "sample_sets": row.sets,
                    "gflops_left": row.gflops_left,
                    "seconds_left": left,
                    "commands": [list(words) for words in row.run.commands],
                }
                for row, left in zip(self.rows, seconds, strict=True)
            ],
        }


def overview(study: Expansion, queue: Mapping[str, str] | None = None) -> Overview:
    """The progress of every run of the study. queue: "running" or "queued" by the name of a run, from a cluster."""
    return Overview(study=study, rows=tuple(look(study, run, (queue or {}).get(run.name)) for run in study.runs))
