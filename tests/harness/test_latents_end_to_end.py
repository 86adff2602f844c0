"""From a tree of JPEG files to a report: prepare, verify, encode, train, sample, decode, evaluate, each as its command."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from click.testing import CliRunner
from fake_imagenet import make_tree
from small_vae import save_vae

from harness.cli import group
from harness.data import latents
from harness.runs.samples import read_samples

TASK = """
name = "pictures-{side}"
dataset = "prepared"
resolution = {side}
num_classes = 10
space = "latents"
input_size = 8
in_channels = 4
samples = {samples}
suite = "embedded"
[recipe]
batch = 32
learning_rate = 1e-3
ema_decay = 0.99
[sampling]
steps = [{steps}]
guidance_channels = "all"
"""
ENCODE = ("data", "latents", "images", "--vae", "vae", "--device", "cpu", "--out")


def begin(home, per_class, side, samples, steps):
    """Files of the user: a tree of 10 classes, an autoencoder whose latents are 8x8, a protocol."""
    make_tree(home / "tree", [f"n{number:08d}" for number in range(10)], per_class, sides=(70, 120))
    save_vae(home / "vae", levels={64: 4, 32: 3}[side])
    (home / "task.toml").write_text(TASK.format(samples=samples, side=side, steps=steps))


def command(home, *words):
    with (home / "output.txt").open("a") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "harness", *map(str, words)], cwd=home, stdout=file, stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def in_process(home, *words):
    before = os.getcwd()  # noqa: PTH109
    os.chdir(home)
    try:
        done = CliRunner().invoke(group, [str(each) for each in words])
    finally:
        os.chdir(before)
    assert done.exit_code == 0, (done.exception, done.output)
    return done.output


def as_user(home, *words):
    assert command(home, *words).wait(3000) == 0, (home / "output.txt").read_text()[-3000:]
    return (home / "output.txt").read_text()


def journal(folder):
    """Chunks that a killed process had vouched for."""
    path = folder / "chunks.partial"
    return max(0, path.read_bytes().count(b"\n") - 1) if path.exists() else 0


def same_bytes(one, other):
    for name in ("latents.npy", "labels.npy"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert latents.load(one).meta.identity == latents.load(other).meta.identity
    assert sorted(each.name for each in one.iterdir()) == ["labels.npy", "latents.npy", "meta.json"]


def train_and_measure(home, call, steps):
    """The rest of the way; the samples."""
    words = ("--precision", "float32", "--micro-batch", "32", "--device", "cpu")
    task = ("--backbone", "dit-xs-2", "--protocol", "task.toml", "--data", "cache")
    call(home, "run", *task, "--steps", steps, "--out", "runs/one", *words)
    run = home / "runs" / "one"
    (path,) = run.glob("samples/*/samples.npz")
    records = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    assert {each["metric"] for each in records} >= {"fd", "precision", "recall", "copies"}
    assert all(each["sampling"]["decoder"].startswith("vae-") for each in records)
    assert path.with_name("grid.png").stat().st_size > 1000
    (table,) = (run.parent / "report").glob("table-pictures-*.md")
    assert "dit-xs-2" in table.read_text()
    return read_samples(path)


def test_two_hundred_and_sixty_files_become_a_report(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    begin(tmp_path, 26, 64, 100, 3)  # two chunks
    in_process(tmp_path, "data", "prepare", "pictures", "--from", "tree", "--out", "images", "--resolution", "64")
    assert "data set pictures: 260 images" in in_process(tmp_path, "data", "verify", "images")
    process = command(tmp_path, *ENCODE, "cache")
    while journal(tmp_path / "cache") < 1:
        assert process.poll() is None, (tmp_path / "output.txt").read_text()
        time.sleep(0.005)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    assert not (tmp_path / "cache" / "latents.npy").exists()
    assert journal(tmp_path / "cache") == 1
    in_process(tmp_path, *ENCODE, "cache")
    assert "latents 4x8x8 of 260 images of pictures" in in_process(tmp_path, "data", "verify", "cache")
    samples = train_and_measure(tmp_path, in_process, 3)
    assert samples.images.shape == (100, 64, 64, 3) and samples.images.std() > 5
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_ten_thousand_files_become_a_report_and_twenty_kills_cost_nothing(tmp_path):
    """As a user would. The kills come at random moments of the life of `harness data latents`, several in each."""
    begin(tmp_path, 1000, 32, 500, 25)
    as_user(tmp_path, "data", "prepare", "pictures", "--from", "tree", "--out", "images", "--resolution", "32")
    assert "data set pictures: 10,000 images" in as_user(tmp_path, "data", "verify", "images")
    began = time.monotonic()
    as_user(tmp_path, *ENCODE, "uninterrupted")
    whole, moments, kills, folders, kept = time.monotonic() - began, random.Random(5), 0, 1, []
    while kills < 20:
        out = tmp_path / f"cache-{folders}"
        before = journal(out)
        process = command(tmp_path, *ENCODE, out.name)
        try:
            assert process.wait(moments.uniform(0, 0.3) * whole) == 0
            same_bytes(out, tmp_path / "uninterrupted")
            folders += 1
        except subprocess.TimeoutExpired:
            process.kill()
            assert process.wait(60) == -signal.SIGKILL
            kills += 1
            kept.append(journal(out))
            assert kept[-1] >= before  # nothing that was whole is lost
    as_user(tmp_path, *ENCODE, f"cache-{folders}")
    same_bytes(tmp_path / f"cache-{folders}", tmp_path / "uninterrupted")
    (tmp_path / f"cache-{folders}").rename(tmp_path / "cache")
    print(f"encoding {whole:.0f} s; {kills} kills in {folders} caches, chunks kept at each: {kept}")
    assert "latents 4x8x8 of 10,000 images of pictures" in as_user(tmp_path, "data", "verify", "cache")
    samples = train_and_measure(tmp_path, as_user, 300)
    assert samples.images.shape == (500, 32, 32, 3)
    print(f"grid: {next(tmp_path.glob('runs/one/samples/*/grid.png'))}")
