"""Facts that are written down in more than one place say one thing, whichever place is asked."""

import csv
import errno
import json
import os
import warnings
import zipfile

import few_digits
import numpy as np
import pytest
import tiny_suite
from click.testing import CliRunner

from harness.cli import group
from harness.data.digits import load
from harness.errors import RunError, UserError
from harness.io import files
from harness.runs.samples import write_samples
from reports.grid import write_grid
from results import paper
from results.records import Evaluation, Record, to_json

DIGITS = load()


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A protocol of some digits, in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few.toml").write_text(few_digits.task("few", suite="tiny"))
    with tiny_suite.registered():
        yield tmp_path


def invoke(*words):
    return CliRunner().invoke(group, [str(each) for each in words])


def harness(*words):
    result = invoke(*words)
    assert result.exit_code == 0, (result.exception, result.output)
    return result.stdout


def test_comparisons_and_tables_have_one_order_of_metrics(home):
    """Of all metrics that records may hold, in the order in which a table has its columns."""
    keys = (
        "is", "recall", "precision", "coverage", "density", "copies", "authenticity", "mind", "cmmd", "kid", "sfid",
        "fd_infinity", "fd", "fid",
    )  # fmt: skip
    for name, value in (("a", 0.2), ("b", 0.6)):
        records = [
            Record(
                provenance="measured", metric=key, value=value, low=value - 0.1, high=value + 0.1, n=100,
                protocol="few", resolution=8, dataset="npz", system=name, evaluation=Evaluation(suite="tiny"),
            )
            for key in keys
        ]  # fmt: skip
        (home / f"{name}.jsonl").write_text("".join(f"{to_json(record)}\n" for record in records))
    compared = [row["metric"] for row in json.loads(harness("compare", "a.jsonl", "b.jsonl", "--json"))["rows"]]
    harness("report", "--results", "a.jsonl", "--protocol", "few", "--out", "report")
    with (home / "report" / "table-few.csv").open(newline="") as file:
        columns = next(csv.reader(file))
    in_table = [each for each in columns if each in keys]
    assert sorted(in_table) == sorted(keys)
    assert compared == in_table


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda path: files.write_bytes(path, b"any"), id="files"),
        pytest.param(lambda path: write_samples(path, [DIGITS.images[:2]], DIGITS.labels[:2], {}), id="samples"),
        pytest.param(lambda path: write_grid(DIGITS.images[:2], DIGITS.labels[:2], path), id="reports"),
    ],
)
def test_a_full_disk_is_told_in_one_way(write, home, monkeypatch):
    """Whoever writes a file whole or not at all says what it is and what to do, and leaves nothing behind."""

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    before = sorted(home.rglob("*"))
    with pytest.raises(RunError) as failed:
        write(home / "any.npz")
    text = str(failed.value)
    assert "the disk is full" in text and "free some space and repeat the command" in text and "any.npz" in text
    assert sorted(home.rglob("*")) == before


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(("few.npz", "--data", "twice.npz"), id="data"),
        pytest.param(("few.npz", "--reference", "twice.npz"), id="reference"),
        pytest.param(("twice.npz", "--data", "few.npz"), id="samples"),
    ],
)
def test_an_npz_that_holds_an_array_twice_is_refused_wherever_it_is_given(words, home):
    """Which of the two is meant nobody knows."""
    np.savez(home / "few.npz", arr_0=DIGITS.images[:150], arr_1=DIGITS.labels[:150])
    np.savez(home / "twice.npz", arr_0=DIGITS.images[200:350], arr_1=DIGITS.labels[200:350])
    np.save(home / "other.npy", DIGITS.images[400:550])
    with zipfile.ZipFile(home / "twice.npz", "a") as archive, warnings.catch_warnings(action="ignore"):
        archive.write(home / "other.npy", "arr_0.npy")
    result = invoke("evaluate", *words, "--protocol", "few.toml", "--out", "records.jsonl")
    assert isinstance(result.exception, UserError), result.output
    assert "twice.npz" in str(result.exception) and "it holds arr_0.npy twice" in str(result.exception)
    assert not (home / "records.jsonl").exists()


def test_what_a_newer_version_wrote_is_refused_as_such(home):
    """A sidecar as a run file: by its schema, and not by what is missing from it."""
    identity = {"drawn": "in a way that is not known yet"}
    write_samples(
        home / "samples.npz", [DIGITS.images[:150]], DIGITS.labels[:150], {"schema": 99, "identity": identity}
    )
    (home / "run").mkdir()
    (home / "run" / "run.json").write_text('{"schema": 99}')
    for words in (("evaluate", "samples.npz", "--protocol", "few.toml"), ("sample", "--run", "run")):
        result = invoke(*words, *(("--data", "samples.npz") if words[0] == "evaluate" else ()))
        assert isinstance(result.exception, UserError), result.output
        assert "was written by a newer harness (schema 99); update this one" in str(result.exception)


def test_training_counts_three_forward_passes_in_plans_and_in_the_papers_records():
    found = json.loads(harness("plan", "--budget", "1e6", "--protocol", "imagenet-256", "--json"))
    (row,) = (each for each in found["rows"] if each["name"] == "dit-xl-2")
    assert row["training_gflops"] == pytest.approx(3 * row["gflops"] * row["images"])
    published = [record for record in paper.records() if record.training is not None]
    assert len(published) >= 50
    for record in published:
        assert record.training.gflops == pytest.approx(3 * record.gflops * record.training.images)


@pytest.mark.parametrize(
    ("protocol", "images"), [("digits", 1797), ("fashion-mnist-32", 70_000), ("imagenet-256", 1_281_167)]
)
def test_epochs_are_of_the_images_that_a_data_set_says_it_has(protocol, images):
    found = json.loads(harness("plan", "--budget", "1e6", "--protocol", protocol, "--json"))
    dataset = protocol.rpartition("-")[0] or protocol
    (listed,) = (
        each for each in json.loads(harness("list", "datasets", "--json"))["datasets"] if each["name"] == dataset
    )
    assert f"{images:,} " in listed["summary"]
    assert {row["epochs"] for row in found["rows"]} == {row["images"] / images for row in found["rows"]}
