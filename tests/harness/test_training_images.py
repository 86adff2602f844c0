"""Copies, authenticity and the picture of neighbours are sought in the training images, or left out, whatever the reference."""

import dataclasses
import logging

import numpy as np
import pytest
import tiny_suite

import harness
from evaluators.neighbours_picture import write_picture
from harness import registry
from harness.data.digits import load
from harness.data.images import ImageSet
from harness.errors import UserError
from harness.pipeline.training_images import training_sha256
from harness.runs.samples import write_samples
from results.store import append
from results.store import load as load_records

DIGITS = load()
N = 400
PROTOCOL = """
name = "few"
dataset = "npz"
resolution = 8
image_channels = 1
num_classes = 10
input_size = 8
in_channels = 1
samples = 400
suite = "{}"
"""


@pytest.fixture(autouse=True)
def suite():
    """The name of a suite with both metrics; `tiny-only` has copies alone."""
    suites = {"tiny-copies": ("fd", "copies", "authenticity"), "tiny-only": ("copies",)}
    for name, metrics in suites.items():
        registry.suites.register(tiny_suite.made(name, metrics), "the tests")
    yield "tiny-copies"
    for name in suites:
        del registry.suites._items[name], registry.suites._owners[name]


@pytest.fixture
def evaluate(tmp_path, suite):
    """evaluate(**options) of the first 400 digits as samples, against held-out digits: metric -> value."""
    np.savez(tmp_path / "held-out.npz", arr_0=DIGITS.images[900:], arr_1=DIGITS.labels[900:])
    np.savez(tmp_path / "train.npz", arr_0=DIGITS.images, arr_1=DIGITS.labels)
    (tmp_path / "few.toml").write_text(PROTOCOL.format(suite))

    def evaluated(trained_on=None, reference="held-out.npz", sidecar=None, **options):
        path = tmp_path / "mine.npz"
        record = {"system": "mine", "training": {"dataset_sha256": trained_on}, "sampling": {}}
        write_samples(path, [DIGITS.images[:N]], DIGITS.labels[:N], sidecar or {"schema": 2, "record": record})
        if trained_on is None and sidecar is None:
            path.with_suffix(".json").unlink()
        options = {"protocol": str(tmp_path / "few.toml"), **options}
        if reference is not None:
            options["reference"] = tmp_path / reference
        result = harness.evaluate(samples=path, **options)
        return {record.metric: record for record in result.records}

    evaluated.folder = tmp_path
    return evaluated


def test_copies_of_training_images_are_found_whatever_the_reference(evaluate):
    against_training = evaluate(reference="train.npz", trained_on=DIGITS.sha256)
    assert against_training["copies"].value == 1.0 and against_training["authenticity"].value == 0.0
    records = evaluate(trained_on=DIGITS.sha256, protocol="digits", suite="tiny-copies")  # the data set is at hand
    assert records["copies"].value == 1.0 and records["authenticity"].value == 0.0
    assert records["copies"].evaluation.training_sha256 == DIGITS.sha256
    assert records["fd"].evaluation.training_sha256 is None
    again = evaluate(trained_on=DIGITS.sha256, protocol="digits", suite="tiny-copies")
    assert {key: record.id for key, record in again.items()} == {key: record.id for key, record in records.items()}
    named = evaluate(trained_on=DIGITS.sha256, data=evaluate.folder / "train.npz")
    assert named["copies"].value == 1.0 and named["copies"].evaluation.training_sha256 == DIGITS.sha256
    named = evaluate(data=evaluate.folder / "train.npz")  # samples without a sidecar
    assert named["copies"].value == 1.0 and named["authenticity"].value == 0.0


@pytest.mark.parametrize("trained_on", [None, "ab" * 32])
def test_without_the_training_images_they_are_left_out_and_that_is_said(evaluate, trained_on, caplog):
    with caplog.at_level(logging.WARNING):
        assert set(evaluate(trained_on)) == {"fd"}
    assert "copies, authenticity: left out, because the training images" in caplog.text and "--data" in caplog.text
    with pytest.raises(UserError, match="--neighbours shows training images"):
        evaluate(trained_on, neighbours=evaluate.folder / "picture.png")
    with pytest.raises(UserError, match="measures copies.*not at hand.*--data"):
        evaluate(trained_on, suite="tiny-only")


