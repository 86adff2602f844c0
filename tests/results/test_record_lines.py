"""Reading many lines at once: the same records and refusals as reading each alone."""

import dataclasses
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from results.checked_fields import BrokenRecord
from results.lines import LineReader
from results.records import Environment, from_json, to_json

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)


@pytest.fixture
def line(measured):
    def make(**changes):
        return to_json(measured(**{"interval": "jackknife-20", **changes}))

    return make


def _outcome(read, text):
    try:
        return read(text)
    except BrokenRecord as error:
        return str(error)


def _agrees(reader, text):
    """The same record with the same hashes, or the same refusal."""
    one, other = _outcome(reader.read, text), _outcome(from_json, text)
    assert one == other
    if not isinstance(one, str):
        assert (one.id, one.identity_sha256, to_json(one)) == (other.id, other.identity_sha256, text)
        assert all(type(x) is type(y) for x, y in zip(vars_of(one), vars_of(other), strict=True))
    return one


def vars_of(record):
    return [getattr(record, field.name) for field in dataclasses.fields(record)]


def test_metrics_of_one_sample_set_are_read_by_what_they_share(line, monkeypatch):
    lines = [
        line(metric=metric, value=value, low=value, high=value + 1.0) for metric, value in (("fd", 0.5), ("kid", 0.0))
    ]
    directions = (("is", True), ("fid", False), ("mine", None))
    lines += [
        line(metric=metric, value=3.25, low=3.0, high=4.0, higher_is_better=direction)
        for metric, direction in directions
    ]
    expected = [from_json(text) for text in lines]
    reader = LineReader()
    read = [reader.read(lines[0])]
    monkeypatch.setattr("results.lines.from_json", None)  # the others need it no more
    read += [reader.read(text) for text in lines[1:]]
    assert [record.higher_is_better for record in read] == [None, None, True, False, None]
    assert read == expected and [record.id for record in read] == [record.id for record in expected]
    assert read[1].training is read[0].training


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_any_values_and_texts_are_read_alike(line, data):
    reader = LineReader()
    systems = st.one_of(st.sampled_from(["a", 'a"', "a\\", '"value":1}', '"high":']), st.text(min_size=1))
    for _ in range(4):
        low, value, high = sorted(data.draw(st.tuples(NUMBERS, NUMBERS, NUMBERS)))
        changes = {
            "value": value, "metric": data.draw(st.sampled_from(["fd", "kid", "is"])), "system": data.draw(systems),
            "higher_is_better": data.draw(st.sampled_from([None, True, False])),
            "interval": data.draw(st.sampled_from(["jackknife-20", "x,y", 'a "quoted" one', "\u00e9", None])),
            "environment": Environment(versions=data.draw(st.dictionaries(systems, systems, max_size=2))),
        }  # fmt: skip
        if data.draw(st.booleans()):
            changes |= {"low": low, "high": high}
        else:
            changes |= {"low": None, "high": None}
        assert not isinstance(_agrees(reader, line(**changes)), str)


EDITS = {
    "value": ('"value":0.3333333333333333}', '"value":0.3333333333333334}'),
    "value of two": ('"value":0.3333333333333333}', '"value":0.3333333333333333,"value":0.5}'),
    "low": ('"low":0.3', '"low":0.45'),
    "infinite": ('"high":0.4', '"high":1e999'),
    "not a number": ('"high":0.4', '"high":NaN'),
    "metric": ('"metric":"fd"', '"metric":"kid"'),
    "no metric": ('"metric":"fd"', '"metric":"FD"'),
    "id": ('"id":"', '"id":"0'),
    "field": ('"n":1000', '"n":1001'),
    "unknown": ('"n":1000', '"n":1000,"o":1'),
    "torn": ('"value":0.33333333', ""),
    "direction": ('"id":"', '"higher_is_better":1,"id":"'),
    "text": ('"system":"dit-xs-2"', '"system":3'),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_edited_lines_are_refused_alike(line, edit):
    old, new = edit
    text = line()
    assert old in text
    edited = text.replace(old, new) if new else text[: text.index(old)]
    reader = LineReader()
    reader.read(text)
    assert isinstance(_agrees(reader, edited), str)
    assert isinstance(_agrees(LineReader(), edited), str)


def test_a_line_that_is_not_canonical_is_read_alike(line):
    reader = LineReader()
    text = line()
    reader.read(text)
    spaced = json.dumps(json.loads(text))
    assert reader.read(spaced) == from_json(spaced) == from_json(text)
