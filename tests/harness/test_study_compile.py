"""A study of runs with torch.compile: their sample sets are known as what they are, and a study file can ask for it."""

import json

import pytest
import tiny_suite
import torch
from click.testing import CliRunner

from harness.cli import group
from harness.data.digits import load
from harness.errors import UserError
from harness.runs.samples import write_samples

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # what torch imports of itself

PROTOCOL = """
name = "few-digits"
dataset = "npz"
resolution = 8
image_channels = 1
num_classes = 10
input_size = 8
in_channels = 1
samples = 100
suite = "tiny"
[recipe]
batch = 8
flip = false
[sampling]
steps = [2]
clip_denoised = true
"""
STUDY = """
protocol = "few-digits.toml"
backbones = ["dit-xs-4"]
budgets = { steps = [1] }
data = "digits.npz"
precision = "float32"
micro_batch = 8
device = "cpu"
"""


@pytest.fixture(autouse=True)
def compiled(tmp_path, monkeypatch):
    """The modules that were to be compiled, which takes no time and changes nothing; the machine needs no compiler."""
    modules = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: modules.append(module))
    compiler = tmp_path / "some++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    return modules


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Some digits, a protocol and a study of it, in the working directory."""
    monkeypatch.chdir(tmp_path)
    digits = load()
    write_samples(tmp_path / "digits.npz", [digits.images[:150]], digits.labels[:150], {})
    (tmp_path / "few-digits.toml").write_text(PROTOCOL)
    (tmp_path / "plain.toml").write_text(STUDY)
    (tmp_path / "compiled.toml").write_text(f'compile = "on"\n{STUDY}')
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with tiny_suite.registered():
        yield tmp_path
    torch.set_num_threads(before)


def invoke(*words):
    return CliRunner().invoke(group, [str(each) for each in words])


def harness(*words):
    result = invoke(*words)
    assert result.exit_code == 0, (result.exception, result.output)
    return result.stdout


def only_run(study):
    (run,) = json.loads(harness("study", study, "--status", "--json"))["runs"]
    return run


def sampled_with(home):
    """The item `compile` of each sample set's identity, as its sidecar has it."""
    sidecars = home.glob("runs/*/samples/*/samples.json")
    return [json.loads(path.read_text())["identity"]["sampling"].get("compile") for path in sidecars]


def test_a_run_that_was_created_with_compile_is_done_in_a_study_that_does_not_say_so(home, compiled):
    """As with precision and micro-batch: what a study leaves open is as the run was created."""
    ((_, *words),) = only_run("plain.toml")["commands"]
    harness(*words, "--compile", "on")
    assert sampled_with(home) == ["on"] and compiled
    run = only_run("plain.toml")
    assert (run["state"], run["sample_sets_done"], run["sample_sets"]) == ("done", 1, 1)
    assert "started" not in harness("study", "plain.toml")
    assert (home / "runs" / "studies" / "plain" / "report" / "report.html").exists()


def test_a_study_file_can_ask_for_compile(home, compiled):
    run = only_run("compiled.toml")
    ((program, *words),) = run["commands"]
    assert (program, words[words.index("--compile") + 1]) == ("harness", "on")
    assert run["name"] == only_run("plain.toml")["name"]  # how the arithmetic is done is no part of the experiment
    harness(*words)
    assert sampled_with(home) == ["on"] and compiled
    run = only_run("compiled.toml")
    assert (run["state"], run["sample_sets_done"], run["gflops_left"]) == ("done", 1, 0)


def test_samples_without_compile_are_no_samples_of_a_run_with_it(home):
    """What `harness sample` draws in another way stands beside the study's set and not in its place."""
    ((_, *words),) = only_run("plain.toml")["commands"]
    train = ["train", *(each for each in words[1:] if each != "--no-report")]
    harness(*train, "--compile", "on")
    folder = only_run("plain.toml")["folder"]
    harness("sample", "--run", folder, "--compile", "off")
    (plain,) = home.glob("runs/*/samples/*/samples.npz")
    harness("evaluate", plain, "--data", "digits.npz")
    run = only_run("plain.toml")
    assert (run["steps_done"], run["sample_sets_done"]) == (1, 0)
    harness(*words)
    assert sorted(map(str, sampled_with(home))) == ["None", "on"]
    assert only_run("plain.toml")["state"] == "done"


def test_a_way_of_compiling_that_there_is_not_is_refused_before_anything_runs(home):
    (home / "odd.toml").write_text(f'compile = "sometimes"\n{STUDY}')
    result = invoke("study", "odd.toml", "--status")
    assert isinstance(result.exception, UserError)
    text = str(result.exception)
    assert "compile = 'sometimes'" in text and "auto, on" in text and "\n" not in text
