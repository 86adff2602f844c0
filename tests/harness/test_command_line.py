"""The command line as a process: speed, exit codes, what goes to which stream."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import pytest
from click.testing import CliRunner

from harness import cli
from harness.cli import doctor, group
from harness.engines.memory import NotEnoughMemory
from harness.errors import UserError

FRAMEWORKS = ("torch", "jax", "flax", "tensorflow", "sklearn", "pandas", "matplotlib", "seaborn", "diffusers")


def harness(*words, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "harness", *map(str, words)], capture_output=True, text=True, cwd=cwd, timeout=120
    )


@pytest.mark.parametrize("words", [["--help"], ["list"], ["list", "--json"], ["flops", "dit-s-8"]])
def test_light_commands_load_no_framework(words):
    code = (
        "import sys, json\n"
        "from harness.cli import main\n"
        f"sys.argv = ['harness', *{words!r}]\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        f"print('LOADED', [name for name in {FRAMEWORKS!r} if name in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "LOADED []" in done.stderr


def processor_seconds(*words):
    """The best of three: the machine may be busy, the work is the same."""
    best = float("inf")
    for _ in range(3):
        before = os.times()
        assert subprocess.run([sys.executable, *words], capture_output=True, timeout=120).returncode == 0
        after = os.times()
        best = min(best, after.children_user + after.children_system - before.children_user - before.children_system)
    return best


@pytest.mark.parametrize(("words", "most"), [(["--help"], 1), (["list"], 3)])  # measured: 0.5 and 1.9
def test_help_and_list_answer_in_little_processor_time(words, most):
    """In units of what Python takes to start with numpy, click and the list of entry points: no machine's seconds."""
    unit = processor_seconds("-c", "import numpy, click; from importlib import metadata; metadata.entry_points()")
    assert processor_seconds("-m", "harness", *words) < most * unit


def test_list_json_is_one_document():
    document = json.loads(harness("list", "--json").stdout)
    names = [row["name"] for row in document["backbones"]]
    assert "dit-xl-2" in names and len(names) == len(set(names)) >= 48
    assert {row["name"] for row in document["protocols"]} >= {"digits", "imagenet-256", "imagenet-512"}
    assert document["problems"] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run"], "Missing option '--backbone'"),
        (["rnu"], "did you mean run"),
        (["run", "--backbone", "dit-xs2"], "did you mean dit-xs-2"),
        (["run", "--backbone", "dit-xs-2", "--protocol", "digit"], "did you mean digits"),
        (["run", "--backbone", "dit-xs-2", "--steps", "many"], "'many' is not a count"),
        (["run", "--backbone", "dit-xs-2", "--set", "lr=1"], "unknown recipe item 'lr'"),
        (["run", "--backbone", "dit-xs-2", "--set", "learning_rate"], "NAME=VALUE"),
        (["run", "--backbone", "dit-xs-2", "--mesh", "2x1"], "--mesh 2x1 takes 2 processes, and 1 work here"),
        (["run", "--backbone", "dit-xs-2", "--cfg", "0.5"], "below 1"),
        (["run", "--backbone", "dit-xs-2", "--sampling-steps", "2000"], "more than the 1000 steps"),
        (["run", "--backbone", "dit-xs-2", "--samples", "50"], "needs at least 100"),
        (["run", "--backbone", "dit-xs-2", "--data", "/"], "takes no --data"),
        (["run", "--backbone", "dit-xs-2", "--cfg", "nan"], "guidance_scale must be a finite number"),
        (["run", "--backbone", "dit-xs-2", "--steps", "inf"], "'inf' is not a count"),
        (["run", "--backbone", "dit-xs-2", "--set", "beta1=1"], "beta1 must lie in [0, 1)"),
        (["run", "--backbone", "dit-xs-2", "--set", "warmup_steps=inf"], "cannot be read as int"),
        (["run", "--backbone", "dit-xs-2", "--steps", "9", "--evaluate-at", "10"], "beyond the last step"),
        (["sample", "--run", "nowhere"], "no run.json"),
        (["evaluate", "nowhere.npz"], "no sample set"),
        (["data", "reference", "nowhere", "--out", "r.npz", "--suite", "embedded"], "nowhere: no such file or folder"),
        (["compare", "nowhere", "nowhere"], "nowhere"),
        (["report", "--results", "nowhere"], "nowhere"),
        (["study", "nowhere.toml"], "study file nowhere.toml: No such file"),
    ],
)
def test_refusals_are_one_line_and_exit_with_2(words, message, tmp_path):
    done = harness(*words, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert [path for path in tmp_path.iterdir() if path.name != "runs"] == []


def test_a_protocol_without_its_data_prints_the_plan_and_the_missing_pieces(tmp_path):
    done = harness("run", "--backbone", "dit-xl-2", "--protocol", "imagenet-256", cwd=tmp_path)
    assert done.returncode == 2
    assert "674.83 M" in done.stderr and "118.64 a forward pass" in done.stderr and "400,000 steps" in done.stderr
    assert "data set 'imagenet'" in done.stderr and "suite 'adm'" in done.stderr
    assert "harness run --backbone dit-xl-2 --protocol digits --steps 400000" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_into_memory_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(group, "main", lambda **_: np.arange(9 * 10**14))
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = capsys.readouterr().err
    assert stopped.value.code == 1 and len(said.splitlines()) == 1
    assert said.startswith("harness: this machine has too little memory (Unable to allocate 6.39 PiB")


def planned(monkeypatch, measured, *words):
    monkeypatch.setattr("harness.pipeline.plan.get_backend", lambda framework: SimpleNamespace(measure=measured))
    return CliRunner().invoke(
        group, ["plan", "--backbone", "dit-xl-2", "--protocol", "imagenet-256", "--measure", *words]
    )


def test_a_plan_says_what_is_missing_before_it_measures_and_is_made_all_the_same(monkeypatch):
    """Data that are not there, then memory: whatever would stop the run has a line, and none of it stops the plan."""

    def measured(request, **options):
        click.echo("MEASURED")
        raise NotEnoughMemory("dit-xl-2 needs 16.8 GB on cpu")

    done = planned(monkeypatch, measured)
    assert done.exit_code == 0, done.exception
    lines = done.stdout.splitlines()
    (data,) = (number for number, line in enumerate(lines) if line.startswith("missing  data set 'imagenet'"))
    assert lines.index("  warmup_steps       0") < data < lines.index("MEASURED")
    assert lines[-1] == "missing  dit-xl-2 needs 16.8 GB on cpu"
    document = json.loads(planned(monkeypatch, measured, "--json").stdout.replace("MEASURED", ""))
    assert [lack[:8] for lack in document["missing"]] == ["data set", "dit-xl-2"] and document["measured"] is None
    assert document["training"]["steps"] == 400_000


def test_a_plan_measures_only_when_it_is_asked_to(monkeypatch):
    monkeypatch.setattr("harness.pipeline.plan.get_backend", lambda framework: pytest.fail("measured"))
    done = CliRunner().invoke(group, ["plan", "--backbone", "dit-xl-2", "--protocol", "imagenet-256"])
    assert done.exit_code == 0 and done.stdout.splitlines()[-1] == "memory and hours on this machine: --measure"


def test_a_plan_for_a_device_that_is_not_there_is_refused_behind_its_arithmetic(monkeypatch):
    def measured(request, **options):
        raise UserError("--device cuda:7 is not to be had here")

    done = planned(monkeypatch, measured)
    assert isinstance(done.exception, UserError) and "674.83 M" in done.stdout and "400,000 steps" in done.stdout


def test_a_folder_named_like_a_package_does_not_get_in_the_way(tmp_path):
    for name in ("results", "reports"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('a stranger')")
    assert "digits" in harness("list", "protocols", cwd=tmp_path).stdout


def test_a_package_in_the_way_is_named(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "__init__.py").write_text("")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import harness"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "another package named 'results'" in done.stderr and str(tmp_path) in done.stderr


def test_doctor_finds_what_the_main_job_needs():
    done = harness("doctor", "--json")
    assert done.returncode == 0, done.stdout
    findings = json.loads(done.stdout)["findings"]
    assert {finding["status"] for finding in findings} <= {"ok", "note"}
    assert any("efficientnet-lite0-96" in finding["what"] for finding in findings)
    assert all(finding["fix"] for finding in findings if finding["status"] == "note")


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (1.94, "1.9 times as fast as in float32"),
        (12.6, "13 times as fast as in float32"),
        (1.02, "as fast as in float32"),
        (0.5, "2.0 times slower than in float32"),
        (0.013, "77 times slower than in float32"),
    ],
)
def test_doctor_says_how_fast_bfloat16_is_in_words(ratio, words):
    assert doctor.relative_to_float32(ratio) == words


