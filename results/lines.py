"""Reading many lines of records: what the lines of one sample set have in common is parsed once.

The metrics of a sample set differ in seven fields. Everything else is repeated in their lines byte for byte, and is most
of what has to be parsed, checked and hashed. A line of another form is read by `from_json`.
"""

import dataclasses
import hashlib
import math
import re
from typing import NamedTuple

from results.records import Record, from_json

_NUMBER = r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?"
_OWN = re.compile(
    rf'"high":({_NUMBER}),(?:"higher_is_better":(true|false),)?"id":"([0-9a-f]{{64}})",'
    rf'"interval":"([ -!#-\[\]-~]*)",((?:"kind":"[^"\\]*",)?)"low":({_NUMBER}),'
    r'"metric":"([a-z][a-z0-9_]*)",'
)
_VALUE = re.compile(rf'"value":({_NUMBER})\}}')
_DIRECTIONS = {None: None, "true": True, "false": False}
_FIELDS = tuple(field.name for field in dataclasses.fields(Record))
MAX_KNOWN = 10_000


class _Known(NamedTuple):
    """A record that was parsed in full, and the canonical JSON of its identity in two parts.

    before: the hash of the part up to the metric's name. behind: the part after it.
    """

    fields: dict[str, object]
    before: "hashlib._Hash"
    behind: bytes


class LineReader:
    """`from_json` for many lines: the same records, the same errors, and the id checked alike."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str, str], _Known] = {}

    def read(self, text: str) -> Record:
        """The record of a line; BrokenRecord and NewerSchema as `from_json` raises them."""
        start, end = text.find('"high":'), text.rfind('"value":')
        own, last = _OWN.match(text, start), _VALUE.fullmatch(text, end)
        if start < 0 or end < 0 or own is None or last is None:
            return from_json(text)
        high_text, direction, id_, interval, kind, low_text, metric = own.groups()  # named groups are slower
        common = (text[:start], kind, text[own.end() : end])
        value, low, high = float(last[1]) or 0.0, float(low_text) or 0.0, float(high_text) or 0.0
        known = self._known.get(common)
        if known is None:
            record = from_json(text)
            stated = (metric, value, low, high, interval, _DIRECTIONS[direction])
            if stated == (
                record.metric, record.value, record.low, record.high, record.interval, record.higher_is_better,
            ):  # fmt: skip
                self._remember(common, record)
            return record
        identity = known.before.copy()
        identity.update(metric.encode("ascii") + known.behind)
        whole = identity.copy()
        whole.update(float.__repr__(value).encode("ascii"))
        if whole.hexdigest() != id_ or not -math.inf < low <= high < math.inf:
            return from_json(text)  # which names what is wrong
        record = object.__new__(Record)
        hashes = (identity.hexdigest(), id_)
        vars(record).update(
            known.fields, metric=metric, value=value, low=low, high=high, interval=interval,
            higher_is_better=_DIRECTIONS[direction], _hashes=hashes,
        )  # fmt: skip
        return record

    def _remember(self, common: tuple[str, str, str], record: Record) -> None:
        if len(self._known) >= MAX_KNOWN:
            self._known.clear()
        before, _, behind = record.identity_json.partition(f'"metric":"{record.metric}"')
        self._known[common] = _Known(
            fields={name: getattr(record, name) for name in _FIELDS},
            before=hashlib.sha256(before.encode("ascii") + b'"metric":"'),
            behind=b'"' + behind.encode("ascii"),
        )
