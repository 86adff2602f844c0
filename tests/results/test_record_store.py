"""Record files: append-only, torn ends, duplicates, conflicts, other versions, a full disk."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from harness.errors import RunError, UserError
from results import store
from results.records import SCHEMA_VERSION, to_json
from results.store import Conflict, append, find_record_files, load


def test_append_and_load(measured, tmp_path):
    path = tmp_path / "run" / "records.jsonl"
    records = [measured(metric=metric) for metric in ("fd", "kid", "is", "precision", "recall", "copies")]
    assert append(path, records[:2]) == 2
    first = path.read_bytes()
    assert append(path, records) == 4
    assert path.read_bytes().startswith(first) and path.read_bytes().count(b"\n") == 6
    assert append(path, records) == 0
    loaded = load([path])
    assert list(loaded.records) == sorted(records, key=lambda record: record.id)
    assert set(loaded.records) == set(records) and loaded.problems == () and loaded.conflicts == ()


def test_a_last_line_of_a_newer_version_is_kept(measured, tmp_path):
    path = tmp_path / "records.jsonl"
    newer = json.dumps({**json.loads(to_json(measured())), "schema": SCHEMA_VERSION + 1}).encode()
    path.write_bytes(newer)  # without its newline
    assert append(path, [measured(metric="kid")]) == 1
    first, second, rest = path.read_bytes().split(b"\n")
    assert first == newer and json.loads(second)["metric"] == "kid" and rest == b""


@pytest.mark.parametrize("cut", [1, 10, 200])
def test_a_torn_last_line_is_cut_off(measured, tmp_path, cut):
    path = tmp_path / "records.jsonl"
    append(path, [measured(), measured(metric="kid")])
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    if cut > 1:  # with only the newline lost, the record is still there
        assert [problem.line for problem in load([path]).problems] == [2]
    assert append(path, [measured(metric="kid")]) == (0 if cut == 1 else 1)
    assert path.read_bytes() == whole


def test_one_identity_with_two_values_is_a_conflict(measured, tmp_path):
    path = tmp_path / "records.jsonl"
    append(path, [measured()])
    before = path.read_bytes()
    with pytest.raises(Conflict, match=r"0\.3333.*records\.jsonl.*0\.5"):
        append(path, [measured(metric="kid"), measured(value=0.5, low=None, high=None)])
    assert path.read_bytes() == before
    other = tmp_path / "other.jsonl"
    append(other, [measured(value=0.5, low=None, high=None), measured(metric="kid")])
    loaded = load([path, other])
    assert [record.metric for record in loaded.records] == ["kid"]
    assert len(loaded.conflicts) == 1
    assert str(path) in loaded.conflicts[0] and str(other) in loaded.conflicts[0]


def test_low_bits_of_another_machine_are_no_conflict(measured, tmp_path):
    path, other = tmp_path / "records.jsonl", tmp_path / "other.jsonl"
    value = measured().value
    append(path, [measured()])
    append(other, [measured(value=value * (1 + 3e-6))])
    for paths in ([path, other], [other, path]):
        loaded = load(paths)
        assert len(loaded.records) == 1 and not loaded.conflicts
        assert loaded.records == load([path, other]).records
    assert append(path, [measured(value=value * (1 + 3e-6))]) == 0
    with pytest.raises(Conflict):
        append(path, [measured(value=value * (1 + 3e-5))])


def test_broken_and_newer_lines_are_named_and_counted(measured, tmp_path):
    path = tmp_path / "records.jsonl"
    good = to_json(measured())
    newer = json.dumps({"schema": 99})
    path.write_text(f"{good}\nnot json\n\n{newer}\n\xff\n{good}\n", encoding="latin-1")
    missing = tmp_path / "absent.jsonl"
    loaded = load([path, missing])
    assert len(loaded.records) == 1
    found = [(Path(problem.path).name, problem.line) for problem in loaded.problems]
    assert found == [("absent.jsonl", 0), ("records.jsonl", 2), ("records.jsonl", 4), ("records.jsonl", 5)]
    assert "newer" in loaded.problems[2].reason and "UTF-8" in loaded.problems[3].reason
    assert append(path, [measured(), measured(metric="kid")]) == 1  # others' broken lines stay as they are


def test_of_two_copies_the_one_with_an_interval_is_kept_in_every_order(measured, tmp_path):
    with_interval, without = measured(), measured(low=None, high=None, interval=None)
    for order in ([with_interval, without], [without, with_interval]):
        paths = [tmp_path / f"{index}.jsonl" for index in range(2)]
        for path, record in zip(paths, order, strict=True):
            path.unlink(missing_ok=True)
            append(path, [record])
        (kept,) = load(paths).records
        assert kept.low == 0.3


def test_folders_are_searched(measured, tmp_path):
    for name in ("a", "b/c"):
        append(tmp_path / name / "records.jsonl", [measured()])
    append(tmp_path / "b" / "kept.jsonl", [measured()])
    found = find_record_files([tmp_path, tmp_path / "b" / "kept.jsonl", tmp_path / "a"])
    expected = ["a/records.jsonl", "b/c/records.jsonl", "b/kept.jsonl"]
    assert [path.relative_to(tmp_path).as_posix() for path in found] == expected
    with pytest.raises(UserError, match="no record file or folder"):
        find_record_files(["x" * 300])  # longer than a file's name may be
    with pytest.raises(UserError, match="no record file or folder"):
        find_record_files([tmp_path / "nowhere"])


def test_a_full_disk_leaves_the_file_as_it_was(measured, tmp_path, monkeypatch):
    path = tmp_path / "records.jsonl"
    append(path, [measured()])
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunError, match=r"the disk is full, .*records\.jsonl could not be written"):
        append(path, [measured(metric="kid")])
    assert path.read_bytes() == before


def test_writers_at_once_lose_nothing(measured, tmp_path):
    path = tmp_path / "records.jsonl"
    sources = [tmp_path / f"{worker}.jsonl" for worker in range(3)]
    for worker, source in enumerate(sources):
        append(source, [measured(n=1000 + (index + 7 * worker) % 20) for index in range(15)])
    script = (
        "import sys; from results.store import append, load\n"
        "for record in load([sys.argv[1]]).records: append(sys.argv[2], [record])"
    )
    root = Path(store.__file__).parent.parent
    jobs = [subprocess.Popen([sys.executable, "-c", script, source, path], cwd=root) for source in sources]
    assert [job.wait(60) for job in jobs] == [0, 0, 0]
    loaded = load([path])
    assert len(loaded.records) == 20 and loaded.problems == ()
    assert path.read_bytes().count(b"\n") == 20
