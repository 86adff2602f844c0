"""The progress of a study. It is read from the folders of the runs; no other file stores it, so none can contradict them.

The study's folder has only logs and failures: `logs/RUN.log` is the output of a run's commands and is locked while one of
them runs; `failures/RUN.json` is the reason of the last failure.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.autoencoders.load import read_identity
from harness.errors import UserError
from harness.io import files
from harness.io.text import parse_json
from harness.pipeline.measure import existing_records
from harness.pipeline.sidecar import read_fields
from harness.planning.request import Request
from harness.runs.run import Run, check_plugins, identity_difference, open_run, without_plugins
from harness.runs.sample_set import sample_request
from harness.runs.samples import read_sidecar, sidecar_path
from harness.settings import RunOptions
from harness.studies.expand import Expansion, StudyRun

STATES = ("done", "running", "queued", "failed", "interrupted", "to do")
TAIL_BYTES = 1 << 16  # end of a training log that is read


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The progress of one run of a study."""

    run: StudyRun
    state: str  # one of STATES
    steps_done: int  # of run.steps
    sets_done: int  # sample sets that are sampled and measured, of `sets`
    sets: int
    gflops_left: float
    seconds_step: float | None  # per training step, measured in this run; None: not measured yet
    reason: str | None = None  # of the last failure
    pending: tuple[tuple[str, ...], ...] = ()  # commands whose work is not done
    log: Path | None = None

    @property
    def equivalent_steps_left(self) -> float:
        """The number of training steps that would take the remaining compute, sampling included."""
        return self.gflops_left / self.run.gflops_step


def log_path(study: Expansion, run: StudyRun) -> Path:
    """The output of the run's commands; locked while one of them runs."""
    return study.folder / "logs" / f"{run.name}.log"


def failure_path(study: Expansion, run: StudyRun) -> Path:
    """The file with the reason why the last command failed; it does not exist if the command did not fail."""
    return study.folder / "failures" / f"{run.name}.json"


def is_running(study: Expansion, run: StudyRun) -> bool:
    """Whether a process works on the run, started by the study or by a user."""
    return files.is_locked(log_path(study, run)) or files.is_locked(run.folder / "lock")


def progress_of(study: Expansion, run: StudyRun, in_queue: str | None = None) -> Progress:
    """The progress of a run. in_queue: "running" or "queued" if a cluster has a job for it."""
    log = log_path(study, run)
    reason, existing = None, None
    running = is_running(study, run)  # before the files are read: if it ends meanwhile, it counts as running
    try:
        existing = open_run(run.folder) if (run.folder / "run.json").exists() else None
        if existing is not None:
            there, here = without_plugins(existing.identity), without_plugins(run.spec.identity)
            if there != here:
                raise UserError(f"{run.folder} holds another run ({identity_difference(there, here)}); move it away")
            check_plugins(existing, run.spec.plugins)
    except UserError as error:
        reason, existing = str(error), None
    missing = list(_missing_sets(existing, run))
    steps_done = _steps_done(existing, run.steps)
    sets = len(run.milestones) * sum(len(request.sampling.steps) for request in run.requests)
    failure = _failure_reason(failure_path(study, run))
    if not missing:
        state, failure = "done", None
    elif running or in_queue == "running":  # locks of another machine may not be visible here
        state, failure = "running", None
    elif in_queue is not None:
        state, failure = in_queue, None
    elif reason or failure:
        state = "failed"
    else:
        state = "interrupted" if log.exists() else "to do"
    gflops = (run.steps - steps_done) * run.gflops_step
    gflops += sum(request.estimated_gflops_image(steps) * request.samples for request, steps in missing)
    unfinished = [request for request, _ in missing]
    pending = [words for request, words in zip(run.requests, run.commands, strict=True) if request in unfinished]
    return Progress(
        run=run, state=state, steps_done=steps_done, sets_done=sets - len(missing), sets=sets,
        gflops_left=gflops, seconds_step=_seconds_step(existing), pending=tuple(pending),
        reason=reason or failure, log=log if log.exists() else None,
    )  # fmt: skip


def _missing_sets(existing: Run | None, run: StudyRun) -> Iterator[tuple[Request, int]]:
    """The sample sets that are not sampled or not measured: the request and the sampler steps of each."""
    for request, options in zip(run.requests, run.options, strict=True):
        for milestone in run.milestones:
            for steps in request.sampling.steps:
                if existing is None or not _complete(existing, request, options, milestone, steps):
                    yield request, steps


