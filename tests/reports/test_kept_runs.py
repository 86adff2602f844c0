"""The runs in results/measured are shown alone, or beside the user's records of their protocol."""

import dataclasses
import shutil

import pytest

from reports.report import _load, packaged_runs, table_files
from results.store import append, load

pytestmark = pytest.mark.kept


def test_they_are_shown_where_there_is_nothing_else():
    with packaged_runs() as kept:
        loaded, shown = _load([], kept, None, None)
        assert shown == kept and loaded.records == load(kept).records
        tables, _ = table_files(loaded.records, ["fashion-mnist-16"])
    assert {"table-fashion-mnist-16", "table-seeds"} <= {table.name for table in tables}


def test_they_stand_beside_records_of_their_protocol_alone(tmp_path, record):
    with packaged_runs() as kept:
        digits, other, same = (tmp_path / name / "records.jsonl" for name in ("digits", "other", "same"))
        append(digits, [record()])
        assert _load([digits], kept, None, None)[1] == []
        loaded, shown = _load([digits], kept, None, "fashion-mnist-16")  # asked for by name
        assert shown == kept and len(loaded.records) == 1 + len(load(kept).records)
        one = load(kept[:1]).records[0]
        append(other, [dataclasses.replace(one, system="mine", backbone="mine")])
        loaded, shown = _load([other], kept, None, None)
        assert shown == kept and len(loaded.records) == 1 + len(load(kept).records)
        same.parent.mkdir()
        shutil.copyfile(kept[0], same)  # a run that the user has, too, is not read twice
        assert _load([same], kept, None, None)[1] == kept[1:]
