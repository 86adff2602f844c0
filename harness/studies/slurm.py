"""The SLURM launcher: one job for each run, submitted by submitit, which requeues a job when its time limit is reached.

submitit passes the commands, as text, to the node in a pickle in the study's folder. No result is unpickled: the
progress of a run is read from its folder. SLURM sends `SIGUSR2` before it ends a job, and the run then writes a
checkpoint.
"""

from __future__ import annotations

import getpass
import logging
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from harness.errors import RunError, UserError, shown
from harness.io import files
from harness.registry import unknown
from harness.runs.run import lock_folder
from harness.studies import jobs
from harness.studies.expand import Expansion, StudyRun
from harness.studies.state import Overview, Progress, failure_path, log_path, overview

logger = logging.getLogger(__name__)

SIGNAL_SECONDS = 120  # between the signal and the end of a job: time for a checkpoint
REQUEUE_SECONDS = 20  # part of SIGNAL_SECONDS that submitit has to requeue the job
LIST_SETTINGS = ("setup", "teardown", "srun_args")  # settings that are lists of text
# Boolean settings of submitit, where false is a value. An option of sbatch that is false is left out.
SUBMITIT_SWITCHES = ("use_srun", "stderr_to_stdout")
QUEUED = ("PENDING", "CONFIGURING", "REQUEUED")  # states of a job that has not started
MAX_TIMEOUTS = 1_000_000  # how often a job may be requeued: no limit in practice


