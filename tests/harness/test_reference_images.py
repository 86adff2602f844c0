"""Protocols whose reference is a part of the data set: the same part everywhere, and copies are sought in all of it."""

import dataclasses

import numpy as np
import pytest
import tiny_suite

import harness
from harness.data.digits import load
from harness.errors import UserError
from harness.pipeline.measure import evaluate_images
from harness.protocols import get_protocol
from harness.protocols import load as load_protocol
from harness.registry import protocols

FILE = """
name = "part"
dataset = "digits"
resolution = 8
image_channels = 1
num_classes = 10
input_size = 8
in_channels = 1
samples = 200
suite = "embedded"
reference_images = 300

[recipe]
batch = 16
flip = false
"""


def test_the_part_depends_on_counts_alone():
    data = load()
    part = data.reference(300)
    assert len(part) == 300 and part.sha256 == data.reference(300).sha256 != data.sha256
    rows = [int(np.flatnonzero((data.images == image).all(axis=(1, 2, 3)))[0]) for image in part.images[:50]]
    assert rows == sorted(rows) and max(rows) > 200  # in order, and not the first ones
    np.testing.assert_array_equal(part.labels[:50], data.labels[rows])
    assert np.bincount(part.labels).min() > 15  # no class is left out
    for count in (0, len(data), len(data) + 1):
        assert data.reference(count) is data


def test_run_evaluate_and_python_use_the_same_part(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "part.toml").write_text(FILE)
    data = load()
    result = harness.run(
        backbone="dit-3xs-4", protocol="part.toml", steps=2, sampling_steps=(2,), report=False, sampler="ddim"
    )
    assert {record.metric for record in result.records} == {"fd", "kid", "is", "precision", "recall", "copies"}
    part_sha256 = {record.evaluation.reference_sha256 for record in result.records}
    again = harness.evaluate(samples=result.samples[0], out=tmp_path / "again.jsonl")
    assert {record.evaluation.reference_sha256 for record in again.records} == part_sha256
    assert [record.value for record in again.records] == [record.value for record in result.records]
    # copies of training images that are not in the part are found
    part = data.reference(300)
    left_out = np.array([not (image == part.images).all(axis=(1, 2, 3)).any() for image in data.images])
    copied = evaluate_images(
        iter([data.images[left_out][:200]]), load_protocol(tmp_path / "part.toml"), name="copies", count=200
    )
    values = {record.metric: record.value for record in copied}
    assert values["copies"] == 1 and {record.evaluation.reference_sha256 for record in copied} == part_sha256


def test_a_negative_number_is_refused():
    protocol = protocols.get("digits")
    assert protocol.reference_images == 0 and get_protocol("fashion-mnist-16").reference_images == 10_000
    with pytest.raises(UserError, match="reference_images must not be negative"):
        dataclasses.replace(protocol, reference_images=-1)


@pytest.fixture
def tiny_suites():
    with tiny_suite.registered():
        yield


def test_features_are_computed_on_the_device_of_the_run(tmp_path, monkeypatch, tiny_suites):
    devices = []

    def load(spec, device):
        devices.append(device)
        return tiny_suite.Projection(spec, device)

    monkeypatch.setattr(tiny_suite, "load", load)
    (tmp_path / "tiny.toml").write_text(FILE.replace('"embedded"', '"tiny"'))
    monkeypatch.chdir(tmp_path)
    settings = {"backbone": "dit-3xs-4", "protocol": "tiny.toml", "sampling_steps": (2,), "report": False}
    harness.run(steps=1, device="cpu:0", **settings)
    harness.run(steps=2, **settings)  # the run keeps its device
    assert devices and set(devices) == {"cpu:0"}
