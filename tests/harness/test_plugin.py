"""A third-party package, installed by pip and driven from the command line; and packages that are broken."""

import csv
import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import command_process
import few_digits
import numpy as np
import pytest

from harness import registry

EXAMPLE = Path(__file__).parents[1] / "plugin_example"
NAME, DISTRIBUTION = "convmixer-64-4", "backbone-harness-example"


def harness(*words, cwd, path=()):
    return command_process.run(words, cwd, path)


def from_nothing(*words, cwd, path=()):
    """The same in a new interpreter, as a user starts it."""
    here = (
        [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
    )  # of the tree under test, if it is not installed
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*path, *here])), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "harness", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=env,
        timeout=300,
    )


def pip_install(example, folder):
    """The folder below `folder` that pip installed a package into, to be put on the path."""
    source = shutil.copytree(example, folder / "source")  # the build leaves its own folders beside the sources
    words = [
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        folder / "site",
        source,
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, words)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "site"


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    """Where the example is installed: the test environment stays as it is."""
    return pip_install(EXAMPLE, tmp_path_factory.mktemp("plugin"))


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A user's folder: a protocol file and its images."""
    folder = tmp_path_factory.mktemp("place")
    few_digits.write(folder / "digits.npz", 300)
    (folder / "few.toml").write_text(few_digits.protocol("few-digits", steps=4))
    return folder


def strangers(folder, distribution, points, files=None):
    """What pip leaves on the path for a distribution with these entry points of the group of backbones."""
    information = folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    lines = "".join(f"{name} = {value}\n" for name, value in points.items())
    (information / "entry_points.txt").write_text(f"[harness.backbones]\n{lines}")
    for name, text in (files or {}).items():
        (folder / name).write_text(text)
    return folder


def test_the_example_is_listed_with_its_distribution_and_loads_no_framework(installed, tmp_path):
    done = from_nothing("list", "backbones", "--json", cwd=tmp_path, path=[installed])
    document = json.loads(done.stdout)
    (row,) = [row for row in document["backbones"] if row["name"] == NAME]
    assert (row["from"], row["kind"], row["frameworks"]) == (DISTRIBUTION, "denoiser", ["torch"])
    assert document["problems"] == []
    assert f"[{DISTRIBUTION}]" in harness("list", "backbones", cwd=tmp_path, path=[installed]).stdout
    without = json.loads(from_nothing("list", "backbones", "--json", cwd=tmp_path).stdout)
    assert NAME not in [row["name"] for row in without["backbones"]]  # or the fixture would show nothing
    code = "import sys, harness; harness.get_backbone(sys.argv[1]); sys.exit('torch' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(installed)}
    assert subprocess.run([sys.executable, "-c", code, NAME], env=env, cwd=tmp_path, timeout=60).returncode == 0


def test_its_compute_is_traced_and_marked(installed, tmp_path):
    done = harness("flops", NAME, "--json", cwd=tmp_path, path=[installed])
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["rows"]
    width, depth, cells, time, classes = 64, 4, 16 * 16, 64, 1000
    linear = time * width + width * width + depth * 2 * width * 2 * width
    convolution = cells * (4 * 4 * width + depth * (9 * width + width * width) + width * 8 * 4)
    norms = cells * depth * 2 * width
    assert row["name"] == NAME and "traced" in json.dumps(row)
    assert round(row["gflops"] * 1e9) == linear + convolution + norms
    blocks = depth * (width * 10 + width * width + width + 2 * (width + 1) * 2 * width)
    ends = 4 * 4 * width + width + (width + 1) * 8 * 4
    assert row["params"] == blocks + ends + (time + 1) * width + (width + 1) * width + (classes + 1) * width


