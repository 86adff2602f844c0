"""Rows in a nameless file are the rows that were added; pages are given back and come again."""

import mmap
import os
import platform
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from harness.io import arrays
from harness.io.arrays import RowsInOrder, chosen_rows, prefetch, release_freed_memory, release_pages, tempfile


def full(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("kept", ["in memory", "in a file", "in memory, for the disk is full"])
def test_rows_are_those_added(kept, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if kept != "in memory":
        monkeypatch.setattr(arrays, "IN_MEMORY_BYTES", 0)
    if kept.endswith("full"):
        monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    rows = np.random.RandomState(0).randn(1000, 33).astype(np.float32)
    made = RowsInOrder(1000, 33)
    for start in range(0, 1000, 300):
        made.add(rows[start : start + 300])
    made = made.finish()
    assert isinstance(made, np.memmap) == (kept == "in a file" and hasattr(os, "posix_fallocate"))
    assert made.dtype == np.float32 and not list(tmp_path.iterdir())
    for _ in range(2):
        np.testing.assert_array_equal(made, rows)
        release_pages(made)
        release_pages(made[10:20])


def test_what_was_written_to_a_map_stays(tmp_path):
    np.arange(4096, dtype=np.uint8).tofile(tmp_path / "bytes")
    for mode in ("c", "r+"):
        array = np.memmap(tmp_path / "bytes", np.uint8, mode)
        array[5] = 77
        release_pages(array)
        assert array[5] == 77
    release_pages(np.zeros(3))  # nothing to give back


@pytest.mark.parametrize("rows", [0, 1, 500, 1000])
def test_chosen_rows_are_read_a_part_at_a_time(monkeypatch, rows):
    r = np.random.RandomState(0)
    array, chosen = r.randn(1000, 7, 3).astype(np.float32), r.permutation(1000) < rows
    given = []
    monkeypatch.setattr(arrays, "release_pages", lambda x: given.append(x))
    monkeypatch.setattr(arrays, "READ_BYTES", 130 * array[0].nbytes)
    found = chosen_rows(array, chosen)
    np.testing.assert_array_equal(found, array[chosen])
    assert found.dtype == np.float32 and len(given) == 8 and all(each is array for each in given)


def held_in_no_file() -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024


def test_what_was_freed_is_given_back():
    pieces = [np.ones(4000) for _ in range(2000)]  # 64 MB, in pieces that malloc keeps
    last = pieces.pop()
    del pieces
    on_glibc = platform.libc_ver()[0] == "glibc"
    before = held_in_no_file() if on_glibc else 0
    release_freed_memory()  # elsewhere: nothing, and no error
    if on_glibc:
        assert before - held_in_no_file() > 50e6
    assert (last == 1).all()


def test_parts_of_a_map_are_asked_for_by_their_pages(tmp_path):
    asked = []

    class Map(mmap.mmap):
        def madvise(self, *words):
            asked.append(words)
            super().madvise(*words)

    page = mmap.PAGESIZE
    with Map(-1, 16 * page) as pages:
        prefetch(SimpleNamespace(_mmap=pages, offset=128), np.array([0, 5 * page - 100, 12 * page - 128]), 300)
    assert {words[0] for words in asked} == {mmap.MADV_WILLNEED}
    assert [words[1:] for words in asked] == [(0, 428), (5 * page, 328), (12 * page, 300)]
    prefetch(np.zeros(3), np.array([0]), 8)  # no map: nothing to ask
    np.arange(3 * page, dtype=np.uint8).tofile(tmp_path / "bytes")
    real = np.memmap(tmp_path / "bytes", np.uint8, "r", offset=100)
    prefetch(real, np.array([7, 2 * page]), 50)
    np.testing.assert_array_equal(real[7:57], np.arange(107, 157, dtype=np.uint8))
