"""`harness report`: what it says of record files that it cannot use, and of very many rows."""

import json

import pytest
from click.testing import CliRunner

from harness.cli.report import command
from results.records import SCHEMA_VERSION, to_json


@pytest.fixture
def report(tmp_path, monkeypatch):
    monkeypatch.setattr("reports.report.figures", lambda *_: [])  # pictures are not its subject

    def run():
        done = CliRunner().invoke(command, ["--results", str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
        assert done.exit_code == 0, done.output
        return done

    return run


def _write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_unusable_lines_are_named_with_file_number_and_reason(report, record, tmp_path):
    newer = json.dumps({"schema": SCHEMA_VERSION + 1})
    path = _write(tmp_path / "runs" / "a" / "records.jsonl", [to_json(record()), "nonsense", newer])
    said = report().stderr.splitlines()
    assert said[0].startswith(f"harness: {path}:2: not a JSON object")
    assert said[1].startswith(f"harness: {path}:3: schema {SCHEMA_VERSION + 1} is newer")
    assert said[2] == "harness: lines of record files that could not be used: 2" and len(said) == 3
    assert "12.0" in (tmp_path / "out" / "table-digits.md").read_text(encoding="utf-8")


def test_of_many_unusable_lines_a_handful_is_named_and_all_are_counted(report, record, tmp_path):
    _write(tmp_path / "runs" / "a" / "records.jsonl", [to_json(record()), *["nonsense"] * 1234])
    for name in ("b", "c"):
        records = [record(value=float(ord(name)), half=None, system=f"s{index}") for index in range(7)]
        _write(tmp_path / "runs" / name / "records.jsonl", map(to_json, records))
    said = report().stderr.splitlines()
    assert len(said) == 12
    assert said[5] == "harness: lines of record files that could not be used: 1,234, the first 5 of them above"
    assert said[11] == "harness: disputed measurements, which are in no table: 7, the first 5 of them above"


def test_the_terminal_shows_so_many_rows_and_counts_the_others(report, record, tmp_path):
    records = [record(system=f"s{index}") for index in range(60)]
    _write(tmp_path / "runs" / "a" / "records.jsonl", map(to_json, records))
    said = report().stdout
    assert "s49" in said and "s59" not in said and "10 more rows are in the table of the protocol" in said
