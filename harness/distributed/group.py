"""The processes that work on one run. Nearly always one; a cluster's launcher starts several of the same command.

Of several, the first is the leader: it alone writes the run's files and speaks to the user. They share a file system, as
the nodes of a cluster do. Training is one computation over all their devices; samples are divided among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from harness.runs.run import lock_folder


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, after its checkpoint: every process of the process group has agreed to stop here."""


class ProcessGroup:
    """One process, alone. Subclasses know others."""

    size = 1
    index = 0  # of this process; 0 leads

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def barrier(self, where: str) -> None:
        """Until every process is at the same place in the program."""

    def broadcast(self, value: int) -> int:
        """The leader's value, in every process."""
        return value

    def all_max(self, value: int) -> int:
        """The largest of all processes' values, in every process."""
        return value

    def collective_scope(self) -> AbstractContextManager[None]:
        """Around what all processes do."""
        return nullcontext()

    @contextmanager
    def locked(self, folder: Path) -> Iterator[None]:
        """Hold a run's folder for the process group: `harness.runs.run.lock_folder`."""
        if self.is_main:
            with lock_folder(folder):
                yield
        else:
            yield

    def local_part(self, things: range) -> list[int]:
        """Those of `things` that this process does."""
        return list(things[self.index :: self.size])

    def says(self, say: Callable[[str], None]) -> Callable[[str], None]:
        """`say` for the leader, silence for the others."""
        return say if self.is_main else lambda text: None


SINGLE_PROCESS = ProcessGroup()
