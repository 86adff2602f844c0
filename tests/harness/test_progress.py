"""Bars on a terminal, one within another; and lines where there is none."""

import io
import sys

import pytest

from harness.io import progress
from harness.io.progress import Bar, Stages


class Terminal(io.StringIO):
    def isatty(self):
        return True


def on_a_terminal(monkeypatch):
    """From here on; no fixture, for pytest puts a stream of its own in the place before a test is called."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    return sys.stderr


def shown():
    return [] if progress._drawing is None else [task.description for task in progress._drawing.tasks]


def test_a_bar_within_another_is_a_line_below_it_and_goes_with_its_end(monkeypatch):
    terminal = on_a_terminal(monkeypatch)
    with Stages() as stages:
        stages("metrics", 0, 2)
        with Bar("distances", 3, "tiles") as bar:
            assert shown() == ["metrics", "distances"]
            bar.advance()
        assert shown() == ["metrics"]
        stages("metrics", 2, 2)
        stages("other", 0, 1)
        assert shown() == ["other"]
    assert shown() == []
    assert "metrics" in terminal.getvalue() and "2/2" in terminal.getvalue()


def test_an_error_ends_all_bars(monkeypatch):
    on_a_terminal(monkeypatch)
    with pytest.raises(ZeroDivisionError), Bar("one", 1), Bar("two", 1):
        assert shown() == ["one", "two"]
        raise ZeroDivisionError
    assert shown() == []


def test_without_a_terminal_there_is_a_line_now_and_then(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Bar("distances", 100, "tiles") as bar:
        for _ in range(8):
            now[0] += 10
            bar.advance(10)
    assert capsys.readouterr().err.splitlines() == [
        "distances: 40/100 tiles 1 min 0 s left", "distances: 80/100 tiles 20 s left",
    ]  # fmt: skip


def test_without_stderr_nothing_is_written_anywhere(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)  # as Python starts where descriptor 2 is closed
    with progress.Bar("work", 3) as bar:
        bar.advance(3)
    progress.write_line("a line")
    assert capsys.readouterr().out == ""
