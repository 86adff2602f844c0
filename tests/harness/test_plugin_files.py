"""`--plugin FILE.py`: a network, a metric and an objective in one file without packaging."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import few_digits
import pytest
from click.testing import CliRunner

from evaluators.suites import _estimates
from harness import registry
from harness.cli import group
from harness.errors import RunError, UserError
from harness.plugins import files
from harness.plugins.code import code_of_package
from harness.runs.run import open_run
from harness.studies import load
from harness.studies.expand import expand
from reports.report import table_files
from results import store

SOURCE = """
import torch
from harness.spec import BackboneSpec

class Tiny(torch.nn.Module):
    def __init__(self, *, input_size, in_channels, num_classes, out_channels):
        super().__init__()
        self.label = torch.nn.Embedding(num_classes + 1, 8)
        self.time = torch.nn.Linear(1, 8)
        self.into = torch.nn.Conv2d(in_channels, 8, 3, padding=1)
        self.out = torch.nn.Conv2d(8, out_channels or 2 * in_channels, 3, padding=1)
    def forward(self, x, t, y):
        c = self.label(y) + self.time(t[:, None].float() / 1000)
        return self.out(torch.nn.functional.silu(self.into(x) + c[:, :, None, None]))

BACKBONES = BackboneSpec(
    name="tiny-of-a-file", summary="two convolutions", null_label="num_classes", builders={"torch": f"{__name__}:Tiny"},
    defaults={"input_size": 8, "in_channels": 1, "num_classes": 10, "out_channels": None},
)
"""
WORDS = ("--protocol", "few.toml", "--data", "digits.npz")
TRAIN = ("--backbone", "tiny-of-a-file", *WORDS, "--precision", "float32", "--device", "cpu", "--micro-batch", "16")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    few_digits.write(folder / "digits.npz", 300)
    (folder / "few.toml").write_text(few_digits.protocol("few-digits", steps=3))
    (folder / "tiny.py").write_text(SOURCE)
    return folder


@pytest.fixture
def place(inputs, tmp_path, monkeypatch):
    """A user's folder, in which the process works."""
    for file in inputs.iterdir():
        shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def forget():
    """As in a new process, which knows no plug-in file."""
    for file in list(files._loaded):
        for each in registry.GROUPS.values():
            each.forget(file)
        del files._loaded[file]
    for name in [name for name in sys.modules if name.startswith("harness_plugin_")]:
        del sys.modules[name]


@pytest.fixture(autouse=True)
def forgotten():
    yield
    forget()


def harness(*words):
    """(exit code, stdout, stderr or the message of the error) of a command, as in a process of its own."""
    forget()
    done = CliRunner().invoke(group, list(map(str, words)))
    if isinstance(done.exception, UserError | RunError):
        return 2, done.stdout, str(done.exception)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exc_info
    return done.exit_code, done.stdout, done.stderr


def test_a_file_goes_all_the_way(place):
    plugin = ("--plugin", "tiny.py")
    assert harness("list", "backbones")[1].count("tiny-of-a-file") == 0
    code, out, said = harness("list", "backbones", *plugin)
    assert "two convolutions  [tiny.py]" in out
    assert said.count("\n") == 1 and "plug-in  tiny.py (sha256 " in said and ": backbone tiny-of-a-file" in said
    (row,) = json.loads(harness("flops", "tiny-of-a-file", "--json", *plugin)[1])["rows"]
    assert row["source"] == "traced" and round(row["gflops"] * 1e9) == 64 * (9 * 8 + 9 * 8 * 2) + 8
    assert json.loads(harness("plan", "--backbone", "tiny-of-a-file", "--json", *plugin)[1])["params"] == row["params"]

    code, out, said = harness("run", *TRAIN, "--out", "runs/one", "--no-report", *plugin)
    assert code == 0, said
    run = open_run(place / "runs" / "one")
    (samples,) = run.folder.glob("samples/*/samples.npz")
    record = json.loads(run.records.read_text().splitlines()[0])
    sha256 = registry.backbones.code("tiny-of-a-file").sha256
    assert run.identity["plugins"] == {"backbone": sha256}
    assert record["gflops_source"] == "traced"
    assert record["training"]["plugins_sha256"] == run.training_data["plugins_sha256"]
    assert record["environment"]["training_versions"]["tiny.py"] == sha256[:12]

    code, out, said = harness("sample", "--run", "runs/one", "--sampling-steps", "2")
    assert code == 2 and f"executed only if you name it: add --plugin {place / 'tiny.py'}" in said
    assert harness("sample", "--run", "runs/one", "--sampling-steps", "2", *plugin)[0] == 0
    assert len(list(run.folder.glob("samples/*/samples.npz"))) == 2
    assert harness("evaluate", samples, "--data", "digits.npz", *plugin)[0] == 0
    records = store.load([run.records]).records
    (place / "runs" / "two").mkdir()
    store.append(  # of another seed
        place / "runs" / "two" / "records.jsonl",
        [replace(each, training=replace(each.training, seed=1, checkpoint_sha256="0" * 64)) for each in records],
    )
    code, out, said = harness("compare", "runs/one", "runs/two", *plugin)
    assert code == 0 and "tiny-of-a-file" in out
    forget()  # records stand by themselves
    _, written = table_files(records, ["few-digits"])
    assert written["table-few-digits.csv"].count(b"tiny-of-a-file") >= 1
    assert b"Gflops are traced" in written["table-few-digits.md"]


