"""The report as a whole: its files, its purity, what it says of bad records, what it imports."""

import csv
import json
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import reports
import reports.report
from harness.cli import group
from harness.errors import RunError, UserError
from harness.io.files import write_bytes
from reports.report import write_report
from results.records import to_json
from results.store import append

TABLES = [f"table-{number}.{ending}" for number in range(1, 7) for ending in ("csv", "html", "md", "tex")]
PAPER_FIGURES = [*(f"figure-{number}" for number in (2, 5, 6, 8, 9, 10, 12)), "scaling-law", "pareto"]
OWN_FIGURES = ["figure-2", "figure-6", "figure-8", "figure-9", "figure-10", "figure-12", "pareto"]
PAGE = ["report.html"]
DIGITS = [f"table-digits.{ending}" for ending in ("csv", "html", "md", "tex")]


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _files(names: list[str], endings=("csv", "pdf", "png", "svg")) -> list[str]:
    return [f"{name}.{ending}" for name in names for ending in endings]


def _points(folder: Path) -> list[dict[str, str]]:
    with (folder / "figure-10.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_without_any_run_the_paper_is_reported(tmp_path):
    summary = write_report([], tmp_path / "out")
    assert sorted(path.name for path in summary.files) == sorted(TABLES + _files(PAPER_FIGURES) + PAGE)
    assert sorted(_contents(tmp_path / "out")) == sorted(path.name for path in summary.files)
    assert summary.measured == 0 and summary.problems == () and summary.conflicts == ()
    assert len(summary.notes) == 2 and summary.notes[0].startswith("Figure 7 is not drawn")
    rows = _points(tmp_path / "out")
    assert [(row["provenance"], row["value"], row["sampling_steps"]) for row in rows] == [
        ("published", "25.9", "1000"),
        ("published", "23.7", "128"),
    ]


def test_a_study_with_conflict_and_broken_line(study, record, tmp_path):
    run = tmp_path / "runs" / "a"
    append(run / "records.jsonl", [*study, record(value=5.0, protocol="imagenet-256")])
    append(tmp_path / "runs" / "b" / "records.jsonl", [record(value=99.0, system="twice")])
    other = tmp_path / "runs" / "c" / "records.jsonl"
    append(other, [record(value=98.0, system="twice")])
    with other.open("a") as file:
        file.write('{"schema": 2}\nnonsense\n')
    summary = write_report([tmp_path / "runs"], tmp_path / "out", protocol="digits")
    assert sorted(path.name for path in summary.files) == sorted(TABLES + _files(OWN_FIGURES) + PAGE + DIGITS)
    assert [(Path(problem.path).parent.name, problem.line) for problem in summary.problems] == [("c", 2), ("c", 3)]
    assert len(summary.conflicts) == 1 and "98.0" in summary.conflicts[0] and "99.0" in summary.conflicts[0]
    assert summary.measured == len(study) and {each.protocol for each in summary.records} == {"digits"}
    assert "twice" not in (tmp_path / "out" / "table-digits.md").read_text(encoding="utf-8")
    rows = _points(tmp_path / "out")
    assert len(rows) == 18 and {row["provenance"] for row in rows} == {"measured"}
    assert {float(row["value"]) for row in rows} == {record.value for record in study if record.metric == "fd"}
    picture = np.asarray(Image.open(tmp_path / "out" / "figure-10.png"))
    assert (
        picture.ndim == 3
        and picture.shape[1] > 800
        and len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 20
    )
    texts = "".join(xml.etree.ElementTree.parse(tmp_path / "out" / "figure-10.svg").getroot().itertext())
    for words in ("dit-xs-2", "dit-xs-4", "unet-small", "means over seeds", "Gflops per image", "FD-1K"):
        assert words in texts


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_shuffling_splitting_and_duplicating_files_changes_no_byte(study, tmp_path_factory, undrawn, data):
    folder = tmp_path_factory.mktemp("pure")
    append(folder / "one" / "records.jsonl", study)
    write_report([folder / "one"], folder / "expected")
    lines = [to_json(record) for record in study]
    mixed = data.draw(st.permutations(lines + lines[: data.draw(st.integers(0, 30))]))
    cut = data.draw(st.integers(0, len(mixed)))
    for name, part in (("x", mixed[:cut]), ("y/z", mixed[cut:])):
        path = folder / "split" / name / "records.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(f"{line}\n" for line in part))
    write_report([folder / "split"], folder / "out")
    expected = _contents(folder / "expected")
    assert len(expected) == len(TABLES + DIGITS + PAPER_FIGURES + PAGE) and _contents(folder / "out") == expected


def test_figures_are_reproducible_to_the_byte(study, tmp_path, monkeypatch):
    made = reports.report.figures
    few = ("figure-2", "figure-10")  # every kind of drawing but bands
    monkeypatch.setattr("reports.report.figures", lambda *given: [each for each in made(*given) if each.name in few])
    for name, records in (("a", study), ("b", study[::-1])):
        append(tmp_path / name / "records.jsonl", records)
        write_report([tmp_path / name], tmp_path / name / "out", protocol="digits")
    assert len(_contents(tmp_path / "a" / "out")) == len(TABLES + DIGITS + PAGE + _files(list(few)))
    assert _contents(tmp_path / "a" / "out") == _contents(tmp_path / "b" / "out")


def test_refusals_and_failures(tmp_path, undrawn, monkeypatch):
    with pytest.raises(UserError, match="no record file or folder"):
        write_report([tmp_path / "nowhere"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("reports.report.load", lambda *arguments: pytest.fail("records are read first"))
    with pytest.raises(UserError, match="it is a file"):
        write_report([], tmp_path / "file")


def test_the_command_names_the_page_last(study, undrawn, tmp_path):
    append(tmp_path / "runs" / "records.jsonl", study)
    done = CliRunner().invoke(group, ["report", "--results", str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0 and done.output.splitlines()[-1] == f"page: {tmp_path / 'out' / 'report.html'}"


def test_a_file_is_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "a" / "b.txt"
    write_bytes(path, b"old", shared=True)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunError, match=r"the disk is full, .*b\.txt could not be written"):
        write_bytes(path, b"new", shared=True)
    assert path.read_bytes() == b"old" and [entry.name for entry in path.parent.iterdir()] == ["b.txt"]


def test_reports_load_no_framework_and_nothing_heavy_before_drawing(tmp_path):
    script = (
        "import sys, json, reports.report, reports.grid, reports.rows\n"
        "early = sorted({'pandas', 'matplotlib', 'seaborn', 'PIL', 'scipy'} & set(sys.modules))\n"
        "made, reports.render_pool._processors = reports.report.figures, lambda: 1\n"
        "reports.report.figures = lambda *given: made(*given)[:1]\n"
        "reports.report.write_report([], sys.argv[1])\n"
        "late = sorted({'torch', 'jax', 'tensorflow', 'seaborn'} & set(sys.modules))\n"
        "print(json.dumps([early, late]))"
    )
    root = Path(reports.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "out"], cwd=root, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [[], ["seaborn"]]
    assert done.stderr == ""


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr("reports.report.figures", lambda *_: pytest.fail("drawn"))
    (tmp_path / "file").write_bytes(b"")
    for out in (tmp_path / "file" / "report", Path("/proc/report")):
        with pytest.raises(RunError, match="could not be written"):
            write_report([], out)
