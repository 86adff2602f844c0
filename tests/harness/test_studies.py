"""Studies: files read and refused, runs and their commands, and launchers that are killed."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from harness.cli import plan
from harness.cli.run import command as run_command
from harness.cli.train import command as train_command
from harness.data.digits import load as digits
from harness.errors import Refusal
from harness.studies import from_dict, jobs, load
from harness.studies.expand import expand
from harness.studies.local import Launcher
from harness.studies.state import overview

STUDY = """
protocol = "digits"
backbones = ["dit-xs-4", "dit-xs-2"]
seeds = [0, 3]
budgets = { match = ["dit-xs-4@60", "dit-xs-4@0.6k"] }
evaluate_at = [7]
precision = "float32"

[sampling]
steps = [5, 2]
guidance_scales = [1, 1.5]
samples = 200
sampler = "ddim"

[recipe]
batch = 16
ema_ramp = false

[backbone.dit-xs-2]
learning_rate = 3e-4
"""


@pytest.fixture
def study(tmp_path):
    path = tmp_path / "both.toml"
    path.write_text(STUDY)
    return load(path)


def test_runs_are_seeds_by_backbones_and_each_command_asks_for_what_was_expanded(study):
    expansion = expand(study)
    assert expansion.runs == expand(study).runs
    assert [(each.spec.backbone, each.spec.seed) for each in expansion.runs] == [
        ("dit-xs-4", 0), ("dit-xs-2", 0), ("dit-xs-4", 3), ("dit-xs-2", 3),
    ]  # fmt: skip
    assert len({each.name for each in expansion.runs}) == 4
    for run in expansion.runs:
        assert [each.sampling.guidance_scale for each in run.requests] == [1, 1.5]
        for request, (program, verb, *words) in zip(run.requests, run.commands, strict=True):
            assert (program, verb) == ("harness", "run")
            options = run_command.make_context("run", list(words)).params  # as the command line would read it
            asked = plan.request_of(options)
            assert asked == request
            assert sorted({*options["evaluate_at"], asked.recipe.steps}) == list(run.marks)
            assert options["precision"] == "float32" and options["reports"] is False and options["out"] is None
            assert (asked.samples, asked.sampling.steps, asked.recipe.ema_ramp) == (200, (2, 5), False)
            assert asked.recipe.learning_rate == (3e-4 if run.spec.backbone == "dit-xs-2" else 2e-3)


def test_before_anything_runs_all_is_to_do_and_nothing_is_written(study, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = overview(expand(study)).as_dict()
    assert found["counts"]["to do"] == len(found["runs"]) == 4
    (small, _, _, _) = found["runs"]
    assert small["sample_sets"] == 3 * 2 * 2 and small["sample_sets_done"] == small["steps_done"] == 0
    run = expand(study).runs[0]
    images = 200 * 3 * (2 + 5) * (1 + 2)  # samples, marks, sampler steps, guidance counted twice
    assert small["gflops_left"] == pytest.approx(run.gflops_step * 600 + run.requests[0].compute.gflops * images)
    assert found["gflops_left"] == pytest.approx(sum(row["gflops_left"] for row in found["runs"]))
    assert (found["seconds_left"], found["runs_of_unknown_speed"]) == (0, 4)
    assert small["commands"][0][:4] == ["harness", "run", "--backbone", "dit-xs-4"]
    assert [path.name for path in tmp_path.iterdir()] == ["both.toml"]


def test_budgets_spend_the_same(study):
    small, large = expand(study).runs[:2]
    assert small.marks == (7, 60, 600)
    assert large.marks[0] == 7
    for mark, matched in zip(small.marks[1:], large.marks[1:], strict=True):
        spent = matched * large.gflops_step / (mark * small.gflops_step)
        assert abs(spent - 1) <= 0.5 / matched

    def marks(budgets, recipes):
        data = {"protocol": "digits", "backbones": ["dit-xs-4", "dit-xs-2"], "budgets": budgets, "backbone": recipes}
        return [run.marks for run in expand(from_dict(data, Path("x.toml"))).runs]

    double = {"dit-xs-2": {"batch": 256}}  # the protocol's is 128
    assert marks({"images": ["128k", 256]}, double) == [(2, 1000), (1, 500)]
    assert marks({"steps": [5]}, double) == [(5,), (5,)]
    # What is matched is trained with its own batch, whoever is held against it.
    (_, (half,)), (_, (whole,)) = marks({"match": "dit-xs-4@800"}, double), marks({"match": "dit-xs-4@800"}, {})
    assert abs(half - whole / 2) <= 1
    gflops = 400 * small.gflops_step / 16 * 128
    assert marks({"gflops": gflops}, {})[0] == (400,)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("backbones =", "bakcbones =", "did you mean backbones"),
        ("seeds =", "seed =", "unknown item 'seed'; did you mean seeds"),
        ("[sampling]", "[samplig]", "did you mean sampling"),
        ("guidance_scales", "guidance_scale", "did you mean guidance_scales"),
        ('protocol = "digits"', "", "protocol is missing"),
        ('"digits"', '"digit"', "did you mean digits"),
        ('["dit-xs-4",', '["dit-xs4",', "did you mean dit-xs-4"),
        ('["dit-xs-4",', '["dit-xs-2",', "'dit-xs-2' is named twice"),
        ('["dit-xs-4", "dit-xs-2"]', "[]", "the list is empty"),
        ("[0, 3]", "[0, -3]", "0 or more"),
        ("[0, 3]", "[true]", "whole number"),
        ("match =", "matched =", "did you mean match"),
        ("{ match", "{ steps = 5, match", "one of steps, images, gflops, match"),
        ("dit-xs-4@60", "dit-xs-4", "BACKBONE@STEPS"),
        ("dit-xs-4@60", "dit-xs4@60", "did you mean dit-xs-4"),
        ("evaluate_at = [7]", "evaluate_at = [700]", "beyond the 600 steps of dit-xs-4"),
        ("batch = 16", "btach = 16", "did you mean batch"),
        ("batch = 16", "batch = -16", "batch='-16' cannot be read as int"),
        ("batch = 16", "steps = 16", "budgets"),
        ("[backbone.dit-xs-2]", "[backbone.dit-s-2]", "backbone of this study 'dit-s-2'"),
        ("samples = 200", "samples = 20", "needs at least 100"),
        ("samples = 200", 'samples = "many"', "samples = 'many'"),
        ('"ddim"', '"ddmi"', "did you mean ddpm or ddim"),
        ("[1, 1.5]", "[0.5]", "below 1"),
        ("steps = [5, 2]", "steps = [5000]", "more than the 1000 steps"),
        ('protocol = "digits"', 'protocol = "digits"\nname = "../up"', "names a folder"),
        ("batch = 16", "batch = [16", "not valid TOML"),
        (
            "evaluate_at",
            'logger = "tensorbord"\nevaluate_at',
            "no logger has that name; there are tensorboard and wandb",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_named(old, new, message, tmp_path):
    assert STUDY.count(old) >= 1
    path = tmp_path / "odd.toml"
    path.write_text(STUDY.replace(old, new, 1))
    with pytest.raises(Refusal) as refused:
        expand(load(path))
    text = str(refused.value)
    assert message in text and "\n" not in text


def test_a_reason_is_the_last_thing_said(tmp_path):
    log = tmp_path / "log"
    log.write_text("$ harness run\nharness: old\n$ harness run\nTraceback\n  File\nValueError: a\tb\n")
    assert jobs.reason_of(log, 1) == "ValueError: a b"
    log.write_text("$ harness run\nmuch\nharness: the loss is not finite\nnotes\n")
    assert jobs.reason_of(log, 1) == "the loss is not finite"
    log.write_text("$ harness run\nharness: old\n$ harness run\n")
    assert jobs.reason_of(log, 3) == "exit code 3"
    assert "signal 9 (SIGKILL)" in jobs.reason_of(log, -9)


def test_who_was_told_to_stop_has_not_failed(tmp_path):
    log = tmp_path / "log"
    log.write_text("$ harness run\nharness: interrupted\n$ harness run\nharness: the disk is full\n")
    assert jobs.interrupted(log, 130) and jobs.interrupted(log, -15) and not jobs.interrupted(log, 1)
    log.write_text("$ torchrun -m harness run\nharness: interrupted\nTraceback\nChildFailedError:\n")
    assert jobs.interrupted(log, 1) and not jobs.interrupted(log, 0)


def test_several_processes_of_a_run_are_started_by_torchrun(study):
    expansion = expand(dataclasses.replace(study, processes=4))
    start = ("torchrun", "--standalone", "--nproc-per-node", "4", "-m", "harness", "run")
    assert [run.commands[0][:7] for run in expansion.runs] == [start] * 4
    assert [run.name for run in expansion.runs] == [run.name for run in expand(study).runs]


def test_torchrun_takes_no_option_of_ours_for_its_own():
    from torch.distributed.run import parse_args

    for command in (run_command, train_command):
        flags = [flag for each in command.params for flag in (*each.opts, *each.secondary_opts) if flag[:1] == "-"]
        for flag in flags:
            words = ["-m", "harness", command.name, flag, "value"]
            found = parse_args(["--standalone", "--nproc-per-node", "2", *words])
            assert (found.training_script, found.training_script_args) == ("harness", words[2:]), flag
    found = parse_args(["--nproc-per-node", "2", "-m", "--", "harness", "sample", "--run", "here"])  # as README says
    assert (found.training_script, found.training_script_args) == ("harness", ["sample", "--run", "here"])


@pytest.fixture
def launched(tmp_path, monkeypatch):
    """A function that launches a study of five seeds whose commands are stubs; what happens is appended to `said`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(jobs.PROGRAMS, "harness", "stub_command")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    data = {"protocol": "digits", "backbones": ["dit-xs-4"], "seeds": [9, 1, 2, 3, 4], "sampling": {"samples": 100}}
    study = expand(from_dict(data, Path("stub.toml")))

    def launch(processes, **options):
        said = []
        launcher = Launcher(
            study, processes=processes, say=said.append, draw=lambda found: None, **{"retry_failed": False, **options}
        )
        return launcher, launcher.launch(), said

    return launch


