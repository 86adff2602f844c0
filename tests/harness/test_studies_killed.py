"""A study of real processes: one run breaks, the launcher is killed and started again."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import few_digits
import pytest

from harness.studies import load
from harness.studies.expand import expand
from harness.studies.state import overview

NETWORK = '''
"""A small network that breaks in training, in its sixth pass of a run with one seed (the check before it has five), while a file says so."""
import sys
import time
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
        self.calls += self.training
        time.sleep(0.2 * self.training)  # so that a run is still at work when the next launcher looks
        while self.training and Path("hold").exists():
            time.sleep(0.05)
        broken = Path("broken")
        if "run" in sys.argv and broken.exists() and self.calls > 5:
            if sys.argv[sys.argv.index("--seed") + 1] == broken.read_text():
                raise RuntimeError("a screw is loose")
        condition = self.label(y) + t[:, None] / 1000
        return self.leave(self.enter(x) + condition[:, :, None, None])
'''
REASON = r"plug-in \S+ failed: RuntimeError: a screw is loose \(\S+\.py, line \d+\)"
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
    few_digits.write(tmp_path / "few.npz", 150)
    (tmp_path / "few.toml").write_text(few_digits.protocol("few", steps=2))
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
        hold = place / "hold"
        if kill == kills - 1 and backbones == ["fragile"]:  # the run at work waits for the next launcher
            hold.touch()
        command.process.kill()  # with one at work, and the others of those begun behind it
        command.process.wait()
        assert len(logs(place)) == begun
        kept = contents(place)
        assert len(kept) >= begun - 2
    command = Command(place)
    if hold.exists():
        command.until(lambda: "waiting few-" in command.said.read_text())
        hold.unlink()
    said = command.ends(1)
    (failure,) = (place / "runs" / "studies" / "p" / "failures").iterdir()
    reason = json.loads(failure.read_text())["reason"]
    assert re.match(REASON, reason) and failure.stem == bad
    assert f"1 of {total} runs failed: {bad}: {reason} (log runs/studies/p/logs/{bad}.log)" in said
    assert "waiting few-" in said  # for what the killed launcher had started
    assert all(contents(place)[folder] == files for folder, files in kept.items())

    assert len(contents(place)) == total - 1
    for name in contents(place):
        assert steps(place / "runs" / name) == [1, 2, 3, 4, 5, 6]
        assert len(list((place / "runs" / name).glob("samples/*/samples.npz"))) == 2
    assert logs(place) == dict.fromkeys(logs(place), 1) and len(logs(place)) == total  # nothing was begun twice
    text = (place / "runs" / "studies" / "p" / "report" / "table-few.csv").read_text()
    report = [line for line in text.splitlines() if not re.search(r"over \d+ training seeds", line)]  # of single runs
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
            assert re.match(REASON, row["reason"]) and row["sample_sets_done"] == 0
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
    assert "stopping: 1 process" in command.ends(130)
    (checkpoint,) = log.parent.glob("checkpoints/step-*")
    assert int(checkpoint.name.removeprefix("step-")) == max(steps(log.parent)) > 0
    assert "stopping: writing a checkpoint" in (log.parents[1] / "studies/p/logs/few-dit-xs-4-seed0.log").read_text()
    assert not list((log.parents[1] / "studies" / "p").glob("failures/*"))
    monkeypatch.chdir(place)
    found = overview(expand(load(Path("study.toml"))))
    (row,) = found.rows
    assert (row.state, row.reason, row.steps_done) == ("interrupted", None, max(steps(log.parent)))
    assert found.seconds_left(row) > 0  # the checkpoint tells the speed