def test_doctor_says_what_it_is_at_and_loses_no_time_on_a_slow_product(monkeypatch):
    import torch

    notes, products = [], []

    class Slow:
        def __init__(self, dtype):
            self.dtype = dtype

        def __matmul__(self, other):
            products.append(self.dtype)
            now[0] += 60 if self.dtype is torch.bfloat16 else 0.01

    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr(torch, "ones", lambda *_, dtype: Slow(dtype))
    assert doctor._bfloat16_speed_ratio() == pytest.approx(0.01 / 60)
    assert products == [torch.float32] * doctor.PRODUCTS + [torch.bfloat16]

    for part in ("_torch", "_processor", "_features", "_plugins", "_optional"):
        monkeypatch.setattr(doctor, part, list)
    monkeypatch.setattr(doctor.Bar, "advance", lambda self, count=1, note=None: notes.append((count, note)))
    assert CliRunner().invoke(doctor.command).exit_code == 0
    assert sum(count for count, _ in notes) == 6 and notes[0] == (0, "the machine")


def test_sigterm_that_was_lost_counts_when_it_comes_again(monkeypatch):
    before, now = signal.getsignal(signal.SIGTERM), [5.0]
    monkeypatch.setattr(cli.time, "monotonic", lambda: now[0])
    with cli._terminable() as came:
        for wait, counts in ((0.0, True), (0.4, False), (0.4, False), (1.5, True)):
            now[0] += wait
            with pytest.raises(KeyboardInterrupt) if counts else contextlib.nullcontext():
                signal.raise_signal(signal.SIGTERM)
    assert len(came) == 2
    signal.raise_signal(signal.SIGTERM)  # while the command ends
    signal.signal(signal.SIGTERM, before)
    with cli._terminable():
        pass
    assert signal.getsignal(signal.SIGTERM) == before


def test_console_command_is_installed():
    command = Path(sys.executable).with_name("harness")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("harness, version 0.")
