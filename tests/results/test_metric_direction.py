"""Which way a metric is better: said once, by the metric, and believed by records, comparisons, tables and the page.

Most of the metrics here are a plug-in's, so that nothing can know them by name: `blur` is a distance, `charm` a score.
"""

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from harness import registry
from harness.cli import group
from harness.data.digits import load
from results.records import from_json, to_json

PLUGIN = '''
import numpy as np

from evaluators.features import Features, FeatureSpec
from evaluators.intervals import Estimate
from evaluators.metrics import METRICS, Metric
from evaluators.suites import Suite


def measure(evidence):
    """How much darker the samples are than the reference, and how bright they are."""
    bright = evidence.images.reshape(len(evidence.images), -1).mean(axis=1) / 255
    other = evidence.reference.images.mean() / 255
    blocks = np.unique(evidence.block)
    values = np.array([bright.mean(), *(bright[evidence.block != each].mean() for each in blocks)])
    blur = np.abs(other - values)
    return {
        "blur": Estimate(value=blur[0], left_out=blur[1:]),
        "charm": Estimate(value=values[0], left_out=values[1:]),
    }


class Pixels:
    def __init__(self, spec):
        self.name, self.dim, self.sha256, self.description = spec.name, spec.dim, "7" * 64, spec.description

    def __call__(self, images):
        return Features(pooled=images.reshape(len(images), -1)[:, :4].astype(np.float32), spatial=None)


def pixels(spec, device):
    return Pixels(spec)


FEATURES = FeatureSpec(
    name="four-pixels", dim=4, classes=None, input_size=8, loader="my_metrics:pixels", description="four pixels"
)
MINE = tuple(
    Metric(key=key, direction=direction, minimum=20, paper="ours", compute="my_metrics:measure")
    for key, direction in (("blur", "lower"), ("charm", "higher"))
)
SUITE = Suite(name="mine", version=1, features=FEATURES, metrics=(*MINE, METRICS["copies"]))
'''
POINTS = """[harness.metrics]
mine = my_metrics:MINE
[harness.features]
mine = my_metrics:FEATURES
[harness.suites]
mine = my_metrics:SUITE
"""
PROTOCOL = """
name = "few"
dataset = "npz"
resolution = 8
image_channels = 1
num_classes = 10
input_size = 8
in_channels = 1
samples = 100
suite = "mine"
"""
UP, DOWN = "\u2191", "\u2193"
DIRECTIONS = {"blur": False, "charm": True}


def harness(*words):
    result = CliRunner().invoke(group, [str(each) for each in words])
    assert result.exit_code == 0, (result.exception, result.output)
    return result.stdout


def payload(page):
    """The data of a page."""
    start = page.index("{", page.index('type="application/json"'))
    return json.JSONDecoder().raw_decode(page, start)[0]


@pytest.fixture
def lines(measured):
    """A function: the lines of a record file in which one system has these values, by metric; `said`: which way is better,
    by metric, of records that tell."""

    def make(system, seed=0, said=DIRECTIONS, **values):
        made = []
        for metric, value in values.items():
            record = measured(
                metric=metric, value=value, low=value - 0.01, high=value + 0.01, system=system, backbone=system,
                protocol="few", dataset="npz", n=100, higher_is_better=said.get(metric),
            )  # fmt: skip
            made.append(to_json(record) + "\n")
        return "".join(made)

    return make


@pytest.fixture
def sides(tmp_path, lines):
    """Two record files; A is the better one by both metrics. `said` as above."""

    def write(said=DIRECTIONS):
        for name, values in (("a", {"blur": 0.2, "charm": 0.8}), ("b", {"blur": 0.6, "charm": 0.4})):
            folder = tmp_path / name
            folder.mkdir()
            (folder / "records.jsonl").write_text(lines(f"model-{name}", said=said, **values))
        return tmp_path / "a", tmp_path / "b"

    return write


@pytest.fixture
def known(monkeypatch):
    """The metrics, in the registry of this process, as a plug-in's entry point puts them there."""
    from evaluators.metrics import Metric

    registry.metrics.names()
    for key, higher in DIRECTIONS.items():
        metric = Metric(
            key=key, direction="higher" if higher else "lower", minimum=20, paper="ours", compute="no:where"
        )
        monkeypatch.setitem(registry.metrics._items, key, metric)
        monkeypatch.setitem(registry.metrics._owners, key, "a plug-in")


def verdicts_of(a, b):
    return {row["metric"]: row["verdict"] for row in json.loads(harness("compare", a, b, "--json"))["rows"]}


