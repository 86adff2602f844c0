"""The launcher of a SLURM cluster: a job for each run, by submitit, which puts it back into the queue when its time is up.

What submitit carries to the node (its own pickle, in the study's folder) are words; nothing that comes back is unpickled:
how far a run is stands in its folder. `SIGUSR2`, which SLURM sends before it ends a job, becomes a checkpoint.
"""

from __future__ import annotations

import getpass
import logging
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.errors import RunError, UserError, shown
from harness.io import files
from harness.registry import unknown
from harness.runs.run import lock_folder
from harness.studies import jobs
from harness.studies.expand import Expansion, StudyRun
from harness.studies.state import Overview, Progress, failure_path, log_path, overview

logger = logging.getLogger(__name__)

SIGNAL_SECONDS = 120  # before the end of a job: what a checkpoint may take
SPARE_SECONDS = 20  # of those, for submitit to put the job back
LISTS = ("setup", "teardown", "srun_args")  # the settings that are lists of text
SWITCHES = ("use_srun", "stderr_to_stdout")  # of submitit: false says something; of sbatch it is left out
QUEUED = ("PENDING", "CONFIGURING", "REQUEUED")  # states of a job that has not started
TIMEOUTS = 1_000_000  # how often a job may be put back: a run of two weeks in jobs of four hours is 84


