"""Suite adm from the command line: samples and reference in ADM's layout, a whole network with random weights."""

import dataclasses
import json
import shutil
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from inception_graph_maker import pictures

from evaluators import adm
from evaluators.features import INCEPTION_2015, INCEPTION_BACKENDS, inception_jax
from evaluators.features.inception_graph import read_weights
from evaluators.features.inception_v3 import InceptionFeatures
from evaluators.inception_score import log_softmax
from evaluators.statistics import statistics
from evaluators.suites import ADM, METRICS
from harness.cli import group
from harness.data.images import ImageSet
from harness.errors import UserError
from harness.pipeline.evaluation_config import EvaluationConfig, make_config
from harness.pipeline.measure import evaluate_samples_file
from harness.protocols import get_protocol

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
N, M = 100, 24  # the fewest samples that the suite takes


def evaluate(*arguments):
    return CliRunner().invoke(group, ["evaluate", *map(str, arguments)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, made_inception):
    """Sample and reference files, and the network's features of their images."""
    folder = tmp_path_factory.mktemp("adm")
    images = np.concatenate([pictures(4, 32, seed) for seed in range((N + M) // 4)])
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


def frechet_of_rows(x, y):
    """The distance computed differently: tr (S_x S_y)^(1/2) is the sum of the singular values of the centred rows' product."""
    a, b = (rows.astype(np.float64) for rows in (x, y))
    means = [rows.mean(axis=0) for rows in (a, b)]
    a, b = ((rows - mean) / np.sqrt(len(rows) - 1) for rows, mean in zip((a, b), means, strict=True))
    roots = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return np.sum((means[0] - means[1]) ** 2) + np.sum(a**2) + np.sum(b**2) - 2 * roots


def test_numbers_and_records(folder, made_inception, monkeypatch):
    """The network works on a batch and a bit of each file, because it takes most of the time; all rows are mixed from that."""
    seen = {}
    call = InceptionFeatures.__call__

    def spy(self, images):
        few = self.batch_size + 2
        found, mixing = (
            call(self, images[:few]),
            np.random.RandomState(len(images)).dirichlet(np.ones(few), len(images)),
        )
        mixed = {name: np.float32(mixing) @ getattr(found, name) for name in ("pooled", "spatial", "logits")}
        seen[len(images)] = (images.copy(), dataclasses.replace(found, **mixed))
        return seen[len(images)][1]

    monkeypatch.setattr(InceptionFeatures, "__call__", spy)
    done = evaluate(*common(folder, made_inception), "--out", folder / "one.jsonl")
    assert done.exit_code == 0, done.exception
    records = {each["metric"]: each for each in json.loads(done.stdout)["records"]}
    assert list(records) == ["fid", "sfid", "is", "precision", "recall"]
    for name, count in (("samples.npz", N), ("reference.npz", M)):  # each went through the network once
        with np.load(folder / name) as data:
            np.testing.assert_array_equal(seen[count][0], data["arr_0"])
    samples, reference = seen[N][1], seen[M][1]
    for metric, mine, theirs in (
        ("fid", samples.pooled, reference.pooled), ("sfid", samples.spatial, reference.spatial)
    ):  # fmt: skip
        assert records[metric]["value"] == pytest.approx(frechet_of_rows(mine, theirs), rel=1e-5)
        assert records[metric]["low"] < records[metric]["value"] < records[metric]["high"]
    log_p = log_softmax(samples.logits)
    p = np.exp(log_p)
    expected = np.exp((p * (log_p - np.log(p.mean(axis=0)))).sum(axis=1).mean())
    assert records["is"]["value"] == pytest.approx(expected, rel=1e-4)
    judged = records["fid"]["evaluation"]
    assert (judged["suite"], judged["mode"], judged["features"]) == ("adm", "adm", "inception-2015-12-05")


@pytest.mark.parametrize("spatial", [True, False])
def test_estimates_of_a_reference_of_statistics_alone(spatial):
    random = np.random.RandomState(2)
    samples, reference = ([random.rand(n, dim).astype(np.float32) for dim in (16, 12, 10)] for n in (100, 40))
    fields = {
        "reference_statistics": statistics(reference[0]),
        "reference_spatial_statistics": statistics(reference[1]),
        "block": np.arange(100) % 20,
    }
    whole = adm.estimates(*samples, reference_pooled=reference[0], **fields)
    fields["reference_spatial_statistics"] = fields["reference_spatial_statistics"] if spatial else None
    alone = adm.estimates(*samples, reference_pooled=reference[0][:0], **fields)
    assert list(whole) == ["fid", "sfid", "is", "precision", "recall"]
    assert list(alone) == (["fid", "sfid", "is"] if spatial else ["fid", "is"])
    assert all(alone[key].value == whole[key].value for key in alone)


@pytest.mark.slow
@pytest.mark.parametrize("spatial", [True, False])
def test_statistics_alone_and_no_protocol(spatial, folder, made_inception, monkeypatch, tmp_path, caplog):
    """As ADM's evaluator is called. The network is replaced: what is tested is what is done with its features."""
    from evaluators.features import Features

    mixing = np.random.RandomState(1).rand(3, 2048 + 2023 + 1008).astype(np.float32)

    def project(self, images):
        rows = images.reshape(len(images), -1, 3)[:, :7].mean(axis=1, dtype=np.float32) / 255 @ mixing
        pooled, rest, logits = np.split(rows, (2048, 4071), axis=1)
        return Features(pooled=pooled, spatial=rest, logits=logits)

    monkeypatch.setattr(InceptionFeatures, "__call__", project)
    with np.load(folder / "reference.npz") as data:
        arrays, found = {"arr_0": data["arr_0"]}, project(None, data["arr_0"])
    for suffix, rows in (("", found.pooled), ("_s", found.spatial)):
        own = statistics(rows)
        arrays |= {f"mu{suffix}": own.mean, f"sigma{suffix}": own.covariance}
    np.savez(tmp_path / "whole.npz", **arrays)
    keys = ("mu", "sigma", "mu_s", "sigma_s") if spatial else ("mu", "sigma")
    np.savez(tmp_path / "alone.npz", **{key: arrays[key] for key in keys})
    values = {}
    for name in ("whole", "alone"):
        done = evaluate(
            folder / "samples.npz", "--reference", tmp_path / f"{name}.npz", "--suite", "adm", "--inception",
            made_inception.graph, "--json", "--out", tmp_path / f"{name}.jsonl",
        )  # fmt: skip
        assert done.exit_code == 0, done.exception
        values[name] = {each["metric"]: each["value"] for each in json.loads(done.stdout)["records"]}
    assert list(values["whole"]) == ["fid", "sfid", "is", "precision", "recall"]
    assert list(values["alone"]) == (["fid", "sfid", "is"] if spatial else ["fid", "is"])
    for metric, value in values["alone"].items():
        assert value == pytest.approx(values["whole"][metric], rel=1e-9, abs=1e-9)
    assert f"left out: {'' if spatial else 'sfid, '}precision, recall" in caplog.text


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


def test_missing_or_useless_files_are_refused(folder, made_inception, tmp_path):
    samples, task = folder / "samples.npz", folder / "task.toml"
    done = evaluate(samples, "--protocol", task, "--reference", folder / "reference.npz")
    assert isinstance(done.exception, UserError) and "give --inception FILE" in str(done.exception)
    for backend in ("tensorflow", "jax"):
        done = evaluate(
            samples, "--suite", "embedded", "--protocol", task, "--reference", samples, "--backend", backend
        )
        assert f"--backend {backend} is for suites on" in str(done.exception)
    with np.load(folder / "reference.npz") as data:
        np.savez(tmp_path / "bad.npz", arr_0=data["arr_0"], mu=np.zeros(7), sigma=np.eye(7))
    arguments = list(common(folder, made_inception))
    arguments[4] = tmp_path / "bad.npz"
    assert "not statistics of inception-2015-12-05" in str(evaluate(*arguments).exception)


@pytest.mark.slow
def test_jax_agrees_with_torch(folder, made_inception, tmp_path):
    values, hashes = {}, set()
    for each in ("torch", "jax"):
        (tmp_path / each).mkdir()  # a separate folder, or the second run would use the first one's cached features
        samples = shutil.copy(folder / "samples.npz", tmp_path / each)
        done = evaluate(samples, *common(folder, made_inception)[1:], "--backend", each)
        assert done.exit_code == 0, done.exception
        records = json.loads(done.stdout)["records"]
        values[each] = {record["metric"]: record["value"] for record in records}
        hashes |= {record["evaluation"]["features_sha256"] for record in records}
        assert {record["evaluation"]["features"] for record in records} == {INCEPTION_BACKENDS[each].name}
    assert len(hashes) == 1
    print(values)
    assert values["torch"].keys() == inception_jax.METRIC_TOLERANCES.keys()
    for metric, tolerance in inception_jax.METRIC_TOLERANCES.items():
        assert values["jax"][metric] == pytest.approx(values["torch"][metric], **tolerance), metric


def test_the_record_says_that_jax_computed(folder, made_inception, tmp_path, monkeypatch):
    """With a network of a few operations in the place of Inception, and one metric of the suite."""

    def network(x, parameters, classifier):
        few = x[:, ::30, ::30].reshape(len(x), -1)  # (N, 300)
        return [jnp.resize(few, (len(x), width)) for width in (2048, 2023, 1008)]

    monkeypatch.setattr(inception_jax, "network", network)
    suite = dataclasses.replace(
        make_config(ADM, made_inception.graph, "jax", None).suite, metrics=(METRICS["precision"],)
    )
    with np.load(folder / "reference.npz") as data:
        images = ImageSet(name="pictures", images=data["arr_0"], labels=np.arange(M) % 10)
    (record,) = evaluate_samples_file(
        folder / "samples.npz",
        get_protocol(str(folder / "task.toml")),
        images,
        cache=tmp_path,
        config=EvaluationConfig(suite=suite, weights=made_inception.graph, device="cpu:0"),
    )
    judged, made = record.evaluation, record.environment
    assert judged.features == "inception-2015-12-05-jax"
    assert judged.features_sha256 == read_weights(made_inception.graph).sha256
    assert (made.versions["jax"], made.versions["jaxlib"]) == (jax.__version__, metadata.version("jaxlib"))
    assert made.device == "cpu:0"


def test_a_device_that_is_absent_is_refused(folder, made_inception):
    for backend, says in (("torch", "--device abacus is not available here"), ("jax", "has no device 'abacus'")):
        done = evaluate(*common(folder, made_inception), "--backend", backend, "--device", "abacus")
        assert isinstance(done.exception, UserError) and says in str(done.exception)