def test_from_a_plug_in_to_the_page_a_distance_is_a_distance(tmp_path):
    """An installed package whose metrics are evaluated; once there are records, nobody needs the package."""
    site = tmp_path / "site"
    (site / "my_metrics-1.0.dist-info").mkdir(parents=True)
    (site / "my_metrics.py").write_text(PLUGIN)
    (site / "my_metrics-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: my-metrics\nVersion: 1.0\n"
    )
    (site / "my_metrics-1.0.dist-info" / "entry_points.txt").write_text(POINTS)
    (tmp_path / "few.toml").write_text(PROTOCOL)
    digits, labels = load().images, load().labels
    np.savez(tmp_path / "reference.npz", arr_0=digits[:200], arr_1=labels[:200])
    for name, share in (("a", 0.9), ("b", 0.5)):  # B is far darker than what it is judged by
        samples = (digits[200:400] * share).astype(np.uint8)
        np.savez(tmp_path / f"{name}.npz", arr_0=samples, arr_1=labels[200:400])
        done = subprocess.run(
            [sys.executable, "-m", "harness", "evaluate", f"{name}.npz", "--protocol", "few.toml", "--data",
             "reference.npz", "--name", f"model-{name}", "--out", f"{name}.jsonl"],
            cwd=tmp_path, capture_output=True, text=True, timeout=100,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    records = [json.loads(line) for name in "ab" for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    values = {(each["system"], each["metric"]): each["value"] for each in records}
    assert values["model-a", "blur"] < values["model-b", "blur"] - 0.05
    assert values["model-a", "charm"] > values["model-b", "charm"] + 0.05

    verdicts = verdicts_of(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert (verdicts["blur"], verdicts["charm"]) == ("win", "win")
    said = {each["metric"]: each.get("higher_is_better") for each in records}
    assert said == {"blur": False, "charm": True, "copies": False}


def test_a_record_says_which_way_is_better_and_is_the_same_record(lines):
    line = lines("model-a", blur=0.2).strip()
    record = from_json(line)
    assert record.higher_is_better is False
    assert to_json(record) == line
    (silent,) = (from_json(each) for each in lines("model-a", said={}, blur=0.2).splitlines())
    assert silent.higher_is_better is None
    assert (silent.id, silent.identity_sha256) == (record.id, record.identity_sha256)


def test_a_direction_that_is_no_truth_value_is_refused(lines):
    fields = json.loads(lines("model-a", blur=0.2))
    with pytest.raises(ValueError, match=r"Record\.higher_is_better: 1 is not a bool"):
        from_json(json.dumps({**fields, "higher_is_better": 1}))


def test_records_alone_say_who_wins(sides):
    assert verdicts_of(*sides()) == {"blur": "win", "charm": "win"}


def test_records_that_say_nothing_are_understood_by_the_metrics_that_are_installed(sides, known):
    """As in files that older versions have written."""
    assert verdicts_of(*sides(said={})) == {"blur": "win", "charm": "win"}


def test_nobody_wins_by_a_metric_of_which_nobody_knows_which_way_is_better(sides):
    assert verdicts_of(*sides(said={})) == {"blur": "unknown", "charm": "unknown"}


def test_a_record_is_believed_before_the_registry(sides, known):
    """Its value was measured by the definition that it names, whatever is installed under that key by now."""
    assert verdicts_of(*sides(said={"blur": True, "charm": False})) == {"blur": "loss", "charm": "loss"}


def test_tables_and_page_show_which_way_is_better(lines, known, undrawn, tmp_path):
    """Of metrics whose records tell (haze, wit), of a plug-in's that the registry knows, and of all that are built in."""
    told = {"haze": False, "wit": True}
    higher = told | DIRECTIONS | built_in()
    assert len(higher) >= 18
    for name, values in (("a", (0.8, 0.2)), ("b", (0.4, 0.6))):  # A is the better one by each
        text = lines(f"model-{name}", said=told, **{key: values[not up] for key, up in higher.items()})
        (tmp_path / f"{name}.jsonl").write_text(text)
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    assert verdicts_of(*files) == dict.fromkeys(higher, "win")

    out = tmp_path / "report"
    harness("report", "--results", files[0], "--results", files[1], "--protocol", "few", "--out", out)
    page = payload((out / "report.html").read_text())
    records = [json.loads(line) for line in files[0].read_text().splitlines()]
    by_id = {each["id"]: each["metric"] for each in page["records"]}
    titles = {each["metric"]: by_id[each["id"]] for each in records}
    assert {key: title[-1] for key, title in titles.items()} == {key: UP if up else DOWN for key, up in higher.items()}
    assert [titles[key] for key in ("blur", "charm", "haze", "wit")] == [
        f"blur{DOWN}", f"charm{UP}", f"haze{DOWN}", f"wit{UP}",
    ]  # fmt: skip

    table = [line for line in (out / "table-few.md").read_text().splitlines() if line.startswith("|")]
    rows = [[each.strip() for each in line.strip("|").split("|")] for line in table]
    (heading,) = (row for row in rows if titles["blur"] in row)
    (best,) = (row for row in rows if row[0] == "model-a")
    (worse,) = (row for row in rows if row[0] == "model-b")
    for key, title in titles.items():
        assert best[heading.index(title)].startswith("**"), key
        assert "**" not in worse[heading.index(title)], key

    with (out / "table-verdicts.csv").open(newline="", encoding="utf-8") as file:
        found = {(row["metric"], row["system"], row["verdict"]) for row in csv.DictReader(file)}
    assert found == {(key, "model-a", "win") for key in higher}


def built_in():
    """Whether higher is better, by metric, as the registry and the suites have it; they are one about each. Losses are lower."""
    found = {"loss_mse": False, "loss_vb": False}
    for metric in (*registry.metrics, *(each for suite in registry.suites for each in suite.metrics)):
        if metric.key in DIRECTIONS:
            continue
        assert found.setdefault(metric.key, metric.direction == "higher") == (metric.direction == "higher"), metric.key
    return found
