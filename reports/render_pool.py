"""Figures drawn in parallel, by worker processes and, in `finish`, by this process too.

Workers are plain child processes, not those of `multiprocessing`, which would run a caller's script a second time. A
worker reads figures from standard input and writes the bytes of their files to standard output. The bytes do not depend
on which process draws.
"""

import contextlib
import gc
import os
import pickle
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Thread
from typing import Self

from reports.charts import Figure, Style
from reports.drawing import draw, warm_up

MAX_WORKERS = 7
PANELS_PER_WORKER = 12  # about as many as a process draws in the time that a worker takes to start
_ROOT = Path(__file__).resolve().parent.parent
_SCRIPT = (
    f"import sys; sys.path.insert(0, {str(_ROOT)!r}); from reports.render_pool import serve_figures; serve_figures()"
)
_COMMAND = (sys.executable, "-P", "-c", _SCRIPT)  # -P: nothing is imported from the current folder

Files = dict[str, bytes]  # "png", "svg" or "pdf" -> content


class RenderPool:
    """A pool of workers that draw figures, as a context manager.

    The first worker starts when the context is entered; all end when it is left.
    """

    def __init__(self) -> None:
        self._workers: list[subprocess.Popen[bytes]] = []
        self._threads: list[Thread] = []
        self._figures: Sequence[Figure] = ()
        self._waiting: deque[Figure] = deque()
        self._drawn: dict[str, Files] = {}  # name of a figure -> its files
        self._styles: dict[str, Style] = {}

    def __enter__(self) -> Self:
        self._start(1)
        return self

    def begin(self, figures: Sequence[Figure], styles: Mapping[str, Style]) -> None:
        """Start more workers if they pay, and let them draw these figures, the most expensive first; returns at once."""
        self._figures, self._styles = figures, dict(styles)
        self._start(int(sum(map(_cost, figures)) / PANELS_PER_WORKER) - 1)  # minus one: this process draws, too
        self._waiting.extend(sorted(figures, key=lambda figure: (-_cost(figure), figure.name)))
        self._threads = [Thread(target=self._feed, args=(worker,)) for worker in self._workers]
        for thread in self._threads:
            thread.start()

    def finish(self, progress: Callable[[str, int, int], None] | None = None) -> dict[str, Files]:
        """Wait for all figures: name -> files, in the order of `begin`. This process draws those that no worker has begun.

        progress: called as ("figures", number drawn, number in all).
        """
        reported = -1  # so that 0 is reported, too
        while reported < len(self._figures):
            if reported < (done := len(self._drawn)):
                reported = done
                if progress is not None:
                    progress("figures", reported, len(self._figures))
            elif (figure := self._next()) is not None:  # also one that a worker failed at
                self._drawn[figure.name] = draw(figure, self._styles)
            else:
                time.sleep(0.02)  # workers draw the last ones
        return {figure.name: self._drawn[figure.name] for figure in self._figures}

    def __exit__(self, *error: object) -> None:
        """Kill the workers: after `finish` they only wait for more figures."""
        for worker in self._workers:
            worker.kill()
        for thread in self._threads:
            thread.join()
        for worker in self._workers:  # close the pipes and collect the exit status
            with contextlib.suppress(OSError):  # a broken pipe: what the worker has not read is not needed
                worker.communicate()

    def _start(self, wanted: int) -> None:
        """Start workers until there are `wanted` in all, or MAX_WORKERS, or one fewer than there are processors."""
        for _ in range(min(wanted, MAX_WORKERS, _processors() - 1) - len(self._workers)):
            try:
                pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
                self._workers.append(subprocess.Popen(_COMMAND, stdin=pipe, stdout=pipe, stderr=nowhere))
            except OSError:  # no memory or no more processes: this process draws alone
                return

    def _feed(self, worker: subprocess.Popen[bytes]) -> None:
        """Give waiting figures to a worker, one after the other, until none is left or one fails. Runs in a thread."""
        assert worker.stdin is not None and worker.stdout is not None
        while (figure := self._next()) is not None:
            try:
                pickle.dump((figure, self._styles), worker.stdin)
                worker.stdin.flush()
                files = pickle.load(worker.stdout)
                if not isinstance(files, dict):
                    raise TypeError("the pipe holds something else than files")
                self._drawn[figure.name] = files
            except Exception:  # the worker died, or the figure is at fault: this process draws it and sees the error
                self._waiting.append(figure)
                return

    def _next(self) -> Figure | None:
        """Take a waiting figure; None if there is none."""
        try:
            return self._waiting.popleft()
        except IndexError:
            return None


def serve_figures() -> None:
    """The loop of a worker: reads figures from standard input, writes the files of each to standard output."""
    warm_up()
    gc.freeze()  # so that gc.collect() after each figure does not traverse the libraries
    gc.disable()
    while True:
        try:
            figure, styles = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(draw(figure, styles), sys.stdout.buffer)
        sys.stdout.buffer.flush()
        gc.collect()


def _cost(figure: Figure) -> float:
    """The cost of drawing a figure, in panels."""
    return max(len(figure.panels), 1)


def _processors() -> int:
    """The number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
