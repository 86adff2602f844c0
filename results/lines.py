"""Fast reading of many lines of records: what the lines of one sample set have in common is parsed once.

The lines of a sample set's metrics differ in seven fields (high, higher_is_better, id, interval, low, metric and value).
All other bytes are equal, and take most of the time for parsing, checks and hashes. A line that does not have the form of
`to_json` with an interval is read by `from_json`.
"""

import dataclasses
import hashlib
import math
import re
from typing import NamedTuple

from results.records import Record, from_json

_NUMBER = r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?"
_MIDDLE = re.compile(  # the run of keys from "high" to "metric", of which only "kind" is common to a sample set
    rf'"high":({_NUMBER}),(?:"higher_is_better":(true|false),)?"id":"([0-9a-f]{{64}})",'
    rf'"interval":"([ -!#-\[\]-~]*)",((?:"kind":"[^"\\]*",)?)"low":({_NUMBER}),'
    r'"metric":"([a-z][a-z0-9_]*)",'
)
_VALUE = re.compile(rf'"value":({_NUMBER})\}}')
_DIRECTIONS: dict[str | None, bool | None] = {None: None, "true": True, "false": False}
_FIELDS = tuple(field.name for field in dataclasses.fields(Record))
MAX_KNOWN = 10_000  # sample sets in the cache of a reader


class _Known(NamedTuple):
    """What the lines of one sample set share: a record's fields, and the canonical JSON of its identity without the metric.

    fields: of the first record, field name -> value. before: the sha256 state after the JSON up to the metric's name.
    after: the JSON after the metric's name.
    """

    fields: dict[str, object]
    before: "hashlib._Hash"
    after: bytes


class LineReader:
    """Reads as `from_json` does, but many lines faster: the same records, the same errors, the same check of the id."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str, str], _Known] = {}  # the shared pieces of the text of a line -> ...

    def read(self, text: str) -> Record:
        """The record of a line; BrokenRecord and NewerSchema as `from_json` raises them."""
        start, end = text.find('"high":'), text.rfind('"value":')
        middle, last = _MIDDLE.match(text, start), _VALUE.fullmatch(text, end)
        if start < 0 or end < 0 or middle is None or last is None:
            return from_json(text)
        high_text, direction, id_, interval, kind, low_text, metric = middle.groups()  # named groups are slower
        common = (text[:start], kind, text[middle.end() : end])
        value, low, high = float(last[1]) or 0.0, float(low_text) or 0.0, float(high_text) or 0.0
        known = self._known.get(common)
        if known is None:
            record = from_json(text)
            parsed = (metric, value, low, high, interval, _DIRECTIONS[direction])
            if parsed == (  # else the text was not canonical, and cannot be shared
                record.metric, record.value, record.low, record.high, record.interval, record.higher_is_better,
            ):  # fmt: skip
                self._remember(common, record)
            return record
        identity = known.before.copy()
        identity.update(metric.encode("ascii") + known.after)
        with_value = identity.copy()
        with_value.update(float.__repr__(value).encode("ascii"))
        if with_value.hexdigest() != id_ or not -math.inf < low <= high < math.inf:
            return from_json(text)  # which names what is wrong
        record = object.__new__(Record)  # without the checks of Record(...): all fields have been checked
        hashes = (identity.hexdigest(), id_)
        vars(record).update(
            known.fields, metric=metric, value=value, low=low, high=high, interval=interval,
            higher_is_better=_DIRECTIONS[direction], _hashes=hashes,
        )  # fmt: skip
        return record

    def _remember(self, common: tuple[str, str, str], record: Record) -> None:
        """Cache what `record` shares with the other lines of its sample set."""
        if len(self._known) >= MAX_KNOWN:
            self._known.clear()
        before, _, after = record.identity_json.partition(f'"metric":"{record.metric}"')
        self._known[common] = _Known(
            fields={name: getattr(record, name) for name in _FIELDS},
            before=hashlib.sha256(before.encode("ascii") + b'"metric":"'),
            after=b'"' + after.encode("ascii"),
        )