def test_other_images_are_not_taken_for_the_training_images(evaluate, caplog):
    wrong = evaluate.folder / "wrong.npz"
    np.savez(wrong, arr_0=DIGITS.images[500:800], arr_1=DIGITS.labels[500:800])
    with pytest.raises(UserError, match=r"wrong.npz holds other images .* than the samples' network was trained on"):
        evaluate(DIGITS.sha256, data=wrong)
    with caplog.at_level(logging.WARNING):  # as reference
        assert set(evaluate(DIGITS.sha256, reference=None, data=wrong)) == {"fd"}
    assert "left out" in caplog.text


def test_images_of_a_program_are_not_sought_in_the_reference(evaluate, caplog):
    """A reference that is given is held out: copies are those of the protocol's data set, or are left out and named."""
    config = harness.EvaluationConfig(suite=registry.suites.get("tiny-copies"))
    held_out = ImageSet(name="held-out", images=DIGITS.images[900:], labels=DIGITS.labels[900:])

    def evaluated(protocol, data):
        records = harness.evaluate_images([DIGITS.images[:N]], protocol, data, name="mine", config=config)
        return {record.metric: record for record in records}

    found = evaluated("digits", held_out)
    assert found["copies"].value == 1 and found["copies"].evaluation.training_sha256 == DIGITS.sha256
    same, own = evaluated("digits", DIGITS), evaluated("digits", None)
    assert same["copies"].value == own["copies"].value == 1 and same["copies"].id == own["copies"].id
    caplog.clear()
    elsewhere = harness.get_protocol(str(evaluate.folder / "few.toml"))  # whose data set is a file that nobody names
    assert set(evaluated(elsewhere, held_out)) == {"fd"}
    assert "copies, authenticity: left out" in caplog.text


def test_the_picture_shows_training_images(evaluate, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "evaluators.neighbours_picture.write_picture",
        lambda inputs, path: seen.append(inputs) or write_picture(inputs, path),
    )
    evaluate(DIGITS.sha256, protocol="digits", suite="tiny-copies", neighbours=evaluate.folder / "picture.png")
    (inputs,) = seen
    assert np.array_equal(inputs.training, DIGITS.images) and len(inputs.reference.images) == len(DIGITS) - 900


def test_the_hash_is_found_in_sidecars_of_every_age(tmp_path):
    path = tmp_path / "x.npz"
    assert training_sha256(path) is None
    for sidecar in (
        {"record": {"training": {"dataset_sha256": "ab"}}, "identity": {"run": {"dataset_sha256": "other"}}},
        {"record": {"training": {"steps": 1}}, "identity": {"run": {"dataset_sha256": "ab"}}},
        {"identity": {"weights": {"base": {"run": {"dataset_sha256": "ab"}, "sha256": "x"}}}},
    ):
        write_samples(path, [DIGITS.images[:2]], DIGITS.labels[:2], sidecar)
        assert training_sha256(path) == "ab"
    write_samples(path, [DIGITS.images[:2]], DIGITS.labels[:2], {"identity": {"weights": {"base": {"run": None}}}})
    assert training_sha256(path) is None


def test_a_record_of_the_wrong_images_does_not_outlive_the_right_one(evaluate):
    records = evaluate(DIGITS.sha256, protocol="digits", suite="tiny-copies")
    right = records["copies"]
    wrong = dataclasses.replace(
        right, value=0.01, low=None, high=None, evaluation=dataclasses.replace(right.evaluation, training_sha256=None)
    )
    path = evaluate.folder / "records.jsonl"
    append(path, [wrong])
    found = [record for record in load_records([path]).records if record.metric == "copies"]
    assert found == [right]


def test_a_run_with_a_reference_seeks_copies_in_its_training_images(tmp_path, suite):
    np.savez(tmp_path / "held-out.npz", arr_0=DIGITS.images[900:], arr_1=DIGITS.labels[900:])
    (tmp_path / "digits.toml").write_text(PROTOCOL.format(suite).replace('"npz"', '"digits"'))
    result = harness.run(
        backbone="dit-xs-4", protocol=str(tmp_path / "digits.toml"), steps=1, reference=tmp_path / "held-out.npz",
        out=tmp_path / "run", sampling_steps=(1,), samples=100, report=False, precision="float32", micro_batch=16, set={"batch": 16},
    )  # fmt: skip
    by_metric = {record.metric: record for record in result.records}
    assert by_metric["copies"].evaluation.training_sha256 == DIGITS.sha256
    assert by_metric["copies"].training.dataset_sha256 == DIGITS.sha256