def test_check_takes_the_file_itself(place):
    code, out, _ = harness("check", "tiny.py", "--json")
    (document,) = json.loads(out)
    assert code == 0 and (document["backbone"], document["from"]) == ("tiny-of-a-file", "tiny.py")
    Path("wrong.py").write_text(SOURCE.replace("self.into(x)", "self.into(x - x.mean(0))"))
    code, out, _ = harness("check", "wrong.py")
    assert code == 1 and "images do not depend on each other" in out


def test_a_run_does_not_go_on_under_changed_code(place):
    words = ("train", *TRAIN, "--plugin", "tiny.py", "--out")
    assert harness(*words, "run")[0] == 0
    Path("tiny.py").write_text(f"{SOURCE}# changed\n")
    code, _, said = harness(*words, "run", "--steps", "9")
    assert code == 2 and said.count("\n") == 0, said
    assert "run was trained with other code of its backbone (sha256 " in said and "than tiny.py (sha256 " in said
    code, _, said = harness("sample", "--run", "run", "--plugin", "tiny.py")
    assert code == 2 and "other code of its backbone" in said
    code, _, said = harness(*words, "forked", "--steps", "9", "--fork", "run")  # the way out, and it is recorded
    assert code == 0 and "forked from step 6" in said
    Path("tiny.py").write_text(SOURCE)
    assert harness(*words, "run", "--steps", "9")[0] == 0


def test_a_run_from_before_code_was_recorded_goes_on_and_keeps_its_identity(place):
    words = ("train", *TRAIN, "--plugin", "tiny.py", "--set", "learning_rate=2e-3", "--out", "run")
    assert harness(*words)[0] == 0
    document = json.loads(Path("run/run.json").read_text())
    del document["identity"]["plugins"], document["plugin_files"]
    Path("run/run.json").write_text(json.dumps(document))
    Path("tiny.py").write_text(f"{SOURCE}# changed\n")
    code, _, said = harness(*words, "--steps", "9")
    assert code == 0 and "run does not state the code of its backbone; it goes on with tiny.py (sha256 " in said
    assert json.loads(Path("run/run.json").read_text())["identity"] == document["identity"]


def test_changed_code_of_a_package_is_refused_as_that_of_a_file_is(place, monkeypatch):
    folder = place / "site" / "package_of_a_test"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "net.py").write_text(SOURCE.replace("tiny-of-a-file", "tiny-of-a-package"))
    monkeypatch.syspath_prepend(folder.parent)
    from package_of_a_test.net import BACKBONES  # type: ignore[import-not-found]

    registry.backbones.names()  # loaded, before what is there is copied
    monkeypatch.setattr(registry.backbones, "_items", {**registry.backbones._items})
    monkeypatch.setattr(registry.backbones, "_owners", {**registry.backbones._owners})
    monkeypatch.setattr(registry.backbones, "_codes", {**registry.backbones._codes})
    registry.backbones.register(
        BACKBONES, "some-package", lambda: code_of_package.__wrapped__("some-package", "package_of_a_test.net")
    )
    words = ("train", "--backbone", "tiny-of-a-package", *TRAIN[2:], "--out", "run")
    assert harness(*words)[0] == 0
    (folder / "notes.txt").write_text("no code")
    assert harness(*words, "--steps", "7")[0] == 0
    (folder / "kernel.cu").write_text("// changed")
    code, _, said = harness(*words, "--steps", "8")
    assert code == 2 and "trained with other code of its backbone" in said and "than some-package (sha256 " in said


