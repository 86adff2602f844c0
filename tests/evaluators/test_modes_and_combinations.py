"""ADM's numbers beside the exact ones, and any metric on any features: from the command line."""

import dataclasses
import json

import few_digits
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from pixel_features import SPEC, PixelFeatures
from safetensors.numpy import save_file

from evaluators import adm, frechet, precision_recall
from evaluators.features import EFFICIENTNET_LITE0_96, vit, vit_spec
from evaluators.intervals import assign_blocks
from evaluators.metrics import METRICS
from evaluators.statistics import statistics
from evaluators.suites import BUILT_IN, get_suite
from harness import registry
from harness.cli import group
from harness.data.digits import load
from harness.errors import UserError
from results.records import comparable_key, from_json

TASK = few_digits.task("few", suite="adm")


def put(monkeypatch, into, item):
    """Registers an item for one test."""
    into.names()
    monkeypatch.setitem(into._items, item.name, item)
    monkeypatch.setitem(into._owners, item.name, "these tests")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Samples, a reference and a protocol; extractor pixels-for-tests, also as a replacement for Inception."""
    put(monkeypatch, registry.features, SPEC)
    for name in ("adm", "adm-exact"):
        put(monkeypatch, registry.suites, dataclasses.replace(BUILT_IN[name], features=SPEC))
    images = load().images
    faded = (images * 0.8).astype(np.uint8)
    np.savez(tmp_path / "samples.npz", arr_0=faded[:200], arr_1=load().labels[:200])
    np.savez(tmp_path / "turned.npz", arr_0=faded[199::-1], arr_1=load().labels[199::-1])
    np.savez(tmp_path / "reference.npz", arr_0=images[200:500])
    (tmp_path / "task.toml").write_text(TASK)
    return tmp_path


def evaluate(place, *arguments, samples="samples.npz"):
    words = ["evaluate", place / samples, "--protocol", place / "task.toml", "--reference", place / "reference.npz"]
    return CliRunner().invoke(group, list(map(str, (*words, *arguments))))


def records(place, *arguments, **changes):
    done = evaluate(place, *arguments, "--json", **changes)
    assert done.exit_code == 0, done.exception
    return {each["metric"]: from_json(json.dumps(each)) for each in json.loads(done.stdout)["records"]}


def features(place, name):
    with np.load(place / name) as data:
        return PixelFeatures(SPEC)(data["arr_0"])


# Modes ----------------------------------------------------------------------------------------------------------------


def test_both_modes_of_precision_and_recall_are_suites(place):
    rounded, exact = records(place), records(place, "--suite", "adm-exact")
    own, reference = features(place, "samples.npz").pooled, features(place, "reference.npz").pooled
    for found, mode in ((rounded, "adm"), (exact, "exact")):
        assert list(found) == ["fid", "sfid", "is", "precision", "recall"]
        expected = adm.precision_and_recall(reference, own, mode)
        assert (found["precision"].value, found["recall"].value) == expected
        assert {each.evaluation.mode for each in found.values()} == {mode}
    assert adm.precision_and_recall(reference, own, "exact") == precision_recall.precision_recall(reference, own)
    for metric in rounded:
        assert comparable_key(rounded[metric]) != comparable_key(exact[metric])  # so they share no table
    expected = frechet.estimate(own, statistics(reference), assign_blocks(len(own))).value
    assert exact["fid"].value == expected
    text = evaluate(place, "--suite", "adm-exact").stdout
    assert "suite adm-exact: ADM's metrics without its roundings" in text


def test_exact_numbers_do_not_know_the_order(place):
    one, other = (records(place, "--suite", "adm-exact", samples=name) for name in ("samples.npz", "turned.npz"))
    for metric in one:
        assert one[metric].value == pytest.approx(other[metric].value, rel=1e-12), metric
    assert one["precision"].value == other["precision"].value and one["recall"].value == other["recall"].value


def logits(n, spread=3.0):
    random = np.random.default_rng(6)
    label = np.arange(n) * 10 // n
    return (spread * np.eye(10)[label] + random.normal(0, 1, (n, 10))).astype(np.float32)


def test_a_file_sorted_by_class_is_told_apart_from_chance():
    rows = logits(600)
    warning = adm.sample_order_warning(rows, 60)
    here, shuffled = adm.score(rows, 60), adm.score(rows[np.random.RandomState(9).permutation(600)], 60)
    assert f"{here:.4g} in file order" in warning and "use suite adm-exact" in warning and "\n" not in warning
    assert float(warning.split("order, ")[1].split(" +-")[0]) == pytest.approx(shuffled, rel=0.02)
    assert here < 0.6 * shuffled
    for seed in range(30):
        order = np.random.RandomState(seed).permutation(600)
        assert adm.sample_order_warning(rows[order], 60) == ""
    assert adm.sample_order_warning(rows, 600) == ""  # one split: there is no order


def test_the_order_warning_is_printed(place, monkeypatch):
    monkeypatch.setattr(adm, "sample_order_warning", lambda logits: "the order decides")
    assert "warning: is: the order decides\n" in evaluate(place).stderr
    assert "the order decides" not in evaluate(place, "--suite", "adm-exact").stderr


# Combinations ---------------------------------------------------------------------------------------------------------


def test_any_metrics_on_any_features(place):
    keys = [key for key, metric in METRICS.items() if metric.minimum <= 200]
    assert len(keys) >= 9
    found = records(place, "--suite", f"{SPEC.name}:{','.join(keys)}")
    # of the samples' training nothing is known, and the metrics that need its images are left out
    assert list(found) == [key for key in keys if not METRICS[key].needs_training]
    assert {(each.evaluation.suite, each.evaluation.mode) for each in found.values()} == {(SPEC.name, None)}
    alone = records(place, "--suite", f"{SPEC.name}:kid", "--out", place / "alone.jsonl")
    assert list(alone) == ["kid"] and alone["kid"].id == found["kid"].id  # whatever else was measured


def test_statistics_of_another_network_are_not_taken_for_its_own(place):
    """mu and sigma as ADM's files have them: of the right length, of other features."""
    before = records(place, "--suite", f"{SPEC.name}:fd")
    with np.load(place / "reference.npz") as data:
        np.savez(place / "reference.npz", arr_0=data["arr_0"], mu=np.zeros(SPEC.dim), sigma=np.eye(SPEC.dim))
    done = evaluate(place, "--suite", f"{SPEC.name}:fd", "--json", "--out", place / "again.jsonl")
    assert f"has mu and sigma, which suite {SPEC.name} does not use" in done.stderr
    assert json.loads(done.stdout)["records"][0]["value"] == before["fd"].value
    assert [get_suite(f"{name}:fd").reference_statistics for name in ("inception-2015-12-05", "dinov2-vit-b-14")] == [
        "optional",
        "declared",
    ]


