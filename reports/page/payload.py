"""What the page's script is given: plain data, JSON-ready, of a size that a browser takes at once."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence

from reports.columns import count_text, guidance_text, measured_text, metric_title
from reports.commands import reproduction
from reports.render import note_mark
from reports.tables import Section, Table
from results import paper
from results.records import Record

MOST_ROWS = 1000  # of one section of a table
MOST_RECORDS = 5000
MOST_PROBLEMS = 200  # lines and conflicts, of each


def table_data(table: Table) -> dict[str, object]:
    """A table as the script takes it, rows beyond the cap counted in `left_out`."""
    return {
        "name": table.name,
        "title": table.title,
        "sections": [_section_data(section) for section in table.sections],
    }


def _section_data(section: Section) -> dict[str, object]:
    lines = section.lines[:MOST_ROWS]
    used = sorted({index for line in lines for index in line.notes})
    numeric = [any(values) for values in zip(*(_is_number(line) for line in lines), strict=True)] if lines else []
    return {
        "heading": section.heading,
        "columns": list(section.columns),
        "numeric": numeric,
        "lines": [
            {
                "cells": list(line.cells),
                "values": list(line.values) or [None] * len(line.cells),
                "records": list(line.record_ids),
                "marks": list(line.marks),
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


def _is_number(line) -> list[bool]:
    return [value is not None for value in line.values] or [False] * len(line.cells)


def shown_records(records: Iterable[Record], wanted: Sequence[str], most: int) -> tuple[list[Record], int]:
    """The records that the page holds, and how many it leaves out: first those of `wanted`, then the others in order."""
    everyone = {record.id: record for record in records}
    first = [everyone[name] for name in dict.fromkeys(wanted) if name in everyone]
    names = {record.id for record in first}
    chosen = (first + [record for record in everyone.values() if record.id not in names])[:most]
    return chosen, len(everyone) - len(chosen)


class Pool:
    """Data that many records share, each kept once and named by its number."""

    def __init__(self) -> None:
        self.items: list[object] = []
        self._numbers: dict[str, int] = {}

    def number(self, item: object) -> int:
        key = json.dumps(item)
        if key not in self._numbers:
            self._numbers[key] = len(self.items)
            self.items.append(item)
        return self._numbers[key]


def record_data(record: Record, recipes: Mapping[str, Mapping[str, object]], pool: Pool) -> dict[str, object]:
    """A record: the words that stand beside it, its groups of fields, and how it is measured again.

    `groups` and `again` are numbers of what is in the pool.
    """
    again = reproduction(record, recipes)
    training, sampling, evaluation, source = record.training, record.sampling, record.evaluation, record.source
    mode = (evaluation.mode if evaluation else None) or ""
    printed = paper.printed().get(source) if source else None
    return {
        "id": record.id,
        "metric": metric_title(record.metric, record.n, mode, evaluation.features if evaluation else None),
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
        "own": _own_fields(record),
        "groups": [pool.number(group) for group in _groups(record)],
        "again": pool.number({"commands": list(again.commands), "notes": list(again.notes)}),
    }


def _own_fields(record: Record) -> list[list[str]]:
    """[name, text] of the record itself; what it shares with others of its row is in `_groups`."""
    names = ("metric", "value", "low", "high", "interval", "n", "schema")
    pairs = [["id", record.id], ["identity", record.identity_sha256]]
    return pairs + [[name, _text(getattr(record, name))] for name in names if getattr(record, name) is not None]


def _groups(record: Record) -> list[list[object]]:
    """[heading, [[name, text], ...]]; unknown fields are left out."""
    own = {pair[0] for pair in _own_fields(record)}
    fields = [
        field.name
        for field in dataclasses.fields(record)
        if field.name not in own and not dataclasses.is_dataclass(getattr(record, field.name))
    ]
    groups = [["what", _pairs(record, fields)]]
    for name in ("source", "training", "sampling", "evaluation", "environment"):
        part = getattr(record, name)
        if part is not None:
            groups.append([name, _pairs(part, [field.name for field in dataclasses.fields(part)])])
    return groups


def _pairs(part: object, names: Sequence[str]) -> list[list[str]]:
    return [[name, text] for name in names if (text := _text(getattr(part, name)))]


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {text}" for name, text in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return repr(value) if isinstance(value, float) else str(value)
