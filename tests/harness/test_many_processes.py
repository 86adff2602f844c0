"""One process and several, started by torchrun or by hand: the same run, also when a process dies."""

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import many_processes
import numpy as np
import psutil
import pytest
from command_process import start, started
from safetensors.numpy import load_file

from harness.distributed.group import SINGLE_PROCESS
from harness.distributed.launch import LaunchInfo, is_distributed, is_main_process, read_launch
from harness.engines.torch import process_group
from harness.errors import UserError
from harness.runs.samples import read_samples, read_sidecar
from results.store import load

MINUTE = 60


def environments(count):
    """The environment variables of `count` processes that are started by hand."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**shared, "RANK": str(number)} for number in range(count)]


def ended(processes, seconds=5 * MINUTE):
    """Their exit codes."""
    for process in processes:
        process.join(seconds)
    return [process.exitcode for process in processes]


def begin(folder, count, steps, meshes):
    """Processes that train and sample on each mesh."""
    folder.mkdir(parents=True, exist_ok=True)
    launched = environments(count) if count > 1 else [{}]
    return [started(many_processes.main, str(folder), steps, meshes, each) for each in launched]


def complete(processes, folder):
    assert ended(processes) == [0] * len(processes), "\n".join(path.read_text() for path in folder.glob("output-*"))


def losses(folder):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return np.array([[row["mse"], row["vb"]] for row in rows])


def assert_same_run(one, other):
    """Losses within 1e-5, of images less than 1 % of the pixels another and by one grey level."""
    np.testing.assert_allclose(losses(other), losses(one), rtol=1e-5)
    for width in (None, 0.075):
        first, second = (read_samples(samples(each, width)).images.astype(int) for each in (one, other))
        apart = np.abs(first - second)
        assert len(first) == many_processes.SAMPLES and first.std() > 10
        assert apart.max() <= 1 and (apart > 0).mean() < 0.01


def samples(folder, width=None):
    """Those of the last step, of the EMA or of a reconstructed width."""
    step_of = lambda path: int(re.match(r"step(\d+)-", path.parent.name)[1])  # noqa: E731
    width_of = lambda path: read_sidecar(path)["identity"]["sampling"].get("ema_width")  # noqa: E731
    return max((path for path in folder.glob("samples/*/samples.npz") if width_of(path) == width), key=step_of)


def held(folder, count):
    return [int((folder / f"held-{index}.txt").read_text()) for index in range(count)]


STEPS = 50
EMA = f"snapshots/step-{STEPS:08d}/ema.safetensors"
POSTHOC = [f"posthoc/step-{step:08d}/ema-{width}.safetensors" for step in (STEPS // 2, STEPS) for width in (0.05, 0.1)]
BOTH = ("2x1", "1x2")  # weights on every process, and divided


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The runs of two processes, undisturbed."""
    folder = tmp_path_factory.mktemp("two")
    complete(begin(folder, 2, STEPS, BOTH), folder)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    complete(begin(folder, 1, STEPS, ["1x1"]), folder)
    return folder / "1x1"


def test_two_processes_make_the_run_of_one(alone, two):
    """Over 50 steps with accumulation, clipping and the ramp of the average; and weights are really sharded."""
    assert len(np.unique(losses(alone))) == 2 * STEPS
    for mesh, file in itertools.product(BOTH, (EMA, *POSTHOC)):
        assert_same_run(alone, two / mesh)
        average, other = load_file(alone / file), load_file(two / mesh / file)
        assert average.keys() == other.keys()
        apart, size = (
            np.sqrt(sum(np.square(each).sum() for each in values))
            for values in ([other[name] - average[name] for name in average], average.values())
        )
        assert apart < 1e-4 * size  # the keys' biases have no gradient but rounding, which AdamW makes steps of
    (whole,) = held(alone, 1)
    assert held(two / "2x1", 2) == [whole, whole]
    parts = held(two / "1x2", 2)
    assert sum(parts) == whole and max(parts) < 0.55 * whole


def test_the_number_of_processes_may_change(alone, tmp_path):
    """Begun by two with weights divided, continued by one."""
    complete(begin(tmp_path, 2, 10, ["run=1x2"]), tmp_path)
    complete(begin(tmp_path, 1, 20, ["run=1x1"]), tmp_path)
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(alone)[:20], rtol=1e-5)


