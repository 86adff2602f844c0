"""Suite adm from the command line: samples and reference in ADM's layout, a whole network with random weights."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from inception_graph_maker import pictures

from evaluators.features import INCEPTION_2015
from evaluators.frechet import frechet_distance
from evaluators.inception_score import log_softmax
from evaluators.statistics import statistics
from harness.cli import group
from harness.errors import Refusal

TASK = """
name = "pictures"
dataset = "npz"
resolution = 32
num_classes = 10
input_size = 32
in_channels = 3
samples = 100
suite = "adm"
"""
N, M = 104, 40


def evaluate(*arguments):
    return CliRunner().invoke(group, ["evaluate", *map(str, arguments)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, made_inception):
    """Sample and reference files, and what the network says of their images."""
    folder = tmp_path_factory.mktemp("adm")
    images = np.concatenate([pictures(8, 32, seed) for seed in range((N + M) // 8)])
    np.savez(folder / "samples.npz", arr_0=images[:N], arr_1=np.arange(N) % 10)
    np.savez(folder / "reference.npz", arr_0=images[N:])
    (folder / "task.toml").write_text(TASK)
    return folder


def features(folder, made_inception, name):
    extractor = INCEPTION_2015.load("cpu", weights=made_inception.graph)
    with np.load(folder / name) as data:
        return extractor(data["arr_0"])


def common(folder, made_inception):
    return (
        folder / "samples.npz", "--protocol", folder / "task.toml", "--reference", folder / "reference.npz",
        "--inception", made_inception.graph, "--json",
    )  # fmt: skip


def test_numbers_and_records(folder, made_inception):
    done = evaluate(*common(folder, made_inception), "--out", folder / "one.jsonl")
    assert done.exit_code == 0, done.exception
    records = {each["metric"]: each for each in json.loads(done.stdout)["records"]}
    assert list(records) == ["fid", "sfid", "is", "precision", "recall"]
    samples = features(folder, made_inception, "samples.npz")
    reference = features(folder, made_inception, "reference.npz")
    for metric, mine, theirs in (
        ("fid", samples.pooled, reference.pooled), ("sfid", samples.spatial, reference.spatial)
    ):  # fmt: skip
        expected = frechet_distance(statistics(mine), statistics(theirs))
        assert records[metric]["value"] == pytest.approx(expected, rel=1e-5)
        assert records[metric]["low"] < records[metric]["value"] < records[metric]["high"]
    log_p = log_softmax(samples.logits)
    p = np.exp(log_p)
    expected = np.exp((p * (log_p - np.log(p.mean(axis=0)))).sum(axis=1).mean())
    assert records["is"]["value"] == pytest.approx(expected, rel=1e-4)
    judged = records["fid"]["evaluation"]
    assert (judged["suite"], judged["mode"], judged["features"]) == ("adm", "adm", "inception-2015-12-05")


@pytest.mark.slow
def test_statistics_of_a_file_decide_fid_and_sfid_and_nothing_else(folder, made_inception):
    """As in ADM's reference batches, whose statistics are of other images than the file holds."""
    done = evaluate(*common(folder, made_inception), "--out", folder / "three.jsonl")
    records = {each["metric"]: each for each in json.loads(done.stdout)["records"]}
    samples = features(folder, made_inception, "samples.npz")
    # The same reference images, with statistics of other images in the file: they decide FID and sFID, not the rest.
    with np.load(folder / "reference.npz") as data:
        arrays = {"arr_0": data["arr_0"]}
    for suffix, rows in (("", samples.pooled), ("_s", samples.spatial)):
        own = statistics(rows)
        arrays |= {f"mu{suffix}": own.mean, f"sigma{suffix}": own.covariance}
    np.savez(folder / "with-statistics.npz", **arrays)
    arguments = list(common(folder, made_inception))
    arguments[4] = folder / "with-statistics.npz"
    done = evaluate(*arguments, "--out", folder / "two.jsonl")
    assert done.exit_code == 0, done.exception
    again = {each["metric"]: each for each in json.loads(done.stdout)["records"]}
    for metric in ("fid", "sfid"):
        assert abs(again[metric]["value"]) < 0.02 * records[metric]["value"]  # samples against their own statistics
    for metric in ("is", "precision", "recall"):
        assert again[metric]["value"] == records[metric]["value"]
    assert again["fid"]["evaluation"]["reference_sha256"] != records["fid"]["evaluation"]["reference_sha256"]


def test_what_is_lacking_or_of_no_use_is_refused(folder, made_inception, tmp_path):
    samples, task = folder / "samples.npz", folder / "task.toml"
    done = evaluate(samples, "--protocol", task, "--reference", folder / "reference.npz")
    assert isinstance(done.exception, Refusal) and "give --inception FILE" in str(done.exception)
    done = evaluate(
        samples, "--suite", "embedded", "--protocol", task, "--reference", samples, "--backend", "tensorflow"
    )
    assert "--backend tensorflow belongs to suite adm" in str(done.exception)
    done = evaluate(samples, "--protocol", task, "--reference", samples, "--data", samples)
    assert "both name the images" in str(done.exception)
    with np.load(folder / "reference.npz") as data:
        np.savez(tmp_path / "bad.npz", arr_0=data["arr_0"], mu=np.zeros(7), sigma=np.eye(7))
    arguments = list(common(folder, made_inception))
    arguments[4] = tmp_path / "bad.npz"
    assert "not statistics of inception-2015-12-05" in str(evaluate(*arguments).exception)


@pytest.mark.slow
def test_tensorflow_and_torch_agree(folder, made_inception):
    pytest.importorskip("tensorflow")
    values = {}
    for backend in ("torch", "tensorflow"):
        done = evaluate(*common(folder, made_inception), "--backend", backend, "--out", folder / f"{backend}.jsonl")
        assert done.exit_code == 0, done.exception
        records = json.loads(done.stdout)["records"]
        values[backend] = {each["metric"]: each["value"] for each in records}
        hashes = {each["evaluation"]["features_sha256"] for each in records}
        assert len(hashes) == 1 and hashes == values.setdefault("hashes", hashes)
    print(values)
    for metric, tolerance in {"fid": 2e-3, "sfid": 2e-3, "is": 1e-3}.items():
        assert values["torch"][metric] == pytest.approx(values["tensorflow"][metric], rel=tolerance)
    assert values["torch"]["precision"] == pytest.approx(values["tensorflow"]["precision"], abs=0.02)  # 104 samples
    assert values["torch"]["recall"] == pytest.approx(values["tensorflow"]["recall"], abs=0.03)
