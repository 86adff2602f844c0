"""What counts as measured already: the same samples, system, task and reference, and nothing less."""

import dataclasses
import json

import numpy as np
import pytest

from harness.data.digits import load
from harness.data.images import ImageSet
from harness.errors import UserError
from harness.pipeline.measure import evaluate_and_record
from harness.protocols import get_protocol
from harness.runs.samples import write_samples
from results.store import load as load_records


@pytest.fixture(scope="module")
def digits():
    return load()


@pytest.fixture
def samples(tmp_path, digits):
    path = tmp_path / "mine.npz"
    write_samples(path, [digits.images[:120]], digits.labels[:120], {})
    path.with_suffix(".json").unlink()
    return path


def judge(samples, digits, tmp_path, protocol=None, name=None):
    found = evaluate_and_record(
        samples,
        protocol or get_protocol("digits"),
        digits,
        tmp_path / "records.jsonl",
        cache=tmp_path / "cache",
        name=name,
    )
    return {each.metric: each for each in found}


def test_a_measurement_is_found_again(samples, digits, tmp_path):
    first = judge(samples, digits, tmp_path)
    assert judge(samples, digits, tmp_path) == first
    assert len(load_records([tmp_path / "records.jsonl"]).records) == len(first) == 6


def test_another_reference_protocol_or_name_is_another_measurement(samples, digits, tmp_path):
    first = judge(samples, digits, tmp_path)
    half = ImageSet(name="digits", images=digits.images[900:], labels=digits.labels[900:])
    other = judge(samples, half, tmp_path)
    assert other["fd"].value > 1.05 * first["fd"].value
    assert other["fd"].evaluation.reference_sha256 != first["fd"].evaluation.reference_sha256
    newer = dataclasses.replace(get_protocol("digits"), version=2)
    assert judge(samples, digits, tmp_path, protocol=newer)["fd"].protocol_version == "2"
    assert judge(samples, digits, tmp_path, name="foo")["fd"].system == "foo"
    assert judge(samples, digits, tmp_path)["fd"].system == "mine"
    loaded = load_records([tmp_path / "records.jsonl"])
    assert len(loaded.records) == 24 and not loaded.conflicts


def test_samples_that_are_not_the_sidecars_are_refused(tmp_path, digits):
    path = tmp_path / "samples.npz"
    write_samples(path, [digits.images[:120]], digits.labels[:120], {"made": "here"})
    other = tmp_path / "other.npz"
    write_samples(other, [digits.images[120:240]], digits.labels[120:240], {})
    path.write_bytes(other.read_bytes())
    with pytest.raises(UserError, match=r"samples.npz is not the file that .*samples.json describes"):
        judge(path, digits, tmp_path)
    assert json.loads(path.with_suffix(".json").read_text())["made"] == "here"
    assert not (tmp_path / "records.jsonl").exists()


def test_whole_numbers_and_floats_in_a_protocol_are_one_setting(tmp_path):
    text = (
        'name = "mine"\ndataset = "digits"\nresolution = 8\nimage_channels = 1\nnum_classes = 10\ninput_size = 8\n'
        'in_channels = 1\nsamples = 100\nsuite = "embedded"\n[recipe]\nweight_decay = {}\n[sampling]\nguidance_scale = {}\n'
    )
    made = []
    for numbers in (("0", "2"), ("0.0", "2.0")):
        path = tmp_path / "mine.toml"
        path.write_text(text.format(*numbers))
        made.append(json.dumps(get_protocol(str(path)).as_dict()))
    assert made[0] == made[1]
    assert np.isfinite(json.loads(made[0])["recipe"]["weight_decay"])
