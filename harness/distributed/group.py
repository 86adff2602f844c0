"""The processes that work on one run. Usually there is one; a cluster's launcher starts the same command several times.

Process 0 is the main process: it alone writes the run's files and prints. All processes share a file system, as the nodes
of a cluster do. Training is one computation over all their devices; the batches of a sample set are divided among them.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

from harness.errors import UserError
from harness.io import progress
from harness.runs.run import lock_folder

FILE_SECONDS = (
    60.0  # that a file of another process may take to be seen; NFS holds what it knows of a folder for as long
)
FILE_POLL_SECONDS = 0.1


class Stopped(KeyboardInterrupt):
    """Raised after Ctrl-C or SIGTERM, when the checkpoint is written. All processes have agreed to stop at this step."""


class ProcessGroup:
    """The processes of one run. This class is the group of a single process; subclasses join several."""

    size = 1
    index = 0  # of this process

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def barrier(self, where: str) -> None:
        """Wait until all processes have called this. where: a name for this point of the program, the same in all."""

    def broadcast(self, value: int) -> int:
        """The main process's value, in every process."""
        return value

    def all_max(self, value: int) -> int:
        """The largest value of all processes, in every process."""
        return value

    def await_file(self, path: Path) -> None:
        """Wait for a file that another process has written, which a network file system may show later to this machine.

        A process that works alone does not wait. Raises `UserError` after FILE_SECONDS.
        """
        if self.size == 1:
            return
        deadline = time.monotonic() + FILE_SECONDS
        while not path.exists():
            if time.monotonic() > deadline:
                raise UserError(
                    f"process {self.index} does not see {path} {FILE_SECONDS:g} s after another process wrote it; the processes "
                    "of a run need a shared file system"
                )
            time.sleep(FILE_POLL_SECONDS)
            with suppress(OSError):
                list(path.parent.iterdir())  # makes NFS ask the server again for what it has found missing

    def collective_scope(self) -> AbstractContextManager[None]:
        """Context for work that all processes do together: an error in one of them ends the others.

        A command enters it once, around all common work. After it a process may end at any time without ending the others.
        """
        return nullcontext()

    @contextmanager
    def locked(self, folder: Path) -> Iterator[None]:
        """Context in which the main process holds the lock of a run's folder, for the whole group.

        A subclass with a `collective_scope` of its own enters that here as well.
        """
        if self.is_main:
            with lock_folder(folder):
                yield
        else:
            yield

    def local_part(self, items: range) -> list[int]:
        """The items that this process works on: every `size`-th, from the item at `index` on."""
        return list(items[self.index :: self.size])


SINGLE_PROCESS = ProcessGroup()


def silence_output() -> None:
    """Print nothing from here on but errors on stderr: the main process prints for the whole group."""
    progress.silence()
    sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - as long as the process lives