def during(condition, action, monkeypatch):
    """Do `action` once, from within the launcher's own loop, when `condition` holds."""
    sleep, done = time.sleep, []

    def watched(seconds):
        if not done and condition():
            done.append(True)
            action()
        sleep(min(seconds, 0.02))

    monkeypatch.setattr("harness.studies.local.time.sleep", watched)


def test_so_many_are_at_work_each_with_its_share_and_sigterm_reaches_all(launched, monkeypatch):
    begun = lambda: sorted(Path().glob("begun-*"))  # noqa: E731
    during(lambda: len(begun()) == 2, lambda: os.kill(os.getpid(), signal.SIGTERM), monkeypatch)
    launcher, found, said = launched(2)
    assert launcher.stopping == 1
    assert [path.name for path in begun()] == ["begun-1", "begun-2"]  # two slots, and the first run has failed
    groups, *shares = zip(*(path.read_text().split() for path in begun()), strict=True)
    assert len({*groups, str(os.getpgid(0))}) == 3  # Ctrl-C at the terminal reaches none of them
    assert shares == [(str(max(1, os.cpu_count() // 2)),) * 2, ("5", "2")] or shares[1] == ("2", "5")
    assert [row.state for row in found.rows] == ["failed", "interrupted", "interrupted", "to do", "to do"]
    assert found.rows[0].reason == "nine is too many"
    assert "stopping: 2 at work write their checkpoints" in said


def test_a_failed_run_is_begun_again_when_asked_and_one_that_ends_without_samples_is_no_success(launched):
    for seed in range(1, 5):
        Path(f"end-{seed}").touch()
    _, found, _ = launched(4)
    reasons = [row.reason for row in found.rows]
    assert reasons == ["nine is too many"] + ["ended without an error, but 3 sample sets are not there"] * 4
    assert launched(4)[2] == []
    said = launched(4, retry_failed=True)[2]
    assert sum(text.startswith("started") for text in said) == 5


def test_two_launchers_of_a_study_do_not_work_at_once(launched, monkeypatch):
    refused = []

    def second():
        with pytest.raises(Refusal, match="another `harness study` is at work on 'stub'"):
            launched(1)
        refused.append(True)
        os.kill(os.getpid(), signal.SIGTERM)

    during(lambda: Path("begun-1").exists(), second, monkeypatch)
    launched(1)
    assert refused


# ---- real processes ----

PROTOCOL = """
name = "few"
dataset = "npz"
resolution = 8
image_channels = 1
num_classes = 10
input_size = 8
in_channels = 1
samples = 100
suite = "embedded"

[recipe]
steps = 6
batch = 16
learning_rate = 1e-3
flip = false

[sampling]
steps = [2]
clip_denoised = true
"""
NETWORK = '''
"""A small network that breaks in its third forward pass of a run with one seed, while a file says so."""
import sys
from pathlib import Path
from torch import nn
from harness.spec import BackboneSpec

SPECS = (BackboneSpec(name="fragile", builders={"torch": "fragile_network:Net"}, null_label="num_classes", defaults={
    "input_size": 8, "in_channels": 1, "num_classes": 10, "out_channels": None}),)


class Net(nn.Module):
    calls = 0

    def __init__(self, *, input_size, in_channels, num_classes, out_channels):
        super().__init__()
        self.label = nn.Embedding(num_classes + 1, 8)
        self.enter, self.leave = nn.Conv2d(in_channels, 8, 3, padding=1), nn.Conv2d(8, out_channels, 3, padding=1)

    def forward(self, x, t, y):
        self.calls += 1
        broken = Path("broken")
        if "run" in sys.argv and broken.exists() and self.calls > 2:
            if sys.argv[sys.argv.index("--seed") + 1] == broken.read_text():
                raise RuntimeError("a screw is loose")
        return self.leave(self.enter(x) + self.label(y)[:, :, None, None])
'''
PROCESSES = """
name = "p"
protocol = "few.toml"
data = "few.npz"
backbones = {backbones}
seeds = {seeds}
budgets = {{ steps = {steps} }}
precision = "float32"
micro_batch = 16
"""


@pytest.fixture
def place(tmp_path):
    """A user's folder: a protocol with few images, and a plug-in whose network breaks for one seed."""
    found = digits()
    np.savez(tmp_path / "few.npz", arr_0=found.images[:150], arr_1=found.labels[:150])
    (tmp_path / "few.toml").write_text(PROTOCOL)
    information = tmp_path / "site" / "fragile-1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: fragile\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[harness.backbones]\nfragile = fragile_network:SPECS\n")
    (tmp_path / "site" / "fragile_network.py").write_text(NETWORK)
    return tmp_path


class Command:
    """`harness study study.toml ...` as a process in `place`."""

    def __init__(self, place, *words):
        self.said = place / "said.txt"
        environment = {**os.environ, "PYTHONPATH": str(place / "site"), "OMP_NUM_THREADS": "1"}
        with self.said.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "harness", "study", "study.toml", *words],
                cwd=place, env=environment, stdout=file, stderr=file,
            )  # fmt: skip

    def until(self, condition, seconds=240):
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.said.read_text()
            assert time.monotonic() < end, self.said.read_text()
            time.sleep(0.02)

    def ends(self, code, seconds=600):
        assert self.process.wait(seconds) == code, self.said.read_text()
        text = self.said.read_text()
        assert "Traceback" not in text
        return text


def status(place):
    return json.loads(Command(place, "--status", "--json").ends(0))


def logs(place):
    """How often each run was begun, by name."""
    found = (place / "runs" / "studies" / "p" / "logs").glob("*.log")
    return {path.stem: path.read_text().count("$ harness run") for path in found}


def steps(folder):
    return [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]


def check_a_killed_study(place, backbones, seeds, kills):
    """Runs the study with one run, the first, that breaks, killing the launcher `kills` times. Returns its name."""
    text = PROCESSES.format(backbones=json.dumps(backbones), seeds=json.dumps(seeds), steps=[3, 6])
    (place / "study.toml").write_text(text)
    (place / "broken").write_text(str(seeds[0]))
    bad, total = f"few-fragile-seed{seeds[0]}", len(backbones) * len(seeds)
    for kill in range(kills):
        command = Command(place)
        begun = kill * total // (kills + 1) + 2
        command.until(lambda begun=begun: len(logs(place)) >= begun)
        command.process.kill()  # with one at work, and the others of those begun behind it
        command.process.wait()
        assert len(logs(place)) == begun
        kept = contents(place)
        assert len(kept) >= begun - 2
    said = Command(place).ends(1)
    reason = "RuntimeError: a screw is loose"
    assert f"1 of {total} runs failed: {bad}: {reason} (log runs/studies/p/logs/{bad}.log)" in said
    assert "waiting few-" in said  # for what the killed launcher had started
    assert all(contents(place)[folder] == files for folder, files in kept.items())

    (failure,) = (place / "runs" / "studies" / "p" / "failures").iterdir()
    assert json.loads(failure.read_text())["reason"] == reason and failure.stem == bad
    assert len(contents(place)) == total - 1
    for name in contents(place):
        assert steps(place / "runs" / name) == [1, 2, 3, 4, 5, 6]
        assert len(list((place / "runs" / name).glob("samples/*/samples.npz"))) == 2
    assert logs(place) == dict.fromkeys(logs(place), 1) and len(logs(place)) == total  # nothing was begun twice
    report = (place / "runs" / "studies" / "p" / "report" / "table-few.csv").read_text().splitlines()
    assert len(report) == 1 + 2 * (total - 1)
    return bad


def contents(place):
    """Names and times of the files of the runs that are measured, by run."""
    return {
        records.parent.name: {path: path.stat().st_mtime_ns for path in records.parent.rglob("*") if path.is_file()}
        for records in (place / "runs").glob("few-*/records.jsonl")
        if len({json.loads(line)["sampling"]["samples_sha256"] for line in records.read_text().splitlines()}) == 2
    }


def test_a_study_of_three_whose_launcher_is_killed(place):
    check_a_killed_study(place, ["fragile"], [0, 1, 2], kills=1)


@pytest.mark.slow
def test_a_study_of_twelve_whose_launcher_is_killed_three_times_and_then_mended(place):
    bad = check_a_killed_study(place, ["fragile", "dit-xs-4", "dit-xs-2"], [0, 1, 2, 3], kills=3)
    kept = contents(place)
    assert len(kept) == 11
    found = status(place)
    assert {state: number for state, number in found["counts"].items() if number} == {"done": 11, "failed": 1}
    for row in found["runs"]:
        if row["name"] == bad:
            assert (row["reason"], row["sample_sets_done"]) == ("RuntimeError: a screw is loose", 0)
        else:
            assert row["sample_sets"] == row["sample_sets_done"] == 2 and row["steps_done"] == 6
            assert row["gflops_left"] == row["seconds_left"] == 0
    (place / "broken").unlink()
    assert "1 of 12 runs failed" in Command(place).ends(1)  # begun again only when that is asked for
    assert set(logs(place).values()) == {1}
    Command(place, "--retry-failed").ends(0)
    assert logs(place) == {**dict.fromkeys(logs(place), 1), bad: 2}
    assert status(place)["counts"]["done"] == 12
    assert all(contents(place)[folder] == files for folder, files in kept.items())


@pytest.mark.slow
def test_sigterm_reaches_the_runs_which_write_their_checkpoints(place, monkeypatch):
    text = PROCESSES.format(backbones='["dit-xs-4"]', seeds=[0], steps=[1_000_000])
    (place / "study.toml").write_text(text)
    log = place / "runs" / "few-dit-xs-4-seed0" / "log.jsonl"
    command = Command(place)
    command.until(lambda: log.exists() and log.stat().st_size > 1000)
    command.process.send_signal(signal.SIGTERM)
    assert "stopping: 1 at work" in command.ends(130)
    (checkpoint,) = log.parent.glob("checkpoints/step-*")
    assert int(checkpoint.name.removeprefix("step-")) == max(steps(log.parent)) > 0
    assert "stopping: writing a checkpoint" in (log.parents[1] / "studies/p/logs/few-dit-xs-4-seed0.log").read_text()
    assert not list((log.parents[1] / "studies" / "p").glob("failures/*"))
    monkeypatch.chdir(place)
    found = overview(expand(load(Path("study.toml"))))
    (row,) = found.rows
    assert (row.state, row.reason, row.steps_done) == ("interrupted", None, max(steps(log.parent)))
    assert found.seconds_left(row) > 0  # the checkpoint tells the speed
