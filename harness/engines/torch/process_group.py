"""Several processes of one run, joined by torch.distributed: gloo between CPUs, NCCL between GPUs.

torchrun starts them, or SLURM's srun with MASTER_ADDR set, or a user who sets RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT for each. Process k of a machine takes the GPU k, or the only one it is shown.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from harness.distributed.group import ProcessGroup, Stopped
from harness.distributed.launch import Rank, rank_of
from harness.engines.torch import watch
from harness.errors import RunError, UserError
from harness.io import progress

JOIN_SECONDS = 300  # for all processes to come
STEP_SECONDS = 1800  # a collective of a training step, which may wait for the leader to write a checkpoint
WAIT_SECONDS = (
    7 * 24 * 3600
)  # for processes that draw or measure what is left of their share; deaths are seen by the watch
SETTLE_SECONDS = 5.0  # for the watch to say who is gone, where a collective only says that something is
WORDS = (
    "gloo",
    "nccl",
    "connection",
    "timed out",
    "timeout",
    "socket",
    "broken pipe",
    "store",
    "peer",
    "process group",
)

_rank: Rank | None = None
_together: dist.ProcessGroup | None = None  # gloo, for what is no part of a step


def size() -> int:
    """Processes that work on this run."""
    return 1 if _rank is None else _rank.size


def index() -> int:
    """Of this process; 0 leads."""
    return 0 if _rank is None else _rank.index


def local() -> int | None:
    """Of this process on its machine; None: it is alone."""
    return None if _rank is None else _rank.local


def gpu(local: int) -> int:
    """The GPU of process `local` of a machine: that of its number, or the one that its launcher lets it see.

    srun --gpus-per-task=1 names one in each task's CUDA_VISIBLE_DEVICES, and there it is number 0.
    """
    alone = torch.cuda.device_count() == 1 and "CUDA_VISIBLE_DEVICES" in os.environ
    return 0 if alone else local


def beside() -> int:
    """Processes on this machine."""
    return 1 if _rank is None else _rank.beside


def all_max(value: float) -> float:
    """The largest of all processes' values, in every process."""
    if _rank is None:
        return value
    tensor = torch.tensor([value])
    with translate_dist_errors():
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=_together)
    return tensor.item()


@contextmanager
def translate_dist_errors() -> Iterator[None]:
    """Turn what torch says of a lost or silent process into one line. Alone, or of anything else, errors pass."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).strip().partition("\n")[0]
        if _rank is None or not any(word in str(error).lower() for word in WORDS):
            raise
        time.sleep(SETTLE_SECONDS)
        raise RunError(f"the {_rank.size} processes have lost each other ({text[:160]}); {watch.CONTINUES}") from error


class TorchProcessGroup(ProcessGroup):
    """The processes that the environment tells of: see `harness.distributed.launch`."""

    def __init__(self) -> None:
        global _rank, _together
        rank = rank_of(os.environ)
        self.size, self.index, self._well = rank.size, rank.index, False
        if not self.is_main:  # one of many voices is enough; errors are said on stderr all the same
            progress.silence()
            sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - as long as the process lives
        nccl = torch.cuda.is_available() and dist.is_nccl_available()
        if torch.cuda.is_available() and gpu(rank.local) < torch.cuda.device_count():
            torch.cuda.set_device(gpu(rank.local))  # what "cuda" means from here on
        try:
            store = _meet(rank)
            if self.is_main:
                self._watch = watch.lead(rank.size, lambda text: store.set("watch", text))
            else:
                speaks = rank.local == 0 or rank.index == 1
                self._watch = watch.follow(rank.index, rank.size, rank.address, store.get("watch").decode(), speaks)
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if nccl else "gloo", store=dist.PrefixStore("torch", store), rank=rank.index,
                world_size=rank.size, timeout=timedelta(seconds=STEP_SECONDS),
            )  # fmt: skip
            _together = dist.new_group(backend="gloo", timeout=timedelta(seconds=WAIT_SECONDS))
        except (RuntimeError, ValueError, OSError) as error:
            reason = str(error).strip().partition("\n")[0][:200]
            raise UserError(
                f"process {rank.index} of {rank.size} cannot join the others at {rank.address}:{rank.port} ({reason}); start "
                "all of them with torchrun, or with the same MASTER_ADDR and MASTER_PORT"
            ) from error
        _rank = rank
        atexit.register(self._leave)

    def _leave(self) -> None:
        self._watch.end(well=False)  # unless it has said so
        if self._well:  # else a collective may be under way
            dist.destroy_process_group()

    @contextmanager
    def collective_scope(self) -> Iterator[None]:
        """What all processes do; who leaves it by an error ends the others."""
        try:
            yield
        except Stopped:  # all of them leave; any other interruption is this process's alone
            self._watch.end(well=True)
            raise
        except BaseException:
            self._watch.end(well=False)
            raise
        self._well = True
        self._watch.end(well=True)

    @contextmanager
    def locked(self, folder: Path) -> Iterator[None]:
        with self.together(), super().locked(folder):
            yield

    def barrier(self, where: str) -> None:
        with translate_dist_errors():
            dist.barrier(group=_together)

    def broadcast(self, value: int) -> int:
        tensor = torch.tensor([value])
        with translate_dist_errors():
            dist.broadcast(tensor, 0, group=_together)
        return int(tensor)

    def all_max(self, value: int) -> int:
        return int(all_max(value))


def _meet(rank: Rank) -> dist.Store:
    """The store that all processes have found, once all are there."""
    os.environ.setdefault("MASTER_PORT", str(rank.port))
    wait = timedelta(seconds=JOIN_SECONDS)
    store, _, _ = next(dist.rendezvous("env://", rank=rank.index, world_size=rank.size, timeout=wait))
    store.set_timeout(wait)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store remembers what was said before
    store = dist.PrefixStore(f"harness/{attempt}", store)
    store.set(f"here/{rank.index}", "")
    for other in range(rank.size):
        try:
            store.wait([f"here/{other}"], wait)
        except RuntimeError as error:
            raise RuntimeError(f"process {other} has not come within {JOIN_SECONDS} s") from error
    return store