@pytest.mark.slow
def test_four_processes(alone, tmp_path):
    """The run of one on every mesh; and begun by two, continued by four and then by one."""
    meshes = ("4x1", "2x2", "1x4")
    complete(begin(tmp_path, 4, STEPS, meshes), tmp_path)
    for mesh in meshes:
        assert_same_run(alone, tmp_path / mesh)
    for count, steps, mesh in ((2, 15, "2x1"), (4, 30, "2x2"), (1, STEPS, "1x1")):
        complete(begin(tmp_path, count, steps, [f"run={mesh}"]), tmp_path)
    assert_same_run(alone, tmp_path / "run")
    killed = tmp_path / "killed"
    processes = begin(killed, 4, STEPS, ["4x1"])  # where buckets of gradients decide the order of sums
    while not list(killed.glob("4x1/checkpoints/step-*[0-9]/state.json")):
        processes[0].join(0.02)
    processes[2].kill()
    assert ended(processes, MINUTE) == [1, 1, -signal.SIGKILL, 1]
    said = [(killed / f"output-{index}.txt").read_text() for index in range(4)]
    assert [text.count("process 2 of 4 is gone") for text in said] == [1, 0, 0, 0]  # only the main process prints
    complete(begin(killed, 4, STEPS, ["4x1"]), killed)
    assert (killed / "4x1/log.jsonl").read_bytes() == (tmp_path / "4x1/log.jsonl").read_bytes()


def test_metrics_of_features_that_two_processes_extracted(two, tmp_path):
    """The numbers of one process to the last bit. Each process extracts half, and no temporary file is left."""
    found, expected = (
        load([two / "records.jsonl"]).records,
        many_processes.measured(two / "2x1", tmp_path, SINGLE_PROCESS),
    )
    mine, theirs = (
        {each.metric: (each.value, each.low, each.high, each.n) for each in some} for some in (found, expected)
    )
    assert mine == theirs and len(mine) == len(found) == 2
    seen = [int((two / f"seen-{index}.txt").read_text()) for index in range(2)]
    assert sum(seen) == 1797 + many_processes.SAMPLES and abs(seen[0] - seen[1]) <= 20
    assert [path.name[:8] for path in (two / "cache").iterdir()] == ["features"]


def test_a_killed_process_ends_the_other_and_the_same_command_continues(two, tmp_path):
    """To the bytes of an undisturbed run. Only the watch notices either death."""

    def kill(mesh, victim):
        """Begin, and kill one of them after the first checkpoint on `mesh`."""
        for path in tmp_path.glob("output-*"):
            path.unlink()
        processes, until = begin(tmp_path, 2, STEPS, BOTH), time.monotonic() + 5 * MINUTE
        while not list(tmp_path.glob(f"{mesh}/checkpoints/step-*[0-9]/state.json")):
            processes[0].join(0.02)
            assert processes[0].exitcode is None and time.monotonic() < until, said(0)
        processes[victim].kill()
        killed, other = time.monotonic(), 1 - victim
        assert ended([processes[other]], MINUTE) == [1] and time.monotonic() - killed < MINUTE
        (line,) = [each for each in said(other).splitlines() if each.startswith("harness:")]
        assert f"process {victim} of 2 is gone" in line and line.endswith("continues from the last checkpoint")
        assert "Traceback" not in said(other) and not (tmp_path / mesh / "snapshots").exists()

    def said(index):
        return (tmp_path / f"output-{index}.txt").read_text()

    kill("2x1", 1)
    kill("1x2", 0)
    complete(begin(tmp_path, 2, STEPS, BOTH), tmp_path)
    for mesh in BOTH:
        for name in ("log.jsonl", EMA):
            assert (tmp_path / mesh / name).read_bytes() == (two / mesh / name).read_bytes(), (mesh, name)
        assert samples(tmp_path / mesh).read_bytes() == samples(two / mesh).read_bytes()


def test_the_command_line_under_torchrun(tmp_path):
    """One is killed: torchrun starts them again, and they go on to the losses of one process."""
    words = ["train", "--backbone", "dit-xs-4", "--steps", "20", "--precision", "float32", "--micro-batch", "2"]
    words += ["--set", "batch=4", "--set", "learning_rate=1e-4"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1", "-m"]
    with (tmp_path / "output.txt").open("w") as file:
        torchrun = subprocess.Popen(
            [*launch, "harness", *words, "--out", "run"], cwd=tmp_path, stdout=file, stderr=file
        )
        try:
            until = time.monotonic() + 3 * MINUTE
            while not (tmp_path / "run/log.jsonl").exists():
                assert torchrun.poll() is None and time.monotonic() < until, (tmp_path / "output.txt").read_text()
                time.sleep(0.02)
            victim = psutil.Process(torchrun.pid).children()[1]
            assert "harness" in victim.cmdline() and victim.environ()["RANK"] == "1"
            victim.kill()
            assert torchrun.wait(5 * MINUTE) == 0, (tmp_path / "output.txt").read_text()
        finally:
            torchrun.terminate()
    said = (tmp_path / "output.txt").read_text()
    assert said.count("process 1 of 2 is gone") == 1 and "Traceback" not in said
    assert said.count("trained to step 20") == 1  # only the main process prints
    resolved = json.loads((tmp_path / "run/run.json").read_text())["resolved"]
    assert (resolved["mesh"], resolved["device"], resolved["micro_batch"]) == ("2x1", "cpu", 2)

    one = tmp_path / "one"
    one.mkdir()
    process = start([*words, "--out", "run"], one, 0.2)
    assert ended([process]) == [0], (one / "output.txt").read_text()
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(one / "run"), rtol=1e-5)


