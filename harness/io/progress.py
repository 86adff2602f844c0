"""One progress bar for everything that takes more than two seconds: share done, speed, time left."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Self

WINDOW_SECONDS = 120.0  # speeds are those of the last two minutes
QUIET_SECONDS = 30.0  # between lines where there is no terminal to draw on
_silent = False
_drawing = None  # rich's, while there are bars: one within another is a line below it, and goes with its end


def silence() -> None:
    """No bars, and no log messages below errors, from here on: another process of the same job shows them."""
    global _silent
    _silent = True
    logging.getLogger("harness").setLevel(logging.ERROR)


class Bar:
    """A bar on stderr; without a terminal, a line every 30 seconds. `unit` is what `advance` counts."""

    def __init__(self, title: str, total: int, unit: str = "", done: int = 0):
        self.title, self.total, self.unit, self.done = title, total, unit, done
        self._note = ""
        self._bar = None
        self._said = time.monotonic()
        self._marks = deque([(self._said, done)])  # (time, units done) of the last while

    def __enter__(self) -> Self:
        if sys.stderr.isatty() and not _silent:
            self._bar = _begin_drawing()
            self._task = self._bar.add_task(self.title, total=self.total, completed=self.done, note="", left="")
        return self

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """`count` more units are done; `note` stands beside the bar until the next one."""
        self.done += count
        self._mark()
        self._note = self._note if note is None else note
        seconds = (self.total - self.done) / self.rate if self.rate else float("inf")
        left = f"{duration(seconds)} left"
        if self._bar is not None:
            note = self._note or f"{self.rate:.1f} {self.unit}/s"
            self._bar.update(self._task, completed=self.done, note=note, left=left if self.done < self.total else "")
        elif time.monotonic() - self._said > QUIET_SECONDS and not _silent:
            self._said = time.monotonic()
            text = f"{self.title}: {self.done}/{self.total} {self.unit}  {self._note}  {left}"
            print(" ".join(text.split()), file=sys.stderr, flush=True)  # noqa: T201

    def _mark(self) -> None:
        now = time.monotonic()
        self._marks.append((now, self.done))
        while len(self._marks) > 2 and self._marks[1][0] < now - WINDOW_SECONDS:
            self._marks.popleft()

    @property
    def rate(self) -> float:
        """Units a second over the last minutes, or since the bar began."""
        (begin, first), (end, last) = self._marks[0], self._marks[-1]
        return (last - first) / max(end - begin, 1e-9)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        global _drawing
        if self._bar is not None and len(self._bar.tasks) > 1:
            self._bar.remove_task(self._task)
        elif self._bar is not None:
            self._bar.stop()
            _drawing = None
        self._bar = None


def _begin_drawing():
    """What draws the bars, rich's Progress; that of the bars that are there, or a new one."""
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
    else:
        print(text, file=sys.stderr, flush=True)  # noqa: T201


class Stages:
    """Bars of a job of several stages, one at a time: called as (stage, units done, units in all)."""

    def __init__(self, units: Mapping[str, str] | None = None):
        self._units, self._bars = units or {}, {}  # what a stage counts, where that is not images

    def __enter__(self) -> Self:
        return self

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self._bars:
            self.close()
            self._bars[stage] = Bar(stage, total, self._units.get(stage, "images")).__enter__()
        self._bars[stage].advance(done - self._bars[stage].done)

    def close(self) -> None:
        """End the bars that are drawn."""
        for bar in self._bars.values():
            bar.__exit__(None, None, None)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def duration(seconds: float) -> str:
    """Seconds as a person says them: 42 s, 3 min 20 s, 5 h 10 min, 12 days, 3.4 years."""
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
