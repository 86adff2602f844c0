"""Which process of how many this is, from what a launcher says in the environment; and the shape of a mesh."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from harness.errors import UserError

FIRST_PORT = "29500"  # torch's own
ALONE_SECONDS = 2.0  # after which the first process would have ended; less than the watch gives (engines.torch.watch)
# What torchrun sets, or a user who starts each process by hand; and what srun does. Both need MASTER_ADDR.
LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
)


class Rank(NamedTuple):
    """A process among `size`, and among `beside` on its machine."""

    index: int
    size: int
    local: int
    beside: int
    address: str
    port: int


def launched(environment: Mapping[str, str]) -> bool:
    """Whether a launcher of torch's started several processes, of which this is one."""
    if "MASTER_ADDR" not in environment and "WORLD_SIZE" not in environment:
        return False  # a job of SLURM's whose tasks are each for themselves
    return any(environment.get(size, "1") != "1" for _, size, _, _ in LAUNCHERS)


def rank_of(environment: Mapping[str, str]) -> Rank:
    """This process of those that were `launched`; what does not fit together is refused."""
    index, size, local, beside = LAUNCHERS[0 if "WORLD_SIZE" in environment else 1]
    lacking = [name for name in (index, size, "MASTER_ADDR") if not environment.get(name)]
    by_hand = index == LAUNCHERS[0][0]
    if by_hand and not environment.get("MASTER_PORT"):
        lacking.append("MASTER_PORT")
    if lacking:
        raise UserError(
            f"{size}={environment.get(size)} asks for several processes, and {' and '.join(lacking)} "
            f"{'is' if len(lacking) == 1 else 'are'} not set; start them with torchrun, or unset {size} for one process"
        )

    def number(name: str, default: int | None = None, low: int = 0, high: int | None = None) -> int:
        text = environment.get(name)
        if text is None and default is not None:
            return default
        if text is None or not text.isdecimal() or int(text) < low or (high is not None and int(text) >= high):
            within = f"{low} or more" if high is None else f"a whole number from {low} to {high - 1}"
            raise UserError(f"{name}={text} should be {within}; start the processes with torchrun, which sets it")
        return int(text)

    count = number(size, low=1)
    return Rank(
        index=number(index, high=count),
        size=count,
        local=number(local, default=number(index)),
        beside=number(beside, default=count, low=1),
        address=environment["MASTER_ADDR"],
        port=int(number("MASTER_PORT", default=int(FIRST_PORT), low=1, high=1 << 16)),
    )


def is_main_process(environment: Mapping[str, str]) -> bool:
    """Whether this process says what all have to say: of torchrun's, who write to one terminal, the first."""
    return "TORCHELASTIC_RUN_ID" not in environment or environment.get(LAUNCHERS[0][0], "0") == "0"


def defer_to_rank_zero(environment: Mapping[str, str]) -> None:
    """Wait, in another process of torchrun's than the first, so long that the first has met with the same refusal and has
    said it; at its end torchrun ends this one. Who is still here has a reason of its own, and must say it."""
    if not is_main_process(environment):
        time.sleep(ALONE_SECONDS)


def report_elastic_error(environment: Mapping[str, str], reason: str) -> None:
    """Give torchrun the reason for its report of a failed process, which else has a link to its own documentation there.

    The form is that of torch.distributed.elastic's ErrorHandler.
    """
    if path := environment.get("TORCHELASTIC_ERROR_FILE"):
        data = {"message": {"message": reason, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps(data), encoding="ascii")


def mesh_sides(shape: str) -> tuple[int, int]:
    """ "DATAxMODEL" as numbers; another form is refused."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", shape)
    if match is None:
        raise UserError(f"--mesh {shape} is not of the form DATAxMODEL, as in 4x2")
    return int(match[1]), int(match[2])