class Command:
    """The commands of one run, one after the other: called on the node, by submitit."""

    def __init__(self, *, commands: list[list[str]], log: str, failure: str, seconds: float):
        self.commands, self.log, self.failure, self.seconds = commands, log, failure, seconds
        self._process: subprocess.Popen | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_process": None}

    def __call__(self) -> int:
        """The exit code of the last command: the first that did not end well."""
        code = 0
        for words in self.commands:
            self._process = jobs.start(words, Path(self.log))
            if self._process is None:
                return 2  # another job of this run is at work
            code = self._process.wait()
            if code:
                break
        if code and not jobs.interrupted(Path(self.log), code):
            jobs.failed(Path(self.failure), words, Path(self.log), code)
        return code

    def checkpoint(self) -> Any:
        """Have the run write its checkpoint, and go on in a later job with the same words."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None and self._process.poll() is None:
            jobs.stop(self._process, self.seconds)
        return DelayedSubmission(self)


def parse_setting(text: str) -> Any:
    """A value of `--slurm KEY=VALUE`: a whole number, true, false, or text."""
    if text in ("true", "false"):
        return text == "true"
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def minutes(value: Any) -> int:
    """A time limit as sbatch takes it (minutes, H:M:S, D-H, D-H:M:S and so on) in whole minutes, rounded up."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", str(value))
    if match is None:
        raise UserError(
            f"[slurm]: time = {shown(value)} is no time limit: write minutes, or text such as '12:00:00', '2-00'"
        )
    first, second, third = (int(match[place] or 0) for place in (2, 3, 4))
    if match[1] is not None:  # days-hours[:minutes[:seconds]]
        seconds = ((int(match[1]) * 24 + first) * 60 + second) * 60 + third
    elif match[4] is not None:
        seconds = (first * 60 + second) * 60 + third
    else:  # minutes[:seconds]
        seconds = first * 60 + second
    if seconds < 60:
        raise UserError(f"[slurm]: time = {shown(value)} is less than a minute")
    return -(-seconds // 60)


def check_setting(name: str, value: Any) -> None:
    """Refuse what would not stand in its place in the script of a job: a second line there would be a command."""
    if name == "additional_parameters":
        if not isinstance(value, dict):
            raise UserError(f"[slurm]: {name} must be a table")
        for inner, each in value.items():
            if re.fullmatch("[A-Za-z0-9_-]+", inner) is None:
                raise UserError(f"[slurm]: {name}: {shown(inner)} is no name of an option")
            check_setting(f"{name}.{inner}", each)
    elif name in LISTS:
        if not isinstance(value, list) or not all(isinstance(each, str) and each.isprintable() for each in value):
            raise UserError(f"[slurm]: {name} = {shown(value)} must be a list of printable text, one line an item")
    elif isinstance(value, (dict, list)) or not str(value).isprintable():
        raise UserError(f"[slurm]: {name} = {shown(value)} must be a number, true, false or printable text in one line")


def executor(study: Expansion, settings: Mapping[str, Any]) -> Any:
    """submitit's executor with the settings of the study's [slurm] and `settings` laid over them; what it does not know
    is refused by name."""
    try:
        from submitit import SlurmExecutor
    except ModuleNotFoundError as error:
        raise UserError("--launcher slurm needs submitit: pip install 'backbone-harness[slurm]'") from error

    class Executor(SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 2  # its scripts can be written where SLURM is not

    merged: dict[str, Any] = {"signal_delay_s": SIGNAL_SECONDS, "comment": f"harness study {study.study.name}"}
    merged |= {**study.study.slurm, **settings}
    known = SlurmExecutor._valid_parameters() - {"job_name"}
    for name in merged:
        if name not in known:
            raise UserError(f"{study.study.file}: [slurm]: {unknown('setting', name, sorted(known))}")
        check_setting(name, merged[name])
    if "time" not in merged:
        raise UserError(
            f"{study.study.file}: [slurm] has no time, the limit of a job; a run that takes longer is put back"
        )
    merged["time"] = minutes(merged["time"])
    if type(merged["signal_delay_s"]) is not int or merged["signal_delay_s"] <= SPARE_SECONDS:
        raise UserError(
            f"[slurm]: signal_delay_s must be more than {SPARE_SECONDS} seconds, for a checkpoint takes time"
        )
    more: dict[str, Any] = {"requeue": True, **merged.pop("additional_parameters", {})}
    if isinstance(merged.get("mem"), str):  # submitit takes a number of GB, sbatch any unit
        more["mem"] = merged.pop("mem")
    merged = {name: each for name, each in merged.items() if each is not False or name in SWITCHES}
    merged["additional_parameters"] = {name: each for name, each in more.items() if each is not False}
    made = Executor(study.folder / "slurm" / "%j", max_num_timeout=TIMEOUTS)
    made.update_parameters(**merged)
    return made


def command_of(study: Expansion, row: Progress, seconds: float) -> Command:
    """What a job of the run does."""
    return Command(
        commands=[list(words) for words in row.pending],
        log=str(log_path(study, row.run)),
        failure=str(failure_path(study, row.run)),
        seconds=seconds,
    )


def job_name(study: Expansion, run: StudyRun) -> str:
    """Under which the queue knows the run's job."""
    return f"harness-{study.study.name}-{run.name}"


def queue(study: Expansion) -> dict[str, str]:
    """What the queue holds of the study: by run, "running" or "queued". Nothing where there is no SLURM."""
    if shutil.which("squeue") is None or not (study.folder / "slurm").exists():
        return {}
    words = ["squeue", "--noheader", "--user", getpass.getuser(), "--format", "%T %j"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise RunError(f"squeue does not answer ({said[-1] if said else error}); try again later") from error
    names = {job_name(study, run): run.name for run in study.runs}
    found = {}
    for line in done.stdout.splitlines():
        state, _, name = line.strip().partition(" ")
        if name.strip() in names:
            found[names[name.strip()]] = "queued" if state in QUEUED else "running"
    return found


def submit(study: Expansion, settings: Mapping[str, Any], *, retry_failed: bool) -> Overview:
    """Submit a job for each run that has something left to do and is neither at work nor in the queue."""
    made = executor(study, settings)
    found = overview(study, queue(study))
    states = ("to do", "interrupted", *(["failed"] if retry_failed else []))
    wanted = [row for row in found.rows if row.state in states and row.pending]
    if shutil.which("sbatch") is None:
        return _write_scripts(study, made, wanted)
    with lock_folder(study.folder):
        for row in wanted:
            with files.explained(study.folder):
                failure_path(study, row.run).unlink(missing_ok=True)
                log_path(study, row.run).parent.mkdir(parents=True, exist_ok=True)
            made.update_parameters(job_name=job_name(study, row.run))
            seconds = made.parameters["signal_delay_s"] - SPARE_SECONDS
            try:
                job = made.submit(command_of(study, row, seconds))
            except (OSError, RuntimeError, subprocess.SubprocessError) as error:
                said = str(error).strip().splitlines() or [type(error).__name__]
                raise RunError(f"sbatch has refused the job of {row.run.name}: {said[-1]}") from error
            logger.info(f"submitted {row.run.name} as job {job.job_id}  (log {log_path(study, row.run)})")
    return overview(study, queue(study))


def _write_scripts(study: Expansion, made: Any, wanted: list[Progress]) -> Overview:
    """Where there is no SLURM: the scripts that would be submitted, to be read."""
    folder = study.folder / "slurm"
    for row in wanted:
        made.update_parameters(job_name=job_name(study, row.run))
        text = made._make_submission_file_text(made._submitit_command_str, "")
        files.write_bytes(folder / f"{row.run.name}.sh", text.encode())
    raise UserError(
        f"sbatch is not on this machine; the {len(wanted)} scripts that it would get are in {folder}, to be read: give "
        "the same command where it is"
    )
