"""Several processes of one run, joined by torch.distributed: gloo between CPUs, NCCL between GPUs.

torchrun starts them, or SLURM's srun with MASTER_ADDR set, or a user who sets RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT for every process. Process k of a machine uses GPU k, or the only GPU that is visible to it.
"""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from harness.distributed.group import ProcessGroup, Stopped, silence_output
from harness.distributed.launch import LaunchInfo, read_launch
from harness.engines.torch import watch
from harness.errors import RunError, UserError

JOIN_SECONDS = 300  # for all processes to connect
STEP_SECONDS = 1800  # for a collective of a training step, which may wait while the main process writes a checkpoint
WAIT_SECONDS = 7 * 24 * 3600  # for processes that still draw or measure their share; the watch notices deaths
# Before the error of a collective is raised: within this time the watch names the process that died, and ends this one.
SETTLE_SECONDS = 5.0
DIST_WORDS = (  # one of them is in every error of torch.distributed about a lost process
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

_launch: LaunchInfo | None = None  # None: this process works alone
_gloo: dist.ProcessGroup | None = None  # for collectives outside a training step, with the timeout WAIT_SECONDS


def size() -> int:
    """The number of processes that work on this run."""
    return 1 if _launch is None else _launch.world_size


def index() -> int:
    """The index of this process; 0 is the main process."""
    return 0 if _launch is None else _launch.rank


def local_rank() -> int:
    """The index of this process on its machine."""
    return 0 if _launch is None else _launch.local_rank


def local_size() -> int:
    """The number of processes on this machine."""
    return 1 if _launch is None else _launch.local_world_size


def gpu(local_rank: int) -> int:
    """The GPU of a process: the one with its local rank, or the only one that its launcher makes visible.

    srun --gpus-per-task=1 sets CUDA_VISIBLE_DEVICES to another GPU in each task, where it has number 0.
    """
    single = torch.cuda.device_count() == 1 and "CUDA_VISIBLE_DEVICES" in os.environ
    return 0 if single else local_rank


def all_max(value: float) -> float:
    """The largest value of all processes, in every process.

    With several processes a float is rounded to float32; an int stays exact. With one process it is returned unchanged.
    """
    if _launch is None:
        return value
    tensor = torch.tensor([value])  # float32 for a float, int64 for an int
    with translate_dist_errors():
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=_gloo)
    return tensor.item()


@contextmanager
def translate_dist_errors() -> Iterator[None]:
    """Context that turns torch's errors about a lost process into a RunError of one line. Other errors pass unchanged.

    If this process works alone, all errors pass.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error).strip().partition("\n")[0]
        if _launch is None or not any(word in str(error).lower() for word in DIST_WORDS):
            raise
        time.sleep(SETTLE_SECONDS)  # the watch may end this process meanwhile, with a better message
        raise RunError(
            f"the {_launch.world_size} processes have lost each other ({text[:160]}); {watch.CONTINUES}"
        ) from error


class TorchProcessGroup(ProcessGroup):
    """The processes that the environment variables describe: see `harness.distributed.launch`."""

    def __init__(self) -> None:
        global _launch, _gloo
        launch = read_launch(os.environ)
        self.size, self.index = launch.world_size, launch.rank
        self._collectives_over = False  # whether `collective_scope` has ended, without an exception
        if not self.is_main:
            silence_output()
        nccl = torch.cuda.is_available() and dist.is_nccl_available()
        if torch.cuda.is_available() and gpu(launch.local_rank) < torch.cuda.device_count():
            # What "cuda" means from here on. `pick_device` reports a GPU that does not exist.
            torch.cuda.set_device(gpu(launch.local_rank))
        try:
            store = _rendezvous(launch)
            if self.is_main:
                self._watch = watch.accept_others(self.size, lambda text: store.set("watch", text))
            else:
                # One process of each machine prints that the main process has failed or died: local rank 0, or rank 1 on
                # the machine of the main process, whose local rank 0 is the main process.
                reports_main_exit = launch.local_rank == 0 or launch.rank == 1
                published = store.get("watch").decode()
                self._watch = watch.connect_to_main(self.index, self.size, launch.address, published, reports_main_exit)
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if nccl else "gloo", store=dist.PrefixStore("torch", store), rank=self.index,
                world_size=self.size, timeout=timedelta(seconds=STEP_SECONDS),
            )  # fmt: skip
            _gloo = dist.new_group(backend="gloo", timeout=timedelta(seconds=WAIT_SECONDS))
        except (RuntimeError, ValueError, OSError) as error:
            reason = str(error).strip().partition("\n")[0][:200]
            raise UserError(
                f"process {self.index} of {self.size} cannot join the others at {launch.address}:{launch.port} ({reason}); "
                "start all of them with torchrun, or with the same MASTER_ADDR and MASTER_PORT"
                + _interface_hint(launch)
            ) from error
        _launch = launch
        atexit.register(self._leave)

    def _leave(self) -> None:
        """Leave the group when the interpreter exits."""
        self._watch.end(done=False)  # a failure, unless `collective_scope` has announced another end before
        if self._collectives_over:  # otherwise a collective may be under way
            dist.destroy_process_group()

    @contextmanager
    def collective_scope(self) -> Iterator[None]:
        try:
            yield
        except Stopped:  # all processes stop; any other interruption is this process's alone
            self._watch.end(done=True)
            raise
        except BaseException:
            self._watch.end(done=False)
            raise
        self._collectives_over = True
        self._watch.end(done=True)

    @contextmanager
    def locked(self, folder: Path) -> Iterator[None]:
        with self.collective_scope(), super().locked(folder):
            yield

    def barrier(self, where: str) -> None:
        with translate_dist_errors():
            dist.barrier(group=_gloo)

    def broadcast(self, value: int) -> int:
        tensor = torch.tensor([value])
        with translate_dist_errors():
            dist.broadcast(tensor, 0, group=_gloo)
        return int(tensor)

    def all_max(self, value: int) -> int:
        return int(all_max(value))


def _interface_hint(launch: LaunchInfo) -> str:
    """What else may keep processes on several machines apart; empty on one machine."""
    if launch.local_world_size == launch.world_size:
        return ""
    given = os.environ.get("GLOO_SOCKET_IFNAME")
    now = f"it is {given}" if given else "it is not set, so gloo takes the one of the host's name"
    return f"; between machines GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) name the network interface of each, as eth0; {now}"


def _rendezvous(launch: LaunchInfo) -> dist.Store:
    """Wait until all processes have connected to their shared store, and return it.

    Raises RuntimeError with the first process that has not connected within JOIN_SECONDS.
    """
    os.environ.setdefault("MASTER_PORT", str(launch.port))  # "env://" reads it, and srun does not set it
    wait = timedelta(seconds=JOIN_SECONDS)
    store, _, _ = next(dist.rendezvous("env://", rank=launch.rank, world_size=launch.world_size, timeout=wait))
    store.set_timeout(wait)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store keeps the values of earlier attempts
    store = dist.PrefixStore(f"harness/{attempt}", store)
    store.set(f"here/{launch.rank}", "")
    for other in range(launch.world_size):
        try:
            store.wait([f"here/{other}"], wait)
        except RuntimeError as error:
            raise RuntimeError(f"process {other} has not come within {JOIN_SECONDS} s") from error
    return store
