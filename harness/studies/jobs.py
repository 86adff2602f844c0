"""Starts and stops the commands of a run, with their output in a log and the reason of the last failure in a file.

The process, not the launcher, holds the lock of the log, so the log stays locked if only the launcher dies.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from harness.io import files

EXIT_STOPPED = (130, -signal.SIGINT, -signal.SIGTERM)  # exit codes of a process that was stopped by a signal
PROGRAMS = {"harness": "harness", "torchrun": "torch.distributed.run"}  # command -> Python module
PROMPT = "$ "  # before a command in a log
STOPPED = "harness: interrupted"  # printed after the checkpoint, once for several processes
TAIL_BYTES = 1 << 16  # end of a log that is read
LONGEST_REASON = 400


def start(words: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> subprocess.Popen | None:
    """Start the command with its output appended to `log`. Returns None if another process has locked the log."""
    with files.explained(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab", buffering=0) as file:
            if not files.lock(file.fileno()):  # the process inherits the lock with its stdout
                return None
            file.write(f"{PROMPT}{shlex.join(words)}\n".encode())
            return subprocess.Popen(  # in a new session: Ctrl-C reaches only the launcher, which passes it on once
                [sys.executable, "-m", PROGRAMS[words[0]], *words[1:]], stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                start_new_session=True, env={**os.environ, **(environment or {})},
            )  # fmt: skip


def write_failure(path: Path, words: Sequence[str], log: Path, code: int, reason: str | None = None) -> None:
    """Write the failure of a command to `path`, with `reason` or else the reason that its log gives."""
    reason = reason or reason_of(log, code)
    data = {
        "reason": reason,
        "exit_code": code,
        "command": shlex.join(words),
        "log": str(log),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    files.write_json(path, data)


def reason_of(log: Path, code: int) -> str:
    """Why the last command in the log failed: its last line that begins with "harness: ", else its last line of output;
    or, for a negative exit code, the signal that ended it."""
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = "unknown"
        memory = "; perhaps memory ran out" if -code == signal.SIGKILL else ""
        return f"killed by signal {-code} ({name}){memory}"
    try:
        lines = _output_lines(log)
    except OSError as error:
        return f"exit code {code}; its log cannot be read: {error.strerror or error}"
    errors = [line for line in lines if line.startswith("harness: ")]
    line = (errors or lines or [f"exit code {code}"])[-1].removeprefix("harness: ")
    line = "".join(each if each.isprintable() else " " for each in line)
    return line if len(line) <= LONGEST_REASON else f"{line[: LONGEST_REASON - 3]}..."


def interrupted(log: Path, code: int) -> bool:
    """Whether the last command in the log ended because it was asked to stop. code: its exit code.

    That of torchrun is 1 in any case, so the line STOPPED in the log counts as well.
    """
    try:
        return code in EXIT_STOPPED or (code != 0 and STOPPED in _output_lines(log))
    except OSError:
        return False


def _output_lines(log: Path) -> list[str]:
    """The output of the last command in the log, without empty lines; of a long one only the last TAIL_BYTES."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL_BYTES))
        text = file.read().decode("utf-8", "replace")
    last = re.split(rf"^{re.escape(PROMPT)}.*$", text, flags=re.M)[-1]
    return [line.strip() for line in last.splitlines() if line.strip()]


def stop(process: subprocess.Popen, seconds: float) -> None:
    """Terminate the process and wait for its end; kill it after `seconds`.

    Signal handlers call this. A handler may interrupt `process.wait()`, which holds a lock that `poll` and `wait` need, so
    neither of them is used here.
    """
    process.terminate()
    end = time.monotonic() + seconds
    while not _ended(process) and time.monotonic() < end:
        time.sleep(0.1)
    if not _ended(process):
        process.kill()


def _ended(process: subprocess.Popen) -> bool:
    """Whether the process has ended, without `poll` (see `stop`)."""
    if process.returncode is not None:
        return True
    try:  # WNOWAIT: the exit code stays available for `process.wait()`
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # `process.wait()`, which was interrupted, has taken the exit code already
        return True
