"""`kill -9` and Ctrl-C at any instant, then the same command: the same bytes as without."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from command_process import NARROW, start

SETTINGS = ["--set", "batch=16", "--precision", "float32", "--micro-batch", "16"]
TRAIN = ["train", "--backbone", NARROW, *SETTINGS]
AS_USER = ["train", "--backbone", "dit-xs-4", *SETTINGS]
SAMPLE = ["sample", "--run", "run", "--sampling-steps", "10", "--batch", "16"]
OUT = ["--out", "run"]


def command(words, folder):
    """The process of the real command, as a user starts it."""
    with (folder / "output.txt").open("a") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "harness", *map(str, words)],
            cwd=folder, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def quick(words, folder):
    """The same without the seconds of loading, and with a checkpoint every 0.05 s, so that kills fall into writing one."""
    return start(words, folder, 0.05)


def ended(process, seconds):
    """The exit code (negative: the signal) of a process of either kind if it ends within `seconds`, else None."""
    if isinstance(process, subprocess.Popen):
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
    process.join(seconds)
    return process.exitcode


def completed(process, folder):
    code = ended(process, 300)
    assert code == 0, (code, (folder / "output.txt").read_text()[-2000:])


def killed_and_repeated(launch, words, fresh, whole_seconds, kills, seed, kept):
    """Kill `words` `kills` times at moments spread over its whole life, repeating it each time; then let it end.

    The moments of the last kill begin where something matches `kept`: on a busy machine the others may all come before.
    A process that ends before its moment has not been killed: the next folder from `fresh` is begun. Returns the
    folders, each with its output complete, and the names of what each kill had left half-made.
    """
    moments = random.Random(seed)
    folders, left = [fresh()], []
    while len(left) < kills:
        process, moment = launch(words, folders[-1]), moments.uniform(0.05, 0.9) * whole_seconds
        if len(left) == kills - 1:
            while not any(folders[-1].glob(kept)) and ended(process, 0.005) is None:
                pass
            moment *= 0.2  # of what is left
        if ended(process, moment) is None:
            process.kill()
        if ended(process, 60) == -signal.SIGKILL:
            left.append([path.name for path in folders[-1].rglob("*.partial")])
        else:  # before its moment, or in it
            completed(process, folders[-1])
            folders.append(fresh())
    completed(launch(words, folders[-1]), folders[-1])
    return folders, left


def timed(launch, words, folder):
    begin = time.monotonic()
    completed(launch(words, folder), folder)
    return time.monotonic() - begin


def losses(folder):
    return (folder / "run" / "log.jsonl").read_bytes()


def samples(folder):
    (path,) = folder.glob("run/samples/*/samples.npz")
    return path.read_bytes()


def fresh_folders(root):
    """A function that makes an empty folder each time."""
    count = iter(range(1000))

    def make():
        folder = root / f"{next(count)}"
        folder.mkdir(parents=True)
        return folder

    return make


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder of an uninterrupted run, seconds it took)."""
    folder = tmp_path_factory.mktemp("trained")
    quick(["list"], folder).join(60)  # the server itself takes its time
    return folder, timed(quick, [*TRAIN, *OUT, "--steps", STEPS], folder)


STEPS, COUNT = 60, 192
CHECKPOINT, SHARD = "run/checkpoints/step-*/state.json", "run/samples/*/shards/shard-*.npy"


def check_training(launch, reference, seconds, steps, kills, root, seed):
    words = [*(TRAIN if launch is quick else AS_USER), *OUT, "--steps", steps]
    folders, left = killed_and_repeated(launch, words, fresh_folders(root), seconds, kills, seed, CHECKPOINT)
    for folder in folders:
        assert losses(folder) == losses(reference)
        assert [json.loads(line)["step"] for line in losses(folder).splitlines()] == list(range(1, steps + 1))
        (snapshot,) = folder.glob("run/snapshots/*/ema.safetensors")
        assert snapshot.read_bytes() == next(reference.glob("run/snapshots/*/ema.safetensors")).read_bytes()
        assert list(folder.rglob("*.partial")) == []
    return folders, left


def check_sampling(launch, reference, count, kills, root, seed):
    """`reference` holds a trained run. Draws its samples uninterrupted first."""
    make = fresh_folders(root)

    def fresh():
        folder = make()
        shutil.copytree(reference / "run", folder / "run", ignore=shutil.ignore_patterns("samples", "checkpoints"))
        return folder

    words = [*SAMPLE, "--samples", count]
    whole = fresh()
    seconds = timed(launch, words, whole)
    folders, left = killed_and_repeated(launch, words, fresh, seconds, kills, seed, SHARD)
    for folder in folders:
        assert samples(folder) == samples(whole)
        assert list(folder.rglob("*.partial")) + list(folder.rglob("shards")) + list(folder.rglob("*.tmp")) == []
    return folders, left


