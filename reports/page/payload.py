"""The data for the page's script: plain values for JSON, limited in size so that a browser loads them at once."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from reports.commands import reproduction
from reports.sections import Line, Section, Table, note_mark
from reports.texts import count_text, guidance_text, measured_text, title_of
from results import paper
from results.metrics import rank
from results.records import Record

MAX_ROWS = 1000  # of one section of a table
MAX_RECORDS = 5000
Json = dict[str, Any]  # what json.dumps writes as an object
# The fields that belong to the measurement itself: few other records have all of them equal.
_METRIC_FIELDS = ("metric", "value", "low", "high", "interval", "higher_is_better", "n", "schema")
_PARTS = ("source", "training", "sampling", "evaluation", "environment")
_COMMON_FIELDS = tuple(
    field.name for field in dataclasses.fields(Record) if field.name not in (*_METRIC_FIELDS, *_PARTS)
)
MAX_PROBLEMS = 200  # unusable lines, and as many conflicts, whose texts are on the page


def table_data(table: Table) -> Json:
    """A table for the script; `left_out` of a section counts its rows beyond MAX_ROWS."""
    return {
        "name": table.name,
        "title": table.title,
        "sections": [_section_data(section) for section in table.sections],
    }


def _section_data(section: Section) -> Json:
    """A section for the script, with only the footnotes of the lines that are shown."""
    lines = _shown_lines(section.lines)
    used = sorted({index for line in lines for index in line.notes})
    return {
        "heading": section.heading,
        "columns": list(section.columns),
        "numeric": list(section.numeric),
        "lines": [
            {
                "cells": list(line.cells),
                "values": list(line.values) or [None] * len(line.cells),
                "records": list(line.record_ids) or [""] * len(line.cells),
                "marks": list(line.marks) or [""] * len(line.cells),
                "published": line.published,
                "notes": [note_mark(index) for index in line.notes],
            }
            for line in lines
        ],
        "footnotes": {note_mark(index): section.footnotes[index] for index in used},
        "remarks": list(section.remarks),
        "origin": section.origin,
        "left_out": len(section.lines) - len(lines),
    }


def _shown_lines(lines: Sequence[Line]) -> list[Line]:
    """At most MAX_ROWS lines, in their order: published and marked ones, and of the others an evenly spaced choice."""
    chosen = [index for index, line in enumerate(lines) if line.published or any(line.marks)][:MAX_ROWS]
    room = MAX_ROWS - len(chosen)
    others = sorted(set(range(len(lines))) - set(chosen))
    if len(others) > room:
        others = [others[step * len(others) // room] for step in range(room)]
    return [lines[index] for index in sorted([*chosen, *others])]


def shown_records(records: Iterable[Record], wanted: Sequence[str], most: int) -> tuple[list[Record], int]:
    """(at most `most` records, number of records that are left out). wanted: ids of the records to keep before others.

    The records are in the order of the page's list: measured ones first, then by protocol, table, system and settings.
    """
    by_id = {record.id: record for record in records}
    first = [by_id[record_id] for record_id in dict.fromkeys(wanted) if record_id in by_id]
    first_ids = {record.id for record in first}
    chosen = (first + [record for record in by_id.values() if record.id not in first_ids])[:most]
    return sorted(chosen, key=_sort_key), len(by_id) - len(chosen)


def _sort_key(record: Record) -> tuple:
    """The sort key of a record in the page's list."""
    training, sampling, source = record.training, record.sampling, record.source
    return (
        record.provenance != "measured",
        record.protocol,
        source.table if source else "",
        record.system,
        (training.steps if training else None) or 0,
        (training.seed if training else None) or 0,
        (sampling.steps if sampling else None) or 0,
        rank(record.metric),
        record.id,
    )


class InternTable:
    """Data that many records share: each item is stored once and referred to by its number, the index in `items`."""

    def __init__(self) -> None:
        self.items: list[object] = []
        self._numbers: dict[object, int] = {}

    def number(self, key: object, make: Callable[[], object]) -> int:
        """The number of the item with this key, from 0. If the key is new, `make()` is stored as its item."""
        if key not in self._numbers:
            self._numbers[key] = len(self.items)
            self.items.append(make())
        return self._numbers[key]


def record_data(record: Record, recipes: Mapping[str, Mapping[str, object]], interned: InternTable) -> Json:
    """A record for the script: what the list shows, all of its fields, and the commands that measure it again.

    recipes: as for `reproduction`. The fields of the record are in "own", those of this record alone, and in "groups", those
    that it shares with others. "groups" and "again" (the commands) are numbers of items in `interned`, to which new items
    are added.
    """
    again = reproduction(record, recipes)
    training, sampling, source = record.training, record.sampling, record.source
    printed = paper.printed().get(source) if source else None
    return {
        "id": record.id,
        "metric": title_of([record]),
        "text": printed or measured_text(record.value, record.low, record.high),
        "value": record.value,
        "system": record.system,
        "protocol": record.protocol,
        "published": record.provenance == "published",
        "where": f"{source.table}: {source.row}" if source else "",
        "n": record.n,
        "steps": training.steps if training else None,
        "steps_text": count_text(training.steps) if training else "-",
        "seed": training.seed if training else None,
        "sampler": (sampling.sampler if sampling else None) or "-",
        "sampling_steps": sampling.steps if sampling else None,
        "guidance": guidance_text(record),
        "own": _metric_fields(record),
        "groups": _groups(record, interned),
        "again": interned.number(again, lambda: dataclasses.asdict(again)),
    }


def _metric_fields(record: Record) -> list[list[str]]:
    """[name, text] of the id, the identity and _METRIC_FIELDS; `_groups` has the other fields."""
    return [["id", record.id], ["identity", record.identity_sha256], *_pairs(record, _METRIC_FIELDS)]


def _groups(record: Record, interned: InternTable) -> list[int]:
    """Numbers of the items [heading, [[name, text], ...]] in `interned`: the common fields, and each part of the record."""
    common = tuple(getattr(record, name) for name in _COMMON_FIELDS)
    # "what" is the heading that the page gives to the common fields.
    numbers = [interned.number(common, lambda: ["what", _pairs(record, _COMMON_FIELDS)])]
    for name in _PARTS:
        part = getattr(record, name)
        if part is not None:
            numbers.append(interned.number((name, part.canonical), functools.partial(_group, name, part)))
    return numbers


def _group(heading: str, part: Any) -> list[object]:
    """[heading, [[name, text], ...]] of a part of a record."""
    return [heading, _pairs(part, [field.name for field in dataclasses.fields(part)])]


def _pairs(part: object, names: Sequence[str]) -> list[list[str]]:
    """[name, text] of these fields of a record or part, without those that are None or empty."""
    return [[name, text] for name in names if (text := _text(getattr(part, name)))]


def _text(value: object) -> str:
    """The value of a field as the page shows it; "" for None."""
    if value is None or type(value) is str:
        return value or ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return repr(value)
    return ", ".join(f"{name} {text}" for name, text in value.items()) if isinstance(value, Mapping) else str(value)
