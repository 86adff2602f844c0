"""`harness report`: what it says of record files that it cannot use, and of very many rows."""

import json
from types import SimpleNamespace

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


def test_a_file_that_is_meant_twice_is_named_once(report, tmp_path):
    """By a name and through a link; and one problem has no count behind it."""
    path = _write(tmp_path / "runs" / "a" / "records.jsonl", ["nonsense"])
    (tmp_path / "runs" / "b").mkdir()
    (tmp_path / "runs" / "b" / "records.jsonl").symlink_to(path)
    (line,) = report().stderr.splitlines()
    assert line.startswith(f"harness: {path}:1: not a JSON object") and line.endswith("; left out")


def test_a_file_that_cannot_be_read_is_named_without_a_line_number(report, tmp_path):
    path = tmp_path / "runs" / "a" / "records.jsonl"
    path.mkdir(parents=True)
    (line,) = report().stderr.splitlines()
    assert line == f"harness: {path}: cannot be read: Is a directory; left out"


def test_files_and_figures_are_counted_while_the_report_is_made(record, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("harness.io.progress.Stages.__call__", lambda _, *told: seen.append(told))
    monkeypatch.setattr(
        "reports.report.figures", lambda *_: [SimpleNamespace(name=f"f{n}", panels=()) for n in range(3)]
    )
    monkeypatch.setattr("reports.render_pool._processors", lambda: 1)
    monkeypatch.setattr("reports.render_pool.draw", lambda figure, styles: {"png": b""})
    monkeypatch.setattr("reports.report.charts.to_csv", lambda figure: "")
    monkeypatch.setattr("reports.report.page_data", lambda *_, **__: {})
    monkeypatch.setattr("reports.report.page_bytes", lambda *_: b"")
    _write(tmp_path / "runs" / "a" / "records.jsonl", [to_json(record())])
    done = CliRunner().invoke(command, ["--results", str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    files = seen[0][2]  # with those that are packaged
    assert [told for told in seen if told[0] == "records"] == [("records", n, files) for n in range(files + 1)]
    assert [told for told in seen if told[0] == "figures"] == [("figures", n, 3) for n in range(4)]
    stages = list(dict.fromkeys(told[0] for told in seen))
    assert stages == ["records", "tables and page", "figures"] and ("tables and page", 3, 3) in seen


def test_of_many_unusable_lines_a_handful_is_named_and_all_are_counted(report, record, tmp_path):
    _write(tmp_path / "runs" / "a" / "records.jsonl", [to_json(record()), *["nonsense"] * 1234])
    for name in ("b", "c"):
        records = [record(value=float(ord(name)), half=None, system=f"s{index}") for index in range(7)]
        _write(tmp_path / "runs" / name / "records.jsonl", map(to_json, records))
    said = report().stderr.splitlines()
    assert len(said) == 12
    assert said[5] == "harness: lines of record files that could not be used: 1,234, the first 5 of them above"
    assert (
        said[11] == "harness: conflicting measurements, which are left out of all tables: 7, the first 5 of them above"
    )


def test_the_terminal_shows_so_many_rows_and_counts_the_others(report, record, tmp_path):
    records = [record(system=f"s{index}") for index in range(60)]
    _write(tmp_path / "runs" / "a" / "records.jsonl", map(to_json, records))
    said = report().stdout
    assert "s49" in said and "s59" not in said and "10 more rows are in the protocol's table" in said
