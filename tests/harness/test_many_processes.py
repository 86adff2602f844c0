"""One process and several, of torchrun's or started by hand: the same run; and what becomes of it when one dies."""

import json
import socket
import time

import many_processes
import numpy as np
import pytest
from command_process import start, started

from harness.samples import read_samples

MINUTE = 60


def environments(count):
    """What each of `count` processes is told by who starts them by hand."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    told = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**told, "RANK": str(number)} for number in range(count)]


def ended(processes, seconds=300):
    """Their exit codes."""
    for process in processes:
        process.join(seconds)
    return [process.exitcode for process in processes]


def work(folder, count, steps, meshes):
    folder.mkdir(parents=True, exist_ok=True)
    told = environments(count) if count > 1 else [{}]
    processes = [started(many_processes.main, str(folder), steps, meshes, each) for each in told]
    assert ended(processes) == [0] * count, "\n".join(path.read_text() for path in folder.glob("output-*"))


def losses(folder):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return np.array([[row["mse"], row["vb"]] for row in rows])


def assert_same_run(one, other):
    """Losses within 1e-5, of images less than 1 % of the pixels another and by one grey level."""
    np.testing.assert_allclose(losses(other), losses(one), rtol=1e-5)
    first, second = (read_samples(next(each.glob("samples/*/samples.npz"))).images.astype(int) for each in (one, other))
    apart = np.abs(first - second)
    assert len(first) == many_processes.SAMPLES and first.std() > 10
    assert apart.max() <= 1 and (apart > 0).mean() < 0.01


def held(folder, count):
    return [int((folder / f"held-{index}.txt").read_text()) for index in range(count)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process: 100 steps, 64 samples."""
    folder = tmp_path_factory.mktemp("alone")
    work(folder, 1, 100, ["1x1"])
    return folder / "1x1"


def test_two_processes_make_the_run_of_one(alone, tmp_path):
    """Over 100 steps with accumulation, clipping and the average's ramp; weights divided or not."""
    work(tmp_path, 2, 100, ["2x1", "1x2"])
    assert len(np.unique(losses(alone))) == 200
    (whole,) = held(alone, 1)
    for mesh in ("2x1", "1x2"):
        assert_same_run(alone, tmp_path / mesh)
    assert held(tmp_path / "2x1", 2) == [whole, whole]
    parts = held(tmp_path / "1x2", 2)
    assert sum(parts) == whole and max(parts) < 0.55 * whole


TRAIN = [
    "train",
    "--backbone",
    "dit-xs-4",
    "--set",
    "batch=4",
    "--precision",
    "float32",
    "--micro-batch",
    "1",
    "--out",
    "run",
]
STEPS = 40


def by_hand(folder, words, count=2):
    """Processes of `harness WORDS`, each with an output of its own; a checkpoint every 0.2 s."""
    folder.mkdir(parents=True, exist_ok=True)
    told = enumerate(environments(count))
    return [start(words, folder, 0.2, each, f"output-{number}.txt") for number, each in told]


def said(folder, index):
    return (folder / f"output-{index}.txt").read_text()


def train(folder, mesh):
    return [*TRAIN, "--steps", STEPS, "--mesh", mesh]


def wait_for_checkpoint(folder, process):
    until = time.monotonic() + 5 * MINUTE
    while not list(folder.glob("run/checkpoints/step-*[0-9]/state.json")):
        process.join(0.02)
        assert process.exitcode is None and time.monotonic() < until, said(folder, 0)


def log(folder):
    return (folder / "run/log.jsonl").read_bytes()


@pytest.mark.parametrize(("mesh", "victim"), [("2x1", 1), ("1x2", 0)])
def test_a_killed_process_ends_the_others_and_the_same_command_continues(mesh, victim, tmp_path):
    """To the bytes of a run that nobody disturbed."""
    undisturbed, folder = tmp_path / "undisturbed", tmp_path / "killed"
    assert ended(by_hand(undisturbed, train(undisturbed, mesh))) == [0, 0], said(undisturbed, 0) + said(undisturbed, 1)
    assert len(log(undisturbed).splitlines()) == STEPS

    processes = by_hand(folder, train(folder, mesh))
    wait_for_checkpoint(folder, processes[0])
    processes[victim].kill()
    began, other = time.monotonic(), 1 - victim
    assert ended([processes[other]], MINUTE) == [1]
    assert time.monotonic() - began < MINUTE
    (line,) = [each for each in said(folder, other).splitlines() if each.startswith("harness:")]
    assert f"process {victim} of 2 is gone" in line and "the same command continues from the last checkpoint" in line
    assert "Traceback" not in said(folder, other) and not (folder / "run/snapshots").exists()

    assert ended(by_hand(folder, train(folder, mesh))) == [0, 0], said(folder, 0) + said(folder, 1)
    assert "continues from the checkpoint of step" in said(folder, 0)
    assert log(folder) == log(undisturbed)
    (mine,), (theirs,) = (list(each.glob("run/snapshots/*/ema.safetensors")) for each in (folder, undisturbed))
    assert mine.read_bytes() == theirs.read_bytes()
    assert said(folder, 1).count("trained to step") == 0  # one of them speaks