def test_statistics_that_the_file_declares_are_taken(place):
    made = place / "made.npz"
    with np.load(place / "reference.npz") as data:
        np.savez(place / "all.npz", arr_0=data["arr_0"])
    words = ["data", "reference", place / "all.npz", "--out", made, "--suite", f"{SPEC.name}:fd", "--images", 50]
    done = CliRunner().invoke(group, list(map(str, words)))
    assert done.exit_code == 0, done.exception
    whole = records(place, "--suite", f"{SPEC.name}:fd")
    (place / "reference.npz").write_bytes(made.read_bytes())
    found = records(place, "--suite", f"{SPEC.name}:fd")
    assert found["fd"].value == pytest.approx(whole["fd"].value, rel=1e-9)  # of all 300, though the file holds 50


def test_a_protocol_may_name_a_combination(place):
    (place / "task.toml").write_text(TASK.replace('"adm"', f'"{SPEC.name}:coverage"'))
    assert list(records(place)) == ["coverage"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pixels-for-test:fd", "unknown feature extractor 'pixels-for-test'; did you mean pixels-for-tests"),
        ("pixels-for-tests:fid", "unknown metric 'fid'; did you mean"),
        ("pixels-for-tests:", "unknown metric ''"),
        ("pixels-for-tests:kid,fd,kid", "names a metric twice"),
        ("dinov2-vit-b-14:fd,is", "dinov2-vit-b-14 has no classifier"),
        ("pixels-for-tests:mind", "mind needs 5000"),
        ("pixel", "unknown suite 'pixel'"),
    ],
)
def test_what_cannot_be_combined_is_refused(place, text, message):
    done = evaluate(place, "--suite", text)
    assert isinstance(done.exception, UserError) and message in str(done.exception)


