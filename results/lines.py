"""Fast reading of many lines of records: what the lines of one sample set have in common is parsed once.

The lines of a sample set's metrics differ in eight fields (high, higher_is_better, id, interval, interval_check, low,
metric and value).
All other bytes are equal, and take most of the time for parsing, checks and hashes. A line that does not have the form of
`to_json` with an interval is read by `from_json`.
"""

import dataclasses
import hashlib
import math
import re
from typing import NamedTuple

from results.records import Record, from_json, interval_check_of

_NUMBER = r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?"
_MIDDLE = re.compile(  # the run of keys from "high" to "metric", of which only "kind" is common to a sample set
    rf'"high":({_NUMBER}),(?:"higher_is_better":(true|false),)?"id":"([0-9a-f]{{64}})",'
    rf'"interval":"([ -!#-\[\]-~]*)",(?:"interval_check":"([0-9a-f]{{16}})",)?((?:"kind":"[^"\\]*",)?)"low":({_NUMBER}),'
    r'"metric":"([a-z][a-z0-9_]*)",'
)
_VALUE = re.compile(rf'"value":({_NUMBER})\}}')
_DIRECTIONS: dict[str | None, bool | None] = {None: None, "true": True, "false": False}
_FIELDS = tuple(field.name for field in dataclasses.fields(Record))
MAX_KNOWN = 10_000  # sample sets in the cache of a reader


class _Known(NamedTuple):
    """What the lines of one sample set share: a record's fields, and its identity's canonical JSON around the metric's name.

    fields: of the first record that was read, field name -> value. hash_before: the sha256 state after the JSON before
    the metric's name. json_after: the JSON after the metric's name.
    """

    fields: dict[str, object]
    hash_before: "hashlib._Hash"
    json_after: bytes


class LineReader:
    """Reads as `from_json` does, but many lines faster: the same records, the same errors, the same check of the id."""

    def __init__(self) -> None:
        # The three pieces of a line's text that all lines of a sample set share -> what was read from the first line.
        self._known: dict[tuple[str, str, str], _Known] = {}

    def read(self, text: str) -> Record:
        """The record of a line; BrokenRecord and NewerSchema as `from_json` raises them."""
        start, end = text.find('"high":'), text.rfind('"value":')
        if start < 0 or end < 0:
            return from_json(text)
        middle, last = _MIDDLE.match(text, start), _VALUE.fullmatch(text, end)
        if middle is None or last is None:
            return from_json(text)
        high_text, direction, id_, interval, check, kind, low_text, metric = middle.groups()  # named groups are slower
        common = (text[:start], kind, text[middle.end() : end])
        # -0.0 becomes 0.0, as in Record
        value, low, high = float(last[1]) or 0.0, float(low_text) or 0.0, float(high_text) or 0.0
        known = self._known.get(common)
        if known is None:
            record = from_json(text)
            parsed = (metric, value, low, high, interval, _DIRECTIONS[direction])
            if parsed == (  # else the patterns misread a line that is not canonical, one with a key twice, say
                record.metric, record.value, record.low, record.high, record.interval, record.higher_is_better,
            ):  # fmt: skip
                self._remember(common, record)
            return record
        # As in Record._hashes, the id is the sha256 of the identity's JSON followed by the value. It does not cover low,
        # high, interval and direction, so these are checked on their own.
        state = known.hash_before.copy()
        state.update(metric.encode("ascii") + known.json_after)
        identity_sha256 = state.hexdigest()
        state.update(float.__repr__(value).encode("ascii"))
        checked = check is None or check == interval_check_of(id_, low, high, interval, _DIRECTIONS[direction])
        if state.hexdigest() != id_ or not checked or not -math.inf < low <= high < math.inf:
            return from_json(text)  # raises the error that names what is wrong
        record = object.__new__(Record)  # without the checks of Record(...): all fields have been checked
        vars(record).update(
            known.fields, metric=metric, value=value, low=low, high=high, interval=interval,
            higher_is_better=_DIRECTIONS[direction], _hashes=(identity_sha256, id_),
        )  # fmt: skip
        return record

    def _remember(self, common: tuple[str, str, str], record: Record) -> None:
        """Cache what `record` shares with the other lines of its sample set."""
        if len(self._known) >= MAX_KNOWN:
            self._known.clear()
        before, _, after = record.identity_json.partition(f'"metric":"{record.metric}"')
        self._known[common] = _Known(
            fields={name: getattr(record, name) for name in _FIELDS},
            hash_before=hashlib.sha256(before.encode("ascii") + b'"metric":"'),
            json_after=b'"' + after.encode("ascii"),
        )