def test_training_killed_three_times(trained, tmp_path):
    folder, seconds = trained
    folders, left = check_training(quick, folder, seconds, STEPS, 3, tmp_path, seed=2)
    assert len(left) == 3
    resumed = [text for each in folders if "continues from" in (text := (each / "output.txt").read_text())]
    assert resumed, "no kill came after a checkpoint: nothing was shown"


@pytest.mark.slow
def test_training_killed_twenty_times_also_within_a_checkpoint(trained, tmp_path):
    """A thread writes checkpoints one after the other here, so that many kills fall within one."""
    folder, seconds = trained
    folders, left = check_training(quick, folder, seconds, STEPS, 20, tmp_path, seed=6)
    within = [names for names in left if any(name.startswith("step-") for name in names)]
    resumes = sum((each / "output.txt").read_text().count("continues from the checkpoint") for each in folders)
    print(
        f"{len(left)} kills, {len(within)} within a checkpoint, {resumes} resumes, {len(folders)} runs, the same bytes"
    )
    assert len(left) == 20 and len(within) >= 3 and resumes >= 6


def test_killed_training_keeps_the_averages_of_all_widths(trained, tmp_path):
    """Saved after the same steps, with the same bytes; the rest of the run is that of a run without them."""
    folder, _ = trained
    words = [*TRAIN, *OUT, "--steps", STEPS, "--set", "ema_widths=0.05:0.10", "--set", "ema_snapshots=6"]
    whole = fresh_folders(tmp_path / "whole")()
    seconds = timed(quick, words, whole)
    averages = {path.relative_to(whole): path.read_bytes() for path in whole.glob("run/posthoc/*/*.safetensors")}
    assert len(averages) == 6 * 2
    folders, left = killed_and_repeated(quick, words, fresh_folders(tmp_path), seconds, 3, 5, CHECKPOINT)
    assert len(left) == 3
    for each in folders:
        assert losses(each) == losses(folder)
        found = {path.relative_to(each): path.read_bytes() for path in each.glob("run/posthoc/*/*.safetensors")}
        assert found == averages
        assert list(each.rglob("*.partial")) == []
    assert any("continues from" in (each / "output.txt").read_text() for each in folders)


def test_sampling_killed_three_times(trained, tmp_path):
    folder, _ = trained
    assert len(check_sampling(quick, folder, COUNT, 3, tmp_path, seed=1)[1]) == 3


def test_ctrl_c_writes_a_checkpoint_and_the_same_command_continues(trained, tmp_path):
    folder, _ = trained
    words = [*TRAIN, *OUT, "--steps", STEPS]
    process = quick(words, tmp_path)
    while not list(tmp_path.glob(CHECKPOINT)):
        assert ended(process, 0.005) is None, (tmp_path / "output.txt").read_text()
    os.kill(process.pid, signal.SIGINT)
    said = lambda: (tmp_path / "output.txt").read_text()  # noqa: E731
    assert ended(process, 60) == 130, said()
    checkpoint = max(tmp_path.glob("run/checkpoints/step-*"))
    step = json.loads((checkpoint / "state.json").read_text())["step"]
    assert 0 < step < STEPS
    assert len(losses(tmp_path).splitlines()) == step
    assert f"checkpoint of step {step}" in said() and "the same command continues" in said()
    assert "Traceback" not in said()
    completed(quick(words, tmp_path), tmp_path)
    assert f"continues from the checkpoint of step {step}" in said()
    assert losses(tmp_path) == losses(folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_before_the_training_begins_it_says_so(number, tmp_path):
    """While it loads and measures there is nothing to save."""
    process = command([*AS_USER[:3], "--steps", "9", *OUT], tmp_path)
    said = lambda: (tmp_path / "output.txt").read_text()  # noqa: E731
    while "parameters" not in said():
        assert ended(process, 0.01) is None, said()
    process.send_signal(number)
    assert ended(process, 60) == 130, said()
    assert said().splitlines()[-1] == "harness: interrupted" and "Traceback" not in said()
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kills", [10])
def test_the_real_command_killed_twenty_times(kills, tmp_path):
    """As a user would: nothing shortened, checkpoints as far apart as they are. `kills` in training, `kills` in sampling."""
    steps, count = 500, 2000
    reference = tmp_path / "reference"
    reference.mkdir()
    seconds = timed(command, [*AS_USER, *OUT, "--steps", steps], reference)
    trainings, in_training = check_training(command, reference, seconds, steps, kills, tmp_path / "training", seed=3)
    samplings, in_sampling = check_sampling(command, reference, count, kills, tmp_path / "sampling", seed=4)
    assert len(in_training) == len(in_sampling) == kills
    resumes = sum((each / "output.txt").read_text().count("continues from the checkpoint") for each in trainings)
    assert resumes >= kills // 3
    print(f"training {seconds:.0f} s: {kills} kills, {resumes} resumes, {len(trainings)} runs, half-made {in_training}")
    print(f"sampling: {kills} kills, {len(samplings)} sample sets, half-made {in_sampling}")
