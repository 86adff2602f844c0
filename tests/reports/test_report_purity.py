"""Tables and the data of figures are functions of the set of records: files may be shuffled, split, copied and torn."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reports.report import write_report
from results.records import SCHEMA_VERSION, Environment, Training, to_json

BROKEN = [
    "nonsense",
    "{}",
    "[" * 50,
    json.dumps({"schema": SCHEMA_VERSION + 1}),
    "\x00\x01",
    "   ",
    '{"schema": 1, "value": NaN}',
]
ENDINGS = ("csv", "md", "tex", "html")


@pytest.fixture
def records(study, record, imagenet):
    """A study; opponents at one compute; rows of the paper's tables; copies from other machines; a conflict; two protocols."""
    opponents = [
        record(
            "fd",
            10.0 + index + 0.1 * seed,
            system=f"opponent-{index}",
            training=Training(steps=9, gflops=7.0, seed=seed),
        )
        for index in range(3)
        for seed in range(2)
    ]
    copies = [
        dataclasses.replace(each, environment=Environment(device="gpu", versions={"a": "1"})) for each in study[:4]
    ]
    copies += [dataclasses.replace(each, value=each.value * (1 + 1e-7)) for each in study[4:8]]  # low bits
    copies += [dataclasses.replace(each, low=None, high=None, interval=None) for each in study[8:10]]
    disputed = [record("fd", value, system="disputed") for value in (1.0, 2.0)]
    other = [record("fd", 5.0, protocol="other", dataset="other", n=n) for n in (10, 20)]
    paper = [imagenet("fid", 2.3 + 0.1 * seed, training=Training(steps=9, seed=seed)) for seed in range(3)]
    return [*study, *opponents, *copies, *disputed, *other, *paper]


def _write(folder: Path, parts):
    for index, lines in enumerate(parts):
        path = folder / str(index) / "records.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(f"{line}\n" for line in lines))


@pytest.fixture
def made(monkeypatch, undrawn):
    monkeypatch.setattr("reports.report.page_data", lambda *_, **__: {})  # the page has tests of its own
    monkeypatch.setattr("reports.report.page_bytes", lambda *_: b"")

    def write(folder: Path) -> tuple[dict[str, bytes], int]:
        summary = write_report([folder], folder / "out")
        files = {path.name: path.read_bytes() for path in summary.files if path.name != "report.html"}
        return files, len(summary.problems)

    return write


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_order_splitting_copies_and_broken_lines_change_no_byte(records, made, tmp_path_factory, data):
    lines = [to_json(record) for record in records]
    folder = tmp_path_factory.mktemp("one")
    _write(folder, [lines])
    expected, problems = made(folder)
    assert problems == 0
    tables = [
        "table-digits",
        "table-other",
        "table-imagenet-256",
        "table-verdicts",
        *(f"table-{n}" for n in range(1, 7)),
    ]
    assert {f"{name}.{ending}" for name in tables for ending in ENDINGS} <= set(expected)
    assert {"figure-8.csv", "figure-10.csv"} <= set(expected)

    broken = data.draw(st.lists(st.sampled_from(BROKEN), max_size=8))
    copied = data.draw(st.lists(st.sampled_from(lines), max_size=30))
    mixed = data.draw(st.permutations(lines + copied + broken))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(mixed)), max_size=4)))
    folder = tmp_path_factory.mktemp("other")
    _write(folder, [mixed[start:end] for start, end in zip([0, *cuts], [*cuts, len(mixed)], strict=True)])
    found, problems = made(folder)
    assert problems == sum(bool(line.strip()) for line in broken)
    assert found == expected
