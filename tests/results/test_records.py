"""The record: round trips, identity, and the refusal of everything that is not one."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from results.checked_fields import BrokenRecord
from results.records import (
    SCHEMA_VERSION,
    Environment,
    Evaluation,
    NewerSchema,
    Sampling,
    Training,
    comparable_key,
    from_json,
    to_json,
)


def test_round_trip(measured):
    record = measured()
    text = to_json(record)
    assert "\n" not in text and text.isascii()
    again = from_json(text)
    assert again == record and again.id == record.id and hash(again) == hash(record)
    assert to_json(again) == text
    assert json.loads(text)["schema"] == SCHEMA_VERSION and json.loads(text)["id"] == record.id


@given(value=st.floats(allow_nan=False, allow_infinity=False), system=st.text(min_size=1))
def test_any_float_and_text_round_trip_exactly(value, system):
    training = Training(gflops=value)
    record = from_json(to_json(_minimal(value=value, system=system, training=training)))
    assert record.value == value and record.system == system
    assert math.copysign(1, record.value) == (1 if value == 0 else math.copysign(1, value))  # -0.0 is 0.0
    assert record.training.gflops == value


def test_identity_is_everything_but_value_interval_direction_and_environment(measured):
    record = measured()
    other = measured(
        value=9.0, low=8.0, high=10.0, interval="x", environment=Environment(device="gpu"), higher_is_better=False
    )
    assert other.identity_sha256 == record.identity_sha256 and other.id != record.id
    assert measured(low=None, high=None).id == record.id
    free = {"schema", "value", "low", "high", "interval", "higher_is_better", "environment", "source", "provenance"}
    changed = {
        "metric": "kid", "n": 999, "protocol": "x", "protocol_version": "2", "resolution": 16, "dataset": "x",
        "system": "x", "backbone": "x", "kind": "x", "framework": "jax", "params": 1, "gflops": 1.0,
        "gflops_published_input": 1.0, "gflops_source": "x", "training": Training(steps=801), "sampling": Sampling(eta=0.5),
        "evaluation": Evaluation(suite="x"),
    }  # fmt: skip
    assert set(changed) | free == {field.name for field in dataclasses.fields(record)}
    for name, value in changed.items():
        assert measured(**{name: value}).identity_sha256 != record.identity_sha256, name


def test_numpy_numbers_and_integers_become_python_numbers(measured):
    record = measured(value=np.float32(0.5), low=None, high=None, n=np.int64(1000), gflops=2)
    assert type(record.value) is float and type(record.n) is int and type(record.gflops) is float
    assert record.id == measured(value=0.5, low=None, high=None, gflops=2.0).id


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"value": math.nan}, "value"),
        ({"high": math.inf}, "high"),
        ({"value": "3"}, "value"),
        ({"value": True}, "value"),
        ({"value": 10**400}, "value"),
        ({"n": 1000.0}, "n"),
        ({"params": 1 << 1000}, "params"),
        ({"n": 0}, "n"),
        ({"system": None}, "system"),
        ({"schema": None}, "schema"),
        ({"low": 0.5, "high": 0.4}, "low"),
        ({"high": None}, "low"),
        ({"provenance": "guessed"}, "provenance"),
        ({"provenance": "published"}, "source"),
        ({"metric": "FID-50K"}, "metric"),
        ({"training": {"steps": 1}}, "training"),
    ],
)
def test_wrong_fields_are_named(measured, changes, culprit):
    with pytest.raises(BrokenRecord, match=rf"Record\.{culprit}:"):
        measured(**changes)
    for versions in ({"torch": 2}, None):
        with pytest.raises(BrokenRecord, match=r"Environment\.versions"):
            Environment(versions=versions)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda fields: fields.update(surprise=1), r"Record\.surprise: unknown"),
        (lambda fields: fields["training"].update(speed=1), r"Training\.speed: unknown"),
        (lambda fields: fields["environment"].update(versions=None), r"Environment\.versions: None"),
        (lambda fields: fields.pop("value"), r"Record\.value: missing"),
        (lambda fields: fields.update(training=[1]), r"Record\.training"),
        (lambda fields: fields.update(value=7.5), "not the content's"),
        (lambda fields: fields.update(n="1000"), r"Record\.n"),
        (lambda fields: fields.pop("id"), "field id"),
        (lambda fields: fields.pop("schema"), r"Record\.schema"),
        (lambda fields: fields.update(schema=True), r"Record\.schema"),
    ],
)
def test_edited_lines_are_refused(measured, edit, message):
    fields = json.loads(to_json(measured()))
    edit(fields)
    with pytest.raises(BrokenRecord, match=message):
        from_json(json.dumps(fields))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"schema": NaN}', "[" * 100_000])
def test_what_is_no_json_object_is_refused(text):
    with pytest.raises(BrokenRecord):
        from_json(text)


def test_a_newer_schema_is_told_apart(measured):
    fields = {**json.loads(to_json(measured())), "schema": SCHEMA_VERSION + 1, "surprise": []}
    with pytest.raises(NewerSchema, match="upgrade"):
        from_json(json.dumps(fields))
    assert not issubclass(NewerSchema, BrokenRecord)


def test_comparable_key(measured):
    evaluation = Evaluation(suite="embedded", suite_version="1", features_sha256="f", reference_sha256="r")
    record = measured(evaluation=evaluation)
    assert comparable_key(record) == ("digits", 8, 1000, "embedded", "1", "f", "r")
    assert comparable_key(measured(evaluation=evaluation, system="x", sampling=None)) == comparable_key(record)
    assert comparable_key(measured(evaluation=None)) == ("digits", 8, 1000, None, None, None, None)


def _minimal(**changes):
    from results.records import Record

    fields = {"provenance": "measured", "metric": "fd", "n": 1, "protocol": "p", "resolution": 1, "dataset": "d"}
    return Record(**{**fields, **changes})