class Command:
    """The commands of one run. submitit calls this object on the node, and it runs the commands one after the other.

    log, failure: paths, as in `log_path` and `failure_path`. seconds: time that a checkpoint may take.
    """

    def __init__(self, *, commands: list[list[str]], log: str, failure: str, seconds: float):
        self.commands, self.log, self.failure, self.seconds = commands, log, failure, seconds
        self._process: subprocess.Popen | None = None

    def __getstate__(self) -> dict[str, Any]:
        """The state for pickle, which cannot store a process."""
        return {**self.__dict__, "_process": None}

    def __call__(self) -> int:
        """Run the commands until one fails; returns the exit code of the last command that was run."""
        code = 0
        for words in self.commands:
            self._process = jobs.start(words, Path(self.log))
            if self._process is None:
                return 2  # another job works on this run; exit code of a UserError
            code = self._process.wait()
            if code:
                break
        if code and not jobs.interrupted(Path(self.log), code):
            jobs.write_failure(Path(self.failure), words, Path(self.log), code)
        return code

    def checkpoint(self) -> Any:
        """Stop the run, which writes a checkpoint, and requeue the job with the same commands. Called by submitit."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None and self._process.poll() is None:
            jobs.stop(self._process, self.seconds)
        return DelayedSubmission(self)


def parse_setting(text: str) -> Any:
    """A value of `--slurm KEY=VALUE`: a whole number, true, false, or text."""
    if text in ("true", "false"):
        return text == "true"
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def time_limit_minutes(value: Any) -> int:
    """A time limit of sbatch (minutes, H:M:S, D-H, D-H:M:S and so on) in minutes, rounded up.

    Raises `UserError` for anything else, and for less than a minute.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", str(value))
    if match is None:
        raise UserError(
            f"[slurm]: time = {shown(value)} is not a time limit: write minutes, or text such as '12:00:00', '2-00'"
        )
    first, second, third = (int(match[group] or 0) for group in (2, 3, 4))
    if match[1] is not None:  # days-hours[:minutes[:seconds]]
        seconds = ((int(match[1]) * 24 + first) * 60 + second) * 60 + third
    elif match[4] is not None:  # hours:minutes:seconds
        seconds = (first * 60 + second) * 60 + third
    else:  # minutes[:seconds]
        seconds = first * 60 + second
    if seconds < 60:
        raise UserError(f"[slurm]: time = {shown(value)} is less than a minute")
    return -(-seconds // 60)


def check_setting(name: str, value: Any) -> None:
    """Raise `UserError` for a value that is not valid in a job script, where a second line would be a command."""
    if name == "additional_parameters":
        if not isinstance(value, dict):
            raise UserError(f"[slurm]: {name} must be a table")
        for inner, each in value.items():
            if re.fullmatch("[A-Za-z0-9_-]+", inner) is None:
                raise UserError(f"[slurm]: {name}: {shown(inner)} is not the name of an option")
            check_setting(f"{name}.{inner}", each)
    elif name in LIST_SETTINGS:
        if not isinstance(value, list) or not all(isinstance(each, str) and each.isprintable() for each in value):
            raise UserError(f"[slurm]: {name} = {shown(value)} must be a list of printable text, one line an item")
    elif isinstance(value, (dict, list)) or not str(value).isprintable():
        raise UserError(f"[slurm]: {name} = {shown(value)} must be a number, true, false or printable text in one line")


def executor(study: Expansion, settings: Mapping[str, Any]) -> Any:
    """submitit's executor with the settings of the study's [slurm], overridden by `settings`.

    Raises `UserError` if submitit is not installed, or for a setting that is unknown or has no valid value.
    """
    try:
        from submitit import SlurmExecutor
    except ModuleNotFoundError as error:
        raise UserError("--launcher slurm needs submitit: pip install 'backbone-harness[slurm]'") from error

    class Executor(SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 2  # "available", also without SLURM: `_write_scripts` needs an executor on any machine

    merged: dict[str, Any] = {"signal_delay_s": SIGNAL_SECONDS, "comment": f"harness study {study.study.name}"}
    merged |= {**study.study.slurm, **settings}
    known = SlurmExecutor._valid_parameters() - {"job_name"}  # `submit` sets the name of each job
    for name in merged:
        if name not in known:
            raise UserError(f"{study.study.file}: [slurm]: {unknown('setting', name, sorted(known))}")
        check_setting(name, merged[name])
    if "time" not in merged:
        raise UserError(
            f"{study.study.file}: [slurm]: time, the time limit of a job, is missing; a run that takes longer is requeued"
        )
    merged["time"] = time_limit_minutes(merged["time"])
    # `type`: isinstance would accept true as an integer
    if type(merged["signal_delay_s"]) is not int or merged["signal_delay_s"] <= REQUEUE_SECONDS:
        raise UserError(
            f"[slurm]: signal_delay_s must be more than {REQUEUE_SECONDS} seconds, because a checkpoint takes time"
        )
    additional: dict[str, Any] = {"requeue": True, **merged.pop("additional_parameters", {})}
    if isinstance(merged.get("mem"), str):  # submitit accepts only a number of GB, sbatch any unit
        additional["mem"] = merged.pop("mem")
    merged = {name: each for name, each in merged.items() if each is not False or name in SUBMITIT_SWITCHES}
    merged["additional_parameters"] = {name: each for name, each in additional.items() if each is not False}
    configured = Executor(study.folder / "slurm" / "%j", max_num_timeout=MAX_TIMEOUTS)
    configured.update_parameters(**merged)
    return configured


def command_of(study: Expansion, row: Progress, seconds: float) -> Command:
    """The callable of the run's job. seconds: time that a checkpoint may take."""
    return Command(
        commands=[list(words) for words in row.pending],
        log=str(log_path(study, row.run)),
        failure=str(failure_path(study, row.run)),
        seconds=seconds,
    )


def job_name(study: Expansion, run: StudyRun) -> str:
    """Name of the run's job in the queue."""
    return f"harness-{study.study.name}-{run.name}"


def queue(study: Expansion) -> dict[str, str]:
    """Name of the run -> "running" or "queued", for the runs that have a job.

    Empty on a machine without SLURM, and for a study that has submitted nothing yet.
    """
    if shutil.which("squeue") is None or not (study.folder / "slurm").exists():
        return {}
    words = ["squeue", "--noheader", "--user", getpass.getuser(), "--format", "%T %j"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise RunError(f"squeue does not answer ({lines[-1] if lines else error}); try again later") from error
    names = {job_name(study, run): run.name for run in study.runs}
    states = {}
    for line in done.stdout.splitlines():
        state, _, name = line.strip().partition(" ")
        if name.strip() in names:
            states[names[name.strip()]] = "queued" if state in QUEUED else "running"
    return states


def submit(study: Expansion, settings: Mapping[str, Any], *, retry_failed: bool) -> Overview:
    """Submit a job for each run that has work left and is neither running nor in the queue; returns the progress."""
    slurm_executor = executor(study, settings)
    before = overview(study, queue(study))
    states = ("to do", "interrupted", *(["failed"] if retry_failed else []))
    to_submit = [row for row in before.rows if row.state in states and row.pending]
    if shutil.which("sbatch") is None:
        _write_scripts(study, slurm_executor, to_submit)  # raises in any case
    with lock_folder(study.folder):
        for row in to_submit:
            with files.explained(study.folder):
                failure_path(study, row.run).unlink(missing_ok=True)
                log_path(study, row.run).parent.mkdir(parents=True, exist_ok=True)
            slurm_executor.update_parameters(job_name=job_name(study, row.run))
            seconds = slurm_executor.parameters["signal_delay_s"] - REQUEUE_SECONDS
            try:
                job = slurm_executor.submit(command_of(study, row, seconds))
            except (OSError, RuntimeError, subprocess.SubprocessError) as error:
                lines = str(error).strip().splitlines() or [type(error).__name__]
                raise RunError(f"sbatch has refused the job of {row.run.label}: {lines[-1]}") from error
            logger.info(f"submitted {row.run.label} as job {job.job_id}  (log {log_path(study, row.run)})")
    return overview(study, queue(study))


def _write_scripts(study: Expansion, slurm_executor: Any, rows: list[Progress]) -> NoReturn:
    """On a machine without SLURM: write the job scripts for inspection, and raise `UserError`."""
    folder = study.folder / "slurm"
    for row in rows:
        slurm_executor.update_parameters(job_name=job_name(study, row.run))
        text = slurm_executor._make_submission_file_text(slurm_executor._submitit_command_str, "")
        files.write_bytes(folder / f"{row.run.name}.sh", text.encode())
    raise UserError(
        f"sbatch is not on this machine; the {len(rows)} scripts that it would get are in {folder}, for inspection: run "
        "the same command on a machine with SLURM"
    )
