"""How this process was launched: its rank among the processes of a run, from the launcher's environment variables."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from harness.errors import UserError

DEFAULT_PORT = 29500  # torch's
# Ports for the jobs of SLURM, which may share a node: below those that Linux gives to outgoing connections (32768 ...).
JOB_PORTS = range(20_000, 29_500)
RANK_ZERO_SECONDS = 4.0  # for rank 0 to meet the same error and end; less than GRACE_SECONDS of engines.torch.watch
# Variables for rank, world size, local rank and local world size: those of torchrun, which a user who starts each process
# by hand sets as well, and those of srun. Both need MASTER_ADDR.
LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
)


class LaunchInfo(NamedTuple):
    """This process among those of the launcher: its rank overall and on its machine, and the rendezvous address."""

    rank: int  # 0 ... world_size - 1
    world_size: int
    local_rank: int  # on this machine
    local_world_size: int  # processes on this machine
    address: str  # of rank 0
    port: int


def is_distributed(environment: Mapping[str, str]) -> bool:
    """Whether torchrun, srun or the user started this process as one of several."""
    if "MASTER_ADDR" not in environment and "WORLD_SIZE" not in environment:
        return False  # SLURM_NTASKS alone: several tasks of a job, each of which works alone
    return any(environment.get(world_size, "1") != "1" for _, world_size, _, _ in LAUNCHERS)


def read_launch(environment: Mapping[str, str]) -> LaunchInfo:
    """The LaunchInfo of this process, one of several. Raises UserError if a variable is missing or out of range."""
    like_torchrun = "WORLD_SIZE" in environment
    # The names of the launcher's variables, not their values.
    rank, world_size, local_rank, local_world_size = LAUNCHERS[0 if like_torchrun else 1]
    missing = [name for name in (rank, world_size, "MASTER_ADDR") if not environment.get(name)]
    if like_torchrun and not environment.get("MASTER_PORT"):  # srun sets none: `_port_of_job`
        missing.append("MASTER_PORT")
    if missing:
        raise UserError(
            f"{world_size}={environment.get(world_size)} asks for several processes, and {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set; start them with torchrun, or unset {world_size} for one "
            "process"
        )

    def integer(name: str, default: int | None = None, low: int = 0, high: int | None = None) -> int:
        """The value of a variable, low <= value < high. default: for a variable that is not set; None: it must be set."""
        text = environment.get(name)
        if text is None and default is not None:
            return default
        if text is None or not text.isdecimal() or int(text) < low or (high is not None and int(text) >= high):
            within = f"{low} or more" if high is None else f"a whole number from {low} to {high - 1}"
            raise UserError(f"{name}={text} should be {within}; start the processes with torchrun, which sets it")
        return int(text)

    count = integer(world_size, low=1)
    return LaunchInfo(
        rank=integer(rank, high=count),
        world_size=count,
        local_rank=integer(local_rank, default=integer(rank)),  # by default all processes are on one machine
        local_world_size=integer(local_world_size, default=count, low=1),
        address=environment["MASTER_ADDR"],
        port=integer("MASTER_PORT", default=_port_of_job(environment), low=1, high=1 << 16),
    )


def _port_of_job(environment: Mapping[str, str]) -> int:
    """The port that all tasks of a SLURM job find from its id, so that two jobs on a node do not meet; else DEFAULT_PORT."""
    job = environment.get("SLURM_JOB_ID", "")
    return JOB_PORTS[int(job) % len(JOB_PORTS)] if job.isdecimal() else DEFAULT_PORT


def is_main_process(environment: Mapping[str, str]) -> bool:
    """Whether this process is to print what every process would print, such as that it was interrupted.

    Under torchrun, whose processes share a terminal, it is True in rank 0 alone; without torchrun, in every process.
    """
    return "TORCHELASTIC_RUN_ID" not in environment or environment.get(LAUNCHERS[0][0], "0") == "0"


def defer_to_rank_zero(environment: Mapping[str, str]) -> None:
    """Wait RANK_ZERO_SECONDS before an error is printed, in every process of torchrun but rank 0. Elsewhere do nothing.

    If rank 0 meets the same error, it prints it and ends, and torchrun then ends this process during the wait. A process
    that outlives the wait has an error that rank 0 does not have, and the caller has to print it.
    """
    if not is_main_process(environment):
        time.sleep(RANK_ZERO_SECONDS)


def report_elastic_error(environment: Mapping[str, str], reason: str) -> None:
    """Write `reason` to the file from which torchrun reports why a process failed; without it torchrun gives only a link.

    The file has the form of torch.distributed.elastic's ErrorHandler. Does nothing without torchrun.
    """
    if path := environment.get("TORCHELASTIC_ERROR_FILE"):
        data = {"message": {"message": reason, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps(data), encoding="ascii")