def _complete(run: Run, request: Request, options: RunOptions, milestone: int, steps: int) -> bool:
    """Whether the sample set of training step `milestone` with `steps` sampler steps exists and is measured.

    Hashes are read from the files and not compared with their contents, which would take minutes for each status.
    """
    from evaluators.suites import get_suite

    try:
        expected = sample_request(
            run, milestone, request.sampling, steps, request.samples, gflops_image=request.estimated_gflops_image(steps),
            precision=options.sampling_precision, batch=options.sampling_batch,
            decoder=None if options.decoder is None else _decoder_identity(options.decoder, options.entry.get("decoder")),
        )  # fmt: skip
        path = run.folder / "samples" / expected.name(run) / "samples.npz"
        if not (path.exists() and sidecar_path(path).exists()):
            return False
        sidecar = read_sidecar(path)
        if sidecar["identity"] != expected.identity(run):
            return False
        fields, protocol = read_fields(path, sidecar["sha256"]), request.protocol
        return (
            existing_records(run.records, fields, protocol, get_suite(protocol.suite), reference_sha256=None)
            is not None
        )
    except (UserError, KeyError, TypeError):  # missing or damaged: the run's command reports it
        return False


@functools.cache
def _decoder_identity(name: str, entry: str | None) -> dict[str, Any]:
    """Identity of the decoder that a study names. Cached, because the large files of its weights are hashed."""
    return read_identity(name, "decoder", entry)


def _steps_done(run: Run | None, limit: int) -> int:
    """Training steps done, at most `limit`: the larger of the log's last step and the newest EMA checkpoint's."""
    if run is None:
        return 0
    done = max([0, *run.ema_checkpoint_steps()])
    try:
        with run.log.open("rb") as file:
            file.seek(max(0, run.log.stat().st_size - TAIL_BYTES))
            complete_lines = file.read().rpartition(b"\n")[0]  # without a last line that is not complete
        done = max(done, int(parse_json(complete_lines.rpartition(b"\n")[2])["step"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no complete line yet
    return min(done, limit)


def _seconds_step(run: Run | None) -> float | None:
    """Mean seconds per training step, by the newest checkpoint or EMA checkpoint; None if there is none."""
    if run is None:
        return None
    state_files = [*run.checkpoints.glob("step-*/state.json"), *(run.folder / "snapshots").glob("step-*/state.json")]
    newest_step = 0
    seconds_step: float | None = None
    for path in state_files:
        try:
            state = files.read_json(path, "state")
            step, seconds = int(state["step"]), float(state["seconds"])
        except (UserError, KeyError, TypeError, ValueError):
            continue
        if step > newest_step and math.isfinite(seconds):  # seconds: of all steps so far
            newest_step, seconds_step = step, seconds / step
    return seconds_step


def _failure_reason(path: Path) -> str | None:
    """The reason of the last failure; None if there is no readable failure file."""
    try:
        return str(files.read_json(path, "failure")["reason"])
    except (UserError, KeyError, TypeError):
        return None


@dataclass(frozen=True, kw_only=True)
class Overview:
    """The progress of all runs of a study."""

    study: Expansion
    rows: tuple[Progress, ...]

    @property
    def has_variants(self) -> bool:
        """Whether the study trains and samples its backbones in several ways."""
        return any(row.run.variant for row in self.rows)

    def count(self, state: str) -> int:
        """The number of runs in `state`, one of STATES."""
        return sum(row.state == state for row in self.rows)

    @property
    def gflops_left(self) -> float:
        """The remaining compute of all runs."""
        return sum(row.gflops_left for row in self.rows)

    def seconds_step(self, row: Progress) -> float | None:
        """Seconds per training step: of the run, or the median of its backbone's runs; None if not measured yet."""
        if row.seconds_step is not None:
            return row.seconds_step
        same_backbone = [other for other in self.rows if other.run.spec.backbone == row.run.spec.backbone]
        seconds = sorted(other.seconds_step for other in same_backbone if other.seconds_step is not None)
        return seconds[len(seconds) // 2] if seconds else None

    def seconds_left(self, row: Progress) -> float | None:
        """Seconds of the remaining work at the speed of training; None if that speed is not known."""
        if not row.gflops_left:
            return 0.0
        seconds_step = self.seconds_step(row)
        return None if seconds_step is None else seconds_step * row.equivalent_steps_left

    def as_dict(self) -> dict[str, Any]:
        """The overview as plain data, ready for JSON."""
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
                    **({"variant": row.run.variant} if self.has_variants else {}),
                    "folder": str(row.run.folder),
                    "backbone": row.run.spec.backbone,
                    "seed": row.run.spec.seed,
                    "state": row.state,
                    "reason": row.reason,
                    "log": None if row.log is None else os.fspath(row.log),
                    "steps_done": row.steps_done,
                    "marks": list(row.run.milestones),
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
    """The progress of all runs of a study. queue: "running" or "queued" by the name of a run, from a cluster."""
    return Overview(study=study, rows=tuple(progress_of(study, run, (queue or {}).get(run.name)) for run in study.runs))