def test_an_error_under_torchrun_is_printed_once(tmp_path):
    """By the main process, whose exit code is ours; torchrun's own is 1."""
    words = ["train", "--backbone", "dit-xs-4", "--steps", "1", "--mesh", "4x1", "--out", "run"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "harness", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=3 * MINUTE)
    assert done.returncode == 1
    (line,) = [each for each in done.stderr.splitlines() if each.startswith("harness:")]
    assert line.startswith("harness: --mesh 4x1 takes 4 processes, and 2 work here")
    root = done.stderr.partition("Root Cause")[2]  # of torchrun's report
    assert re.search(r"rank      : 0 .*\n  exitcode  : 2 .*\n.*\n  traceback : --mesh 4x1 takes 4 processes", root)
    assert set(re.findall(r"exitcode  : (-?\d+)", done.stderr)) == {"2"}
    assert "harness/cli" not in done.stderr  # no traceback of ours


SECOND = {"TORCHELASTIC_RUN_ID": "none", "RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "2"}


WAITING = """
import sys, time
from harness.cli import main
from harness.distributed import launch
sleep, seconds, sys.argv = time.sleep, float(sys.argv[1]), ["harness", *sys.argv[2:]]
launch.time.sleep = lambda _: (print("waits", flush=True), sleep(seconds))
main()
"""


@pytest.mark.parametrize("words", [["run"], ["run", "--backbone", "dit-xs2"]])
def test_another_process_prints_its_error_where_torchrun_does_not_end_it(words):
    """The error is then its own. If torchrun ends it, it prints nothing, and has the same exit code."""

    def launch(seconds):
        process = subprocess.Popen(
            [sys.executable, "-c", WAITING, str(seconds), *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **SECOND},
        )  # fmt: skip
        assert process.stdout.readline() == "waits\n"
        return process

    alone, killed = launch(0.01), launch(60)
    killed.send_signal(signal.SIGTERM)
    _, said = alone.communicate(timeout=MINUTE)
    assert alone.returncode == 2 and ("did you mean dit-xs-2" in said or "Missing option" in said)
    _, said = killed.communicate(timeout=MINUTE)
    assert (killed.returncode, said) == (2, "")


BY_HAND = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "2345"}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS_PER_NODE": "4",
    "MASTER_ADDR": "n0",
}


def test_the_launch_is_read_from_the_environment():
    assert read_launch(BY_HAND) == LaunchInfo(
        rank=1, world_size=2, local_rank=1, local_world_size=2, address="127.0.0.1", port=2345
    )
    torchrun = {**BY_HAND, "RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}
    assert read_launch(torchrun) == LaunchInfo(
        rank=9, world_size=16, local_rank=1, local_world_size=8, address="127.0.0.1", port=2345
    )
    assert read_launch({**torchrun, **SLURM}).rank == 9  # torchrun in a job of SLURM
    assert read_launch(SLURM) == LaunchInfo(
        rank=5, world_size=8, local_rank=1, local_world_size=4, address="n0", port=29500
    )
    ports = [read_launch({**SLURM, "SLURM_JOB_ID": job}).port for job in ("7", "8", "12345678")]
    assert len(set(ports)) == 3 and all(20_000 <= port < 29_500 for port in ports)
    assert read_launch({**SLURM, "SLURM_JOB_ID": "7", "MASTER_PORT": "1234"}).port == 1234
    assert is_distributed(BY_HAND) and is_distributed(SLURM)
    assert not is_main_process(SECOND) and is_main_process({**SECOND, "RANK": "0"})
    assert all(map(is_main_process, ({}, BY_HAND, SLURM)))  # no launcher ends these after rank 0: all of them print
    for alone in ({}, {"WORLD_SIZE": "1"}, {"SLURM_PROCID": "5", "SLURM_NTASKS": "8"}, {"MASTER_ADDR": "n0"}):
        assert not is_distributed(alone)


def test_the_network_interface_is_named_where_processes_are_on_several_machines(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert process_group._interface_hint(read_launch(BY_HAND)) == ""
    assert "GLOO_SOCKET_IFNAME" in (hint := process_group._interface_hint(read_launch(SLURM))) and "not set" in hint
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    assert process_group._interface_hint(read_launch(SLURM)).endswith("it is ib0")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"RANK": None}, "WORLD_SIZE=2 asks for several processes, and RANK is not set; start them with torchrun"),
        ({"MASTER_ADDR": None, "MASTER_PORT": None}, "MASTER_ADDR and MASTER_PORT are not set"),
        ({"RANK": "2"}, "RANK=2 should be a whole number from 0 to 1"),
        ({"RANK": "-1"}, "RANK=-1"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two should be 1 or more"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT=99999"),
    ],
)
def test_badly_set_variables_are_refused_in_one_line(changes, words):
    environment = {name: value for name, value in {**BY_HAND, **changes}.items() if value is not None}
    assert is_distributed(environment)
    with pytest.raises(UserError) as refused:
        read_launch(environment)
    assert words in str(refused.value) and len(str(refused.value).splitlines()) == 1
