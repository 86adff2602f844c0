"""Records as a DataFrame: one row per record, the same columns and dtypes whatever the input."""

import dataclasses
import logging
import re

import numpy as np
import pandas as pd
import pytest

import harness
from harness.errors import UserError
from results.frame import PARTS, load_records, to_frame
from results.records import Record, Source, Training
from results.store import append


def test_one_row_a_record_with_everything_in_it(measured, tmp_path):
    records = [measured(metric=metric, higher_is_better=metric == "is") for metric in ("fd", "kid", "is")]
    append(tmp_path / "run" / "records.jsonl", records)
    frame = harness.load_records(tmp_path)
    assert list(frame.id) == sorted(record.id for record in records)
    row = frame[frame.metric == "is"].iloc[0]
    record = records[2]
    assert (row.value, row.low, row.high, row.interval) == (record.value, record.low, record.high, record.interval)
    assert row.identity_sha256 == record.identity_sha256 and row.higher_is_better
    assert (row.training_steps, row.sampling_evaluations, row.evaluation_suite) == (800, 25, "embedded")
    assert row.environment_versions == {"torch": "2.13.0", "numpy": "2.4.6"}
    assert row.source_table is pd.NA and row.training_batch is pd.NA and np.isnan(row.sampling_eta)


def test_every_field_has_a_column_and_the_documentation_names_what_is_not_of_a_part():
    columns = list(to_frame([]))
    expected = {"id", "identity_sha256"}
    expected |= {field.name for field in dataclasses.fields(Record)} - {"schema", *PARTS}
    expected |= {f"{part}_{field.name}" for part, kind in PARTS.items() for field in dataclasses.fields(kind)}
    assert set(columns) == expected and len(columns) == len(expected)
    named = set(re.findall(r"`(\w+)`", load_records.__doc__))
    own = {name for name in columns if not name.startswith(tuple(f"{part}_" for part in PARTS))}
    assert own <= named
    assert columns[:2] == ["id", "identity_sha256"] and columns[2:8] == [
        "metric", "value", "low", "high", "interval", "higher_is_better",
    ]  # fmt: skip


def test_dtypes_are_those_of_an_empty_frame(measured, tmp_path):
    empty, silent = to_frame([]), to_frame([measured(training=None, sampling=None, low=None, high=None, interval=None)])
    full = to_frame([measured(training=Training(steps=1, gflops=1, seed=2**80))])
    assert len(empty) == 0
    for frame in (silent, full, load_records([])):
        pd.testing.assert_series_equal(frame.dtypes, empty.dtypes)
    assert silent.training_steps.isna().all() and silent.low.isna().all()
    assert full.training_seed.isna().all() and full.training_steps[0] == 1  # no column holds more than 64 bits
    found = empty.dtypes
    assert (found["id"], found["n"], found["training_seed"], found["value"], found["higher_is_better"]) == (
        "string", "Int64", "Int64", "float64", "boolean",
    )  # fmt: skip


def test_the_direction_is_the_records_or_else_the_registrys(measured):
    keys = {"fid": False, "is": True, "mine": None}
    frame = to_frame([measured(metric=key) for key in keys] + [measured(metric="fid", higher_is_better=True)])
    assert [None if each is pd.NA else bool(each) for each in frame.higher_is_better] == [False, True, None, True]


def test_files_and_folders_one_or_several(measured, tmp_path):
    for name, metric in (("a", "fd"), ("b", "kid")):
        append(tmp_path / name / "records.jsonl", [measured(metric=metric)])
    a, b = tmp_path / "a", tmp_path / "b" / "records.jsonl"
    assert sorted(load_records([a, str(b)]).metric) == ["fd", "kid"]
    assert list(load_records(str(b)).metric) == ["kid"] and list(load_records(a).metric) == ["fd"]
    with pytest.raises(UserError, match="no record file or folder"):
        load_records(tmp_path / "nowhere")


def test_problems_and_conflicts_are_warnings(measured, tmp_path, caplog):
    append(tmp_path / "a" / "records.jsonl", [measured(), measured(metric="kid")])
    append(tmp_path / "b" / "records.jsonl", [measured(value=0.5, low=None, high=None)])
    with (tmp_path / "a" / "records.jsonl").open("a") as file:
        file.write("not json\n")
    with caplog.at_level(logging.WARNING):
        frame = load_records(tmp_path)
    assert list(frame.metric) == ["kid"]
    texts = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(texts) == 2 and "records.jsonl:3" in texts[0] and texts[1].startswith("conflict: fd of dit-xs-2")


def test_published_numbers_are_a_frame_too():
    from results import paper

    frame = to_frame(paper.records())
    best = frame[(frame.source_table == "Table 2") & (frame.metric == "fid") & frame.backbone.str.startswith("dit-")]
    assert best.value.min() == 2.27 and set(frame.higher_is_better) == {True, False}
    assert best.source_row.str.contains("DiT-XL/2-G").any() and isinstance(paper.records()[0].source, Source)
