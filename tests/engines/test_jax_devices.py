"""One device and eight, one process and two: the same run."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from harness.runs.samples import read_samples

SCRIPT = Path(__file__).parent / "on_devices.py"


def start(devices, *arguments, **environment):
    flags = f"--xla_force_host_platform_device_count={devices}"
    fast = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    return subprocess.Popen(
        [sys.executable, SCRIPT, *map(str, arguments)], env={**os.environ, **fast, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def facts(process):
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    said = [line for line in out.splitlines() if not line.startswith("[Gloo]")]  # a library of jax's on a CPU
    return json.loads(said[-1]) if said else None


def losses(folder):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return np.array([[row["mse"], row["vb"]] for row in rows])


def images(folder):
    (path,) = folder.glob("samples/*/samples.npz")
    return read_samples(path).images.astype(int)


def assert_same_run(one, other):
    """Losses within 1e-5, images within a grey level."""
    np.testing.assert_allclose(losses(other), losses(one), rtol=1e-5)
    apart = np.abs(images(other) - images(one))
    assert images(one).std() > 10 and apart.max() <= 1 and (apart > 0).mean() < 0.01


@pytest.mark.parametrize("kind", ["dit", pytest.param("adm", marks=pytest.mark.slow)])
def test_eight_devices_make_the_run_of_one(kind, tmp_path):
    """And weights, averages and moments are really sharded."""
    meshes = ("1x1", "8x1", "2x4")
    held = facts(start(8, tmp_path, kind, 6, 0, *meshes))
    assert len(np.unique(losses(tmp_path / "1x1"))) == 12
    for mesh in meshes[1:]:
        assert_same_run(tmp_path / "1x1", tmp_path / mesh)
    one, all_eight, fourth = (np.array(held[mesh]) for mesh in meshes)
    whole = one[0]
    assert whole > 1e5 and (one[1:] == 0).all()
    assert (all_eight == whole).all()  # "data" divides batches, and weights are everywhere
    assert fourth.max() < 0.35 * whole and fourth.sum() < 2.8 * whole  # a fourth each, and what is too small to divide


def two(folder, steps, pause):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [
        start(
            1, folder, "dit", steps, pause, "2x1",
            JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(number), JAX_COORDINATOR_ADDRESS=address,
        )
        for number in range(2)
    ]  # fmt: skip


@pytest.mark.slow
def test_two_processes_train_one_run(tmp_path):
    """Killed after the first checkpoint, they continue; what comes of it is the run of one process."""
    killed = two(tmp_path / "two", 30, 0.1)
    began = time.monotonic()
    while not list(tmp_path.glob("two/2x1/checkpoints/step-*[0-9]/state.json")):
        assert time.monotonic() - began < 300 and killed[0].poll() is None, killed[0].communicate()
        time.sleep(0.02)
    for process in killed:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    before = (tmp_path / "two/2x1/log.jsonl").read_bytes()
    assert not (tmp_path / "two/2x1/snapshots").exists()

    main, other = two(tmp_path / "two", 30, 0)
    assert facts(main) and facts(other) is None  # only the main process prints
    log = (tmp_path / "two/2x1/log.jsonl").read_bytes()
    assert len(log.splitlines()) == 30 and before and log.splitlines()[0] == before.splitlines()[0]
    facts(start(1, tmp_path / "one", "dit", 30, 0, "1x1"))
    assert_same_run(tmp_path / "one/1x1", tmp_path / "two/2x1")
