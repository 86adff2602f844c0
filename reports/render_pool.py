"""Figures drawn beside other work: by helpers, and by this process too once it has nothing else to do.

The helpers are plain child processes (not of `multiprocessing`, which would run a caller's script a second time). They
get figures and give back bytes through their pipes; the bytes are those that one process would draw.
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
from reports.drawing import draw, get_ready

MAX_HELPERS = 7
WORTH_A_HELPER = 12  # panels: about what a further helper draws in the time that it takes to begin
_ROOT = Path(__file__).resolve().parent.parent
_SCRIPT = (
    f"import sys; sys.path.insert(0, {str(_ROOT)!r}); from reports.render_pool import serve_figures; serve_figures()"
)
_COMMAND = (sys.executable, "-P", "-c", _SCRIPT)  # -P: nothing is imported from the folder that it is called in

Files = dict[str, bytes]  # "png", "svg", "pdf" -> what is in the file


class RenderPool:
    """Helpers, of which the first gets ready as soon as this is entered; all end with it."""

    def __init__(self) -> None:
        self._helpers: list[subprocess.Popen] = []
        self._threads: list[Thread] = []
        self._figures: Sequence[Figure] = ()
        self._waiting: deque[Figure] = deque()
        self._drawn: dict[str, Files] = {}
        self._styles: Mapping[str, Style] = {}

    def __enter__(self) -> Self:
        self._start(1)
        return self

    def begin(self, figures: Sequence[Figure], styles: Mapping[str, Style]) -> None:
        """Has the helpers begin with the figures, the dearest first."""
        self._figures, self._styles = figures, dict(styles)
        self._start(int(sum(map(_cost, figures)) / WORTH_A_HELPER) - 1)
        self._waiting.extend(sorted(figures, key=lambda figure: (-_cost(figure), figure.name)))
        self._threads = [Thread(target=self._by_helper, args=(helper,)) for helper in self._helpers]
        for thread in self._threads:
            thread.start()

    def finish(self, progress: Callable[[str, int, int], None] | None = None) -> dict[str, Files]:
        """The files of every figure, by its name, in the order given; draws what no helper has begun.

        progress: called as ("figures", drawn, in all).
        """
        said = -1
        while said < len(self._figures):
            if said < (done := len(self._drawn)):
                said = done
                if progress is not None:
                    progress("figures", said, len(self._figures))
            elif (figure := self._next()) is not None:  # among them what a helper failed at
                self._drawn[figure.name] = draw(figure, self._styles)
            else:
                time.sleep(0.02)  # a helper draws the last one
        return {figure.name: self._drawn[figure.name] for figure in self._figures}

    def __exit__(self, *error: object) -> None:
        for helper in self._helpers:
            helper.kill()
        for thread in self._threads:
            thread.join()
        for helper in self._helpers:
            with contextlib.suppress(OSError):  # what was still to be written goes nowhere
                helper.communicate()

    def _start(self, wanted: int) -> None:
        """As many helpers as wanted, as far as there are processors for them; none where they cannot be had."""
        for _ in range(min(wanted, MAX_HELPERS, _processors() - 1) - len(self._helpers)):
            try:
                pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
                self._helpers.append(subprocess.Popen(_COMMAND, stdin=pipe, stdout=pipe, stderr=nowhere))
            except OSError:  # no memory, no more processes: it is drawn here then
                return

    def _by_helper(self, helper: subprocess.Popen) -> None:
        while (figure := self._next()) is not None:
            try:
                pickle.dump((figure, self._styles), helper.stdin)
                helper.stdin.flush()
                files = pickle.load(helper.stdout)
                if not isinstance(files, dict):
                    raise TypeError("something else wrote there")
                self._drawn[figure.name] = files
            except Exception:  # it has ended, or was ended: the figure is drawn here, and an error of its own seen
                self._waiting.append(figure)
                return

    def _next(self) -> Figure | None:
        try:
            return self._waiting.popleft()
        except IndexError:
            return None


def serve_figures() -> None:
    """What a helper does: figures from standard input, the files of each to standard output."""
    get_ready()
    gc.freeze()  # the libraries need not be looked through after each figure
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
    return max(len(figure.panels), 1)


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