def test_train_sample_evaluate_report_from_the_command_line(installed, place):
    words = ["--backbone", NAME, "--protocol", "few.toml", "--data", "digits.npz", "--out", "runs/mine"]
    done = harness("train", *words, "--precision", "float32", cwd=place, path=[installed])
    assert done.returncode == 0, done.stderr
    assert "traced" in done.stderr  # the plan marks where the figure comes from
    run = place / "runs" / "mine"
    assert len((run / "log.jsonl").read_text().splitlines()) == 6

    done = harness("sample", "--run", "runs/mine", "--cfg", "1.5", cwd=place, path=[installed])  # it has a null label
    assert done.returncode == 0, done.stderr
    (samples,) = run.glob("samples/*/samples.npz")
    with np.load(samples, allow_pickle=False) as archive:
        assert archive["arr_0"].dtype == np.uint8 and archive["arr_0"].shape == (100, 8, 8, 1)
        assert archive["arr_1"].dtype == np.int64 and archive["arr_1"].shape == (100,)

    done = harness("evaluate", samples, "--data", "digits.npz", "--json", cwd=place, path=[installed])
    assert done.returncode == 0, done.stderr
    records = json.loads(done.stdout)["records"]
    assert {record["metric"] for record in records} >= {"fd", "kid", "precision", "recall", "copies"}
    assert {record["system"] for record in records} == {NAME}
    assert all(record["n"] == 100 and record["params"] > 0 for record in records)

    done = harness("report", "--results", "runs", "--out", "report", cwd=place, path=[installed])
    assert done.returncode == 0, done.stderr
    assert NAME in done.stdout
    with (place / "report" / "table-few-digits.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert sum(NAME in row for row in rows) == 1
    assert (place / "report" / "figure-10.csv").read_text().count(NAME) >= 1

    # Records stand by themselves: a report needs the plug-in no more.
    done = harness("report", "--results", "runs", "--out", "again", cwd=place)
    assert done.returncode == 0, done.stderr
    assert (place / "again" / "table-few-digits.csv").read_bytes() == (
        place / "report" / "table-few-digits.csv"
    ).read_bytes()

    done = harness("sample", "--run", "runs/mine", cwd=place)  # the network it does need
    assert done.returncode == 2 and f"unknown backbone '{NAME}'" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("framework", ["torch", pytest.param("torch,jax", marks=pytest.mark.slow)])
def test_a_new_package_installs_passes_the_checks_and_trains(framework, place, tmp_path):
    done = harness("new", "my-mixer", "--framework", framework, "--out", tmp_path / "mine", cwd=tmp_path)
    assert done.returncode == 0 and "pip install -e" in done.stdout, done.stderr
    (tmp_path / "build").mkdir()
    site = pip_install(tmp_path / "mine", tmp_path / "build")
    done = harness("check", "my-mixer", "--protocol", "digits", "--json", cwd=place, path=[site])
    findings = json.loads(done.stdout)["findings"]
    assert done.returncode == 0, findings
    assert {each["framework"] for each in findings} >= set(framework.split(","))
    words = ["--protocol", "few.toml", "--data", "digits.npz", "--precision", "float32"]
    for each in framework.split(","):
        out = ["--framework", each, "--out", tmp_path / each]
        done = harness("train", "--backbone", "my-mixer", *words, *out, cwd=place, path=[site])
        assert done.returncode == 0, done.stderr
        assert len((tmp_path / each / "log.jsonl").read_text().splitlines()) == 6


def test_a_package_in_jax_alone_is_run_in_jax(tmp_path):
    done = harness("new", "only-jax", "--framework", "jax", cwd=tmp_path)
    assert done.stdout.endswith("harness run --backbone only-jax --framework jax\n"), done.stdout
    text = (tmp_path / "only-jax/README.md").read_text()
    assert text.count("harness run --backbone only-jax --framework jax ") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dit-xl-2"], "'dit-xl-2' is taken by backbone-harness"),
        (["2nd"], "cannot name a package"),
        (["../mine"], "cannot name a package"),
        (["mine", "--framework", "tensorflow"], "unknown framework 'tensorflow'"),
        (["mine", "--out", "."], "exists already"),
    ],
)
def test_what_new_refuses(words, message, tmp_path):
    done = harness("new", *words, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


WRONG = """
import torch
from harness.spec import BackboneSpec
DEFAULTS = {"input_size": 8, "in_channels": 1, "num_classes": 10, "out_channels": None}
SPECS = tuple(
    BackboneSpec(name=name, defaults=DEFAULTS, null_label="num_classes", builders={"torch": f"wrong:{address}"})
    for name, address in {"takes-nothing": "TakesNothing", "subtracts-the-batch": "SubtractsTheBatch"}.items()
)
class TakesNothing(torch.nn.Module):
    def __init__(self):
        super().__init__()
class SubtractsTheBatch(torch.nn.Module):
    def __init__(self, input_size, in_channels, num_classes, out_channels):
        super().__init__()
        self.label = torch.nn.Embedding(num_classes + 1, 1)
        self.out = torch.nn.Conv2d(in_channels, out_channels or 2 * in_channels, 1)
    def forward(self, x, t, y):
        condition = self.label(y)[:, :, None, None] + t[:, None, None, None] / 1000
        return self.out(x - x.mean(0) + condition)
"""


def test_wrong_networks_are_refused_before_the_first_step_and_stop_no_others(place, tmp_path):
    site = strangers(tmp_path / "site", "wrong-networks", {"wrong": "wrong:SPECS"}, {"wrong.py": WRONG})
    words = ["--protocol", "few.toml", "--data", "digits.npz", "--precision", "float32", "--out", tmp_path / "run"]
    for name, message in {
        "takes-nothing": "its builder failed: TypeError: ",
        "subtracts-the-batch": "fails the check 'images do not depend on each other'",
    }.items():
        done = harness("train", "--backbone", name, *words, cwd=place, path=[site])
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert not (tmp_path / "run").exists()
    done = harness("check", "subtracts-the-batch", "--json", cwd=place, path=[site])
    assert done.returncode == 1 and json.loads(done.stdout)["from"] == "wrong-networks"
    done = harness("flops", "--json", cwd=place, path=[site])
    document = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert [each["name"] for each in document["refused"]] == ["takes-nothing"]
    assert "subtracts-the-batch" in [row["name"] for row in document["rows"]]


def test_the_example_passes_the_conformance_suite(installed, tmp_path):
    done = harness("check", NAME, "--json", cwd=tmp_path, path=[installed])
    findings = json.loads(done.stdout)["findings"]
    assert done.returncode == 0 and len(findings) >= 14
    assert [each["check"] for each in findings if each["status"] == "note"] == ["compute"]  # it is traced


def test_what_the_example_refuses_is_one_line(installed, place):
    (place / "odd.toml").write_text((place / "few.toml").read_text().replace("= 8", "= 7"))
    done = harness(
        "train",
        "--backbone",
        NAME,
        "--protocol",
        "odd.toml",
        "--data",
        "digits.npz",
        "--out",
        "odd",
        cwd=place,
        path=[installed],
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "input_size 7 is not divisible by patch 2" in done.stderr
    assert not (place / "odd").exists()


BREAKAGE = {
    "import": ("no-such-library", "cannot_import:SPECS", "No module named 'no_such_library'"),
    "attribute": ("no-such-name", "lacks_specs:SPECS", "has no attribute 'SPECS'"),
    "duplicate": ("takes-a-name", "takes_a_name:SPECS", "'dit-xl-2' is taken by backbone-harness"),
    "exit": ("leaves", "leaves:SPECS", "SystemExit"),
}
MODULES = {
    "cannot_import.py": "import no_such_library\n",
    "lacks_specs.py": "",
    "takes_a_name.py": (
        "from harness.spec import BackboneSpec\n"
        "SPECS = (BackboneSpec(name='dit-xl-2', builders={'torch': 'nowhere:Nothing'}),)\n"
    ),
    "leaves.py": "raise SystemExit(3)\n",
}


@pytest.mark.parametrize("kind", BREAKAGE)
def test_a_broken_plug_in_is_named_and_stops_nothing(kind, installed, tmp_path):
    distribution, point, reason = BREAKAGE[kind]
    folder = strangers(tmp_path / "site", distribution, {"entry": point}, MODULES)
    done = harness("list", "backbones", "--json", cwd=tmp_path, path=[folder, installed])
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    (problem,) = document["problems"]
    assert problem["distribution"] == distribution and problem["entry_point"] == f"entry = {point}"
    assert reason in problem["reason"] and "\n" not in problem["reason"]
    rows = {row["name"]: row["from"] for row in document["backbones"]}
    assert rows[NAME] == DISTRIBUTION and rows["dit-xl-2"] == "backbone-harness"

    done = harness("list", "backbones", cwd=tmp_path, path=[folder, installed])
    assert done.returncode == 0 and NAME in done.stdout
    assert done.stderr.count("\n") == 1 and distribution in done.stderr and reason in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "group", ["protocols", "datasets", "samplers", "objectives", "features", "metrics", "suites", "systems"]
)
def test_an_item_of_another_type_is_named_and_stops_nothing(group, monkeypatch):
    """As a package with a dictionary where a Protocol, Metric, ... belongs; in this process, because nine take long."""
    wrong = type("Wrong", (), {"name": "wrong", "load": None})()
    point = metadata.EntryPoint("entry", "typing:Any", f"harness.{group}")
    load = type(point).load
    monkeypatch.setattr(type(point), "load", lambda self: wrong if self.value == "typing:Any" else load(self))
    installed_points = metadata.entry_points()
    points = SimpleNamespace(select=lambda group: [*installed_points.select(group=group), point])
    monkeypatch.setattr(registry, "_entry_points", lambda: points)
    old = getattr(registry, group)
    fresh = registry.Registry(old.group, old.noun)
    assert fresh.names() and "wrong" not in fresh
    (problem,) = fresh.problems
    assert problem.entry_point == "entry = typing:Any" and "'wrong' is a Wrong, not a " in problem.reason


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_an_objective_a_sampler_and_a_guidance_of_a_package(framework, place, tmp_path):
    """A package of two files brings all three; they train, sample and stand in the records under their names."""
    site = pip_install(EXAMPLE.parent / "plugin_objective", tmp_path)
    settings = [
        "--set",
        "objective=noise-minus-image",
        "--sampler",
        "restarted:0.50",
        "--sampling-steps",
        "3",
        "--cfg",
        "2:projected@0.1-30",
        "--device",
        "cpu",
    ]
    done = harness(
        "run", "--backbone", command_process.NARROW, "--protocol", "few.toml", "--data", "digits.npz", "--framework", framework,
        "--precision", "float32", "--micro-batch", "8", "--out", tmp_path / "run", "--no-report", *settings,
        cwd=place, path=[site],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "run" / "records.jsonl").read_text().splitlines()
    record = json.loads(lines[0])
    assert record["training"]["objective"] == "noise-minus-image"
    sampling = record["sampling"]
    # Of the three steps, at sigma 157, 3.4 and 0.01, only the second is guided.
    assert (sampling["sampler"], sampling["evaluations"]) == ("restarted:0.5", 4)
    assert (sampling["guidance_rule"], sampling["guidance_interval"]) == ("projected", "0.1-30")
    (samples,) = (tmp_path / "run" / "samples").iterdir()
    assert "-restarted_0.5-3-cfg2_projected@0.1-30-n" in samples.name
    side = json.loads((samples / "samples.json").read_text())
    assert side["identity"]["sampling"]["sampler"] == "restarted:0.5"
    # without the package, one line that names what is missing
    done = harness("plan", "--backbone", command_process.NARROW, "--protocol", "few.toml", *settings, cwd=place)
    assert done.returncode == 2 and "noise-minus-image" in done.stderr and "Traceback" not in done.stderr
