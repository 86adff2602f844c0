"""The commands of a run as processes: what they say goes to a log, and why the last one failed is kept.

The log is locked through the process's own descriptor, so a process that outlives its launcher is still seen at work.
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

EXIT_STOPPED = (130, -signal.SIGINT, -signal.SIGTERM)  # of who was told to stop
PROGRAMS = {"harness": "harness", "torchrun": "torch.distributed.run"}  # the modules behind what is typed
PROMPT = "$ "  # before a command in a log
STOPPED = "harness: interrupted"  # what is said after the checkpoint, by one of several processes, too
TAIL_BYTES = 1 << 16
LONGEST_REASON = 400


def start(words: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> subprocess.Popen | None:
    """Start the command in a session of its own, with its output at the end of `log`; None: one is at work there."""
    with files.explained(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab", buffering=0) as file:
            if not files.lock(file.fileno()):
                return None
            file.write(f"{PROMPT}{shlex.join(words)}\n".encode())
            return subprocess.Popen(  # a session of its own: Ctrl-C reaches the launcher, which passes it on once
                [sys.executable, "-m", PROGRAMS[words[0]], *words[1:]], stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                start_new_session=True, env={**os.environ, **(environment or {})},
            )  # fmt: skip


def failed(failure: Path, words: Sequence[str], log: Path, code: int, reason: str | None = None) -> None:
    """Keep why the command failed: `reason`, or what its log says."""
    reason = reason or reason_of(log, code)
    data = {
        "reason": reason,
        "exit_code": code,
        "command": shlex.join(words),
        "log": str(log),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    files.write_json(failure, data)


def reason_of(log: Path, code: int) -> str:
    """The last thing that the last command in the log has said, or the signal that ended it."""
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = "unknown"
        memory = "; perhaps memory ran out" if -code == signal.SIGKILL else ""
        return f"killed by signal {-code} ({name}){memory}"
    try:
        said = _said(log)
    except OSError as error:
        return f"exit code {code}; its log cannot be read: {error.strerror or error}"
    own = [line for line in said if line.startswith("harness: ")]
    line = (own or said or [f"exit code {code}"])[-1].removeprefix("harness: ")
    line = "".join(each if each.isprintable() else " " for each in line)
    return line if len(line) <= LONGEST_REASON else f"{line[: LONGEST_REASON - 3]}..."


def interrupted(log: Path, code: int) -> bool:
    """Whether the last command in the log ended because it was told to."""
    try:
        return code in EXIT_STOPPED or (code != 0 and STOPPED in _said(log))
    except OSError:
        return False


def _said(log: Path) -> list[str]:
    """The lines of the last command in the log that are not empty."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL_BYTES))
        text = file.read().decode("utf-8", "replace")
    last = re.split(rf"^{re.escape(PROMPT)}.*$", text, flags=re.M)[-1]
    return [line.strip() for line in last.splitlines() if line.strip()]


def stop(process: subprocess.Popen, seconds: float) -> None:
    """Tell the process to stop and wait until it has, at most so long; then it is killed.

    For signal handlers: what they interrupt may be `process.wait()`, whose lock `poll` and `wait` would not get.
    """
    process.terminate()
    end = time.monotonic() + seconds
    while not _ended(process) and time.monotonic() < end:
        time.sleep(0.1)
    if not _ended(process):
        process.kill()


def _ended(process: subprocess.Popen) -> bool:
    if process.returncode is not None:
        return True
    try:  # looks, and leaves the exit code to who waits for it
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True
