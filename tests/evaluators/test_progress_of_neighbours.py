"""Every search for neighbours among many images has a progress bar, which ends full."""

import numpy as np
import pytest

from evaluators import adm, authenticity, copies, density_coverage, precision_recall
from harness.io.progress import Bar

RNG = np.random.default_rng(0)
SAMPLES, REFERENCE = (RNG.standard_normal((n, 4)).astype(np.float32) for n in (1500, 2300))
BLOCK = np.arange(len(SAMPLES)) % 20
PIXELS = [RNG.integers(0, 256, (n, 2, 2, 1)).astype(np.uint8) for n in (1500, 2300)]


@pytest.fixture
def bars(monkeypatch):
    """(title, total, calls of advance) of every bar; every bar was full at its end."""
    found, calls = [], {}
    enter, leave, advance = Bar.__enter__, Bar.__exit__, Bar.advance

    def left(bar, *error):
        assert bar.done == bar.total
        found.append((bar.title, bar.total, calls[bar]))
        return leave(bar, *error)

    monkeypatch.setattr(Bar, "__enter__", lambda bar: (calls.setdefault(bar, 0), enter(bar))[1])
    monkeypatch.setattr(Bar, "__exit__", left)
    monkeypatch.setattr(Bar, "advance", lambda bar, n=1: (calls.update({bar: calls[bar] + 1}), advance(bar, n))[1])
    return found


@pytest.mark.parametrize(
    ("search", "expected"),
    [
        # Tiles of 1,024 by 1,024: of the samples' and the reference's own the half above the diagonal, and all between.
        (lambda: precision_recall.estimate(SAMPLES, REFERENCE, BLOCK), [3, 6, 6]),
        (lambda: density_coverage.estimate(SAMPLES, REFERENCE, BLOCK), [2300, 2300]),
        (lambda: authenticity.estimate(SAMPLES, REFERENCE, BLOCK), [1500, 2300]),
        (lambda: copies.find_copies(*PIXELS), [2300, 2300]),
        (lambda: adm.precision_and_recall(REFERENCE, SAMPLES), [2300, 1500, 2300]),
    ],
)
def test_a_search_for_neighbours_has_a_bar(search, expected, bars):
    search()
    assert [total for _, total, _ in bars] == expected
    assert {title for title, _, _ in bars} == {"distances"}
    assert all(calls > 1 for _, _, calls in bars)