def test_every_pair_of_metric_and_features_is_a_suite_or_says_why_not():
    for spec in registry.features:
        for metric in METRICS.values():
            if metric.needs_logits and spec.classes is None:
                continue
            suite = get_suite(f"{spec.name}:{metric.key}")
            assert (suite.features, suite.metrics, suite.minimum) == (spec, (metric,), metric.minimum)
    assert get_suite(f"{EFFICIENTNET_LITE0_96.name}: fd, kid").metrics == (METRICS["fd"], METRICS["kid"])


def test_lists_say_paper_direction_and_minimum():
    listed = json.loads(CliRunner().invoke(group, ["list", "--json"]).stdout)
    assert {each["name"] for each in listed["metrics"]} == set(METRICS)
    suites = {each["name"]: each for each in listed["suites"]}
    assert set(suites) == set(BUILT_IN)
    of_suites = [metric for each in suites.values() for metric in each["metrics"]]
    for each in (*listed["metrics"], *of_suites):
        assert each["paper"] and each["direction"] in ("lower", "higher") and each["minimum"] >= 20
    assert suites["clean"]["mode"] == "clean" and "clean-fid's mode clean" in suites["clean"]["note"]
    text = CliRunner().invoke(group, ["list", "metrics"]).stdout
    for metric in METRICS.values():
        assert f"{metric.direction} is better, from {metric.minimum} samples; {metric.paper}" in text


# DINOv2 by path and from the hub --------------------------------------------------------------------------------------


@pytest.fixture
def small_dinov2(place, monkeypatch, tmp_path):
    """ViT-B and ViT-L, both narrow and shallow, in a cache with the hub's layout; the hub itself is not reachable."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    files = {}
    for spec, seed in ((vit_spec.DINOV2_VIT_B_14, 1), (vit_spec.DINOV2_VIT_L_14, 2)):
        shape = dataclasses.replace(vit_spec.SHAPES[spec.name], width=16, depth=1, heads=2, grid=4, input_size=56)
        monkeypatch.setitem(vit.SHAPES, spec.name, shape)
        put(monkeypatch, registry.features, dataclasses.replace(spec, dim=16))
        random = np.random.RandomState(seed)
        state = {
            name: (0.3 * random.standard_normal(tensor.shape) + name.endswith("gamma")).astype(np.float32)
            for name, tensor in vit.VisionTransformer(shape).state_dict().items()
        }
        folder = tmp_path / "hub" / f"models--{shape.repository.replace('/', '--')}"
        (folder / "snapshots" / "abc").mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("abc")
        files[spec.name] = (folder / "snapshots" / "abc" / "model.safetensors", shape.repository)
        save_file(state, files[spec.name][0])
    return files


@pytest.mark.parametrize("name", ["dinov2-vit-b-14", "dinov2-vit-l-14"])
def test_weights_of_dinov2_by_path_and_from_the_hub(name, place, small_dinov2):
    path, repository = small_dinov2[name]
    wanted = ("--suite", f"{name}:fd,density")
    by_path = records(place, *wanted, "--features-weights", path)
    from_hub = records(place, *wanted, "--features-weights", repository, "--out", place / "hub.jsonl")
    assert list(by_path) == ["fd", "density"] and by_path["fd"].evaluation.features == name
    assert [each.id for each in by_path.values()] == [each.id for each in from_hub.values()]
    path.unlink()
    done = evaluate(place, *wanted, "--features-weights", repository)
    assert isinstance(done.exception, UserError)
    assert f"{repository} is not a file and was not fetched from the hub" in str(done.exception)
    with torch.device("meta"):
        assert len(vit.VisionTransformer(vit_spec.SHAPES[name]).blocks) == 1  # the small one was used
