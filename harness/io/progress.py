"""Progress bars on stderr for everything that takes more than two seconds: share done, speed, time left."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

WINDOW_SECONDS = 120.0  # a speed is the mean over the last two minutes
QUIET_SECONDS = 30.0  # between two lines, where stderr is no terminal
PACKAGES = ("harness", "evaluators", "results", "reports")  # names of the loggers: each package logs under its name
_silent = False
_drawing: Progress | None = None  # display shared by all bars that are open: an inner bar is drawn below the outer one


def silence() -> None:
    """Draw no bars and log only errors in this process from now on: another process of the same job shows them."""
    global _silent
    _silent = True
    for package in PACKAGES:
        logging.getLogger(package).setLevel(logging.ERROR)


class Bar:
    """A progress bar on stderr; where stderr is no terminal, a line every 30 seconds.

    total: units in all. unit: their name, such as "images". done: units done before the bar begins.
    """

    def __init__(self, title: str, total: int, unit: str = "", done: int = 0):
        self.title, self.total, self.unit, self.done = title, total, unit, done
        self._note = ""
        self._bar: tuple[Progress, TaskID] | None = None
        self._last_line = time.monotonic()
        self._marks = deque([(self._last_line, done)])  # (time, units done) within the window

    def __enter__(self) -> Self:
        if sys.stderr is not None and sys.stderr.isatty() and not _silent:
            drawing = _begin_drawing()
            self._bar = drawing, drawing.add_task(self.title, total=self.total, completed=self.done, note="", left="")
        return self

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Count `count` more units as done. note: shown beside the bar until another note is given; None: no change."""
        self.done += count
        self._mark()
        self._note = self._note if note is None else note
        seconds = (self.total - self.done) / self.rate if self.rate else float("inf")
        left = f"{duration(seconds)} left"
        if self._bar is not None:
            drawing, task = self._bar
            text = self._note or f"{self.rate:.1f} {self.unit}/s"
            drawing.update(task, completed=self.done, note=text, left=left if self.done < self.total else "")
        elif time.monotonic() - self._last_line > QUIET_SECONDS and not _silent:
            self._last_line = time.monotonic()
            text = f"{self.title}: {self.done}/{self.total} {self.unit}  {self._note}  {left}"
            print(" ".join(text.split()), file=sys.stderr, flush=True)  # noqa: T201

    def _mark(self) -> None:
        """Add (now, units done) to `_marks`, and drop those from before the window, except the last: the window's start."""
        now = time.monotonic()
        self._marks.append((now, self.done))
        while len(self._marks) > 2 and self._marks[1][0] < now - WINDOW_SECONDS:
            self._marks.popleft()

    @property
    def rate(self) -> float:
        """Units per second over the last two minutes, or since the bar began."""
        (begin, first), (end, last) = self._marks[0], self._marks[-1]
        return (last - first) / max(end - begin, 1e-9)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        global _drawing
        if self._bar is None:
            return
        drawing, task = self._bar
        if len(drawing.tasks) > 1:  # an inner bar disappears; the outermost one stays on the screen as it is
            drawing.remove_task(task)
        else:
            drawing.stop()
            _drawing = None
        self._bar = None


def _begin_drawing() -> Progress:
    """The display of the bars that are open already, or a new one, which is started."""
    global _drawing
    if _drawing is None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        _drawing = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"), TextColumn("{task.fields[left]}"),
            console=Console(stderr=True), refresh_per_second=4,
        )  # fmt: skip
        _drawing.start()
    return _drawing


def write_line(text: str) -> None:
    """Write a line to stderr, above the bars that are drawn there."""
    if _drawing is not None:
        _drawing.console.print(text, markup=False, highlight=False, soft_wrap=True)
    elif sys.stderr is not None:  # None where a program was started without one; print would take stdout then
        print(text, file=sys.stderr, flush=True)  # noqa: T201


class Stages:
    """The progress of a job with several stages, one bar at a time: call it with (stage, units done, units in all).

    units: name of the unit by stage; stages that are missing here count "images".
    """

    def __init__(self, units: Mapping[str, str] | None = None):
        self._units = units or {}
        self._bars: dict[str, Bar] = {}  # by stage; those of earlier stages are closed

    def __enter__(self) -> Self:
        return self

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self._bars:
            self.close()
            self._bars[stage] = Bar(stage, total, self._units.get(stage, "images")).__enter__()
        self._bars[stage].advance(done - self._bars[stage].done)

    def close(self) -> None:
        """Close the bar that is open, if there is one."""
        for bar in self._bars.values():  # no effect on those that are closed
            bar.__exit__(None, None, None)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def duration(seconds: float) -> str:
    """Seconds as text: 42 s, 3 min 20 s, 5 h 10 min, 12 days, 3.4 years; "unknown time" for NaN and infinity."""
    if seconds != seconds or seconds == float("inf"):
        return "unknown time"
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    if seconds < 86400 * 2:
        return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"
    if seconds < 86400 * 730:
        return f"{seconds / 86400:.1f} days"
    return f"{seconds / (86400 * 365.25):.1f} years"