def test_the_processes_of_a_study_load_the_file(place):
    text = 'protocol = "few.toml"\nbackbones = ["tiny-of-a-file"]\ndata = "digits.npz"\nprecision = "float32"\n'
    Path("study.toml").write_text(f'{text}device = "cpu"\nmicro_batch = 16\n')
    (run,) = expand(load(Path("study.toml")).with_plugins((Path("tiny.py"),))).runs
    code, _, said = harness(*run.commands[0][1:])  # what a launcher starts, here as in a process that knows no file
    assert code == 0 and "plug-in  tiny.py" in said, said
    code, out, _ = harness("study", "study.toml", "--status", "--json", "--plugin", "tiny.py")
    assert code == 0 and json.loads(out)["counts"]["done"] == 1
    Path("tiny.py").write_text(f"{SOURCE}# changed\n")
    (row,) = json.loads(harness("study", "study.toml", "--status", "--json", "--plugin", "tiny.py")[1])["runs"]
    assert row["state"] == "failed" and "other code of its backbone" in row["reason"]
    Path("study.toml").write_text(f"{text}processes = 2\n")
    (run,) = expand(load(Path("study.toml")).with_plugins((Path("tiny.py"),))).runs
    assert run.commands[0][:8] == (
        "torchrun",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "harness",
        "run",
        "--plugin",
    )
    Path("study.toml").write_text(f'{text}plugin = "tiny.py"\n')
    code, _, said = harness("study", "study.toml")
    assert code == 2 and "unknown item 'plugin'" in said  # a file that the user did not name is not executed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("BACKBONES = (", "SyntaxError: "),
        ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library' (mine.py, line 1)"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("SPECS = ()", "it has none of the attributes BACKBONES, PROTOCOLS"),
        ("BACKBONES = [1]", "mine.py: 1 has no name"),
        ("def BACKBONES():\n    return 1 / 0", "BACKBONES: ZeroDivisionError: division by zero (mine.py, line 2)"),
        (
            SOURCE.replace("tiny-of-a-file", "dit-xl-2"),
            "mine.py: the backbone name 'dit-xl-2' is taken by backbone-harness",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(text, message, place):
    if text is not None:
        Path("mine.py").write_text(text)
    code, _, said = harness("list", "--plugin", "mine.py")
    assert code == 2 and message in said and "\n" not in said, said
    assert not any("harness_plugin_mine" in name for name in sys.modules)
    assert "dit-xl-2" in harness("list", "backbones")[1]


BREAKS = """
from harness.diffusion.objectives import Objective, Target

def target(at, xp):
    if xp.__name__ in ("torch", "jax.numpy"):
        return {}["of training"]
    return Target(0.0, 1.0)

OBJECTIVES = Objective(name="breaks", target=target)
"""


@pytest.mark.parametrize("framework", ["torch", pytest.param("jax", marks=pytest.mark.slow)])
def test_what_fails_in_the_code_of_a_file_during_a_run_is_one_line(framework, place):
    Path("breaks.py").write_text(BREAKS)

    def train(**environment):
        words = ("train", "--plugin", "breaks.py", "--set", "objective=breaks", "--framework", framework, "--out", "r")
        command = (sys.executable, "-m", "harness", *words, "--backbone", "dit-3xs-4", *TRAIN[2:])
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})

    done = train()
    assert done.returncode == 1 and "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert "KeyError: 'of training' (breaks.py, line 6)" in line
    if framework == "torch":
        assert f"harness: plug-in {Path('breaks.py').resolve()} failed: " in line and "HARNESS_TRACEBACK=1" in line
    text = train(HARNESS_TRACEBACK="1").stderr
    assert 'return {}["of training"]' in text and text.splitlines()[-1] == line


WRONG_DATA = """
import numpy as np
from harness import ImageSet
from harness.data import DatasetSpec
from evaluators.metrics import Metric

def made(images=np.uint8, labels=np.int64):
    return ImageSet(name="wrong", images=np.zeros((20, 8, 8, 1), images), labels=np.zeros(20, labels))

def floats(folder):
    return made(np.float32)
def labels(folder):
    return made(labels=np.int32)
def fails(folder):
    return {}["x"]
def number(folder):
    return 3
def raises(inputs):
    raise ValueError("bad thing")
def half(inputs):
    return 0.5

DATASETS = tuple(
    DatasetSpec(name=f"wrong-{name}", summary="", loader=f"{__name__}:{name}", images=20)
    for name in ("floats", "labels", "fails", "number")
)
METRICS = tuple(
    Metric(key=name, direction="lower", minimum=20, paper="", compute=f"{__name__}:{name}") for name in ("raises", "half")
)
"""


def test_what_is_wrong_with_data_and_metrics_of_a_file_is_one_line(place):
    Path("wrong.py").write_text(WRONG_DATA)
    files.load_plugin(Path("wrong.py"))
    for name, message in {
        "floats": r"images are float32 \(20, 8, 8, 1\); they must be uint8 \(N, H, W, C\)",
        "labels": r"labels are int32 \(20,\); they must be int64 \(20,\)",
        "fails": r"'wrong-fails': its loader .*:fails failed: KeyError: 'x' \(wrong.py, line 15\)",
        "number": r"'wrong-number': its loader .*:number gave a int, not a harness.ImageSet",
    }.items():
        with pytest.raises(UserError, match=message):
            registry.datasets.get(f"wrong-{name}").load(None)
    for name, message in {
        "raises": r"metric raises of wrong.py: .*:raises failed: ValueError: bad thing \(wrong.py, line 19\)",
        "half": r"metric half of wrong.py: .*:half gave a float; it must give \{'half': evaluators.intervals.Estimate",
    }.items():
        with pytest.raises(UserError, match=message):
            _estimates(registry.metrics.get(name), None)


def test_a_changed_file_replaces_what_it_had_registered(place):
    first = files.load_plugin(Path("tiny.py"))
    assert files.load_plugin(Path("tiny.py")) == first
    Path("tiny.py").write_text(SOURCE.replace("two convolutions", "the same two"))
    assert files.load_plugin(Path("tiny.py")).sha256 != first.sha256
    assert registry.backbones.get("tiny-of-a-file").summary == "the same two"
    assert not list(place.rglob("*.pyc"))


METRIC = """
import numpy as np
from evaluators.intervals import Estimate
from evaluators.metrics import Metric

def compute(inputs):
    return {"colour": Estimate(value=FACTOR * 2.0, left_out=np.full(20, 2.0))}

METRICS = Metric(key="colour", direction="lower", minimum=1, paper="a test", compute=f"{__name__}:compute")
"""


def test_a_metric_of_changed_code_is_measured_anew_and_what_is_measured_already_is_said(place):
    from harness.data.digits import load as load_digits
    from harness.runs.samples import write_samples

    digits = load_digits()
    write_samples(place / "mine.npz", [digits.images[300:420]], digits.labels[300:420], {})
    (place / "mine.json").unlink()
    words = (
        "evaluate",
        "mine.npz",
        "--protocol",
        "few.toml",
        "--data",
        "digits.npz",
        "--json",
        "--plugin",
        "metric.py",
    )
    words += ("--suite", "efficientnet-lite0-96:fd,colour")

    def measured(factor):
        (place / "metric.py").write_text(METRIC.replace("FACTOR", str(factor)))
        code, out, said = harness(*words)
        assert code == 0, said
        values = {each["metric"]: each for each in json.loads(out)["records"]}
        assert "code_sha256" not in values["fd"]["evaluation"] and values["colour"]["evaluation"]["code_sha256"]
        return values["colour"]["value"], "already measured: mine.npz" in said

    assert measured(1) == (2.0, False)
    assert measured(1) == (2.0, True)
    assert measured(3) == (6.0, False)
    kept = store.load([place / "records.jsonl"]).records
    assert [each.value for each in kept if each.metric == "colour"] == [6.0]  # and both lines stay in the file
    assert (place / "records.jsonl").read_text().count('"metric":"colour"') == 2
    assert len([each for each in kept if each.metric == "fd"]) == 1
