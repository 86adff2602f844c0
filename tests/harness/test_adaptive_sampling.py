"""Runs and systems sampled by dopri5: counted evaluations in sidecar, record and table; resumed sets; refusals."""

import dataclasses
import json
import re

import numpy as np
import pytest
import tiny_suite
import torch
from click.testing import CliRunner

from backbones.dit.torch_model import DiT
from harness import registry
from harness.cli import group
from harness.data.digits import load
from harness.engines.torch.sampling import TorchChain
from harness.errors import UserError
from harness.runs.samples import write_samples
from reports.points import ALONG_SAMPLING, group_by_settings
from results.compare import differing
from results.experiments import ALONG_TRAINING, experiment_key
from results.records import Sampling, Training, from_json

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
batch = 16
learning_rate = 3e-3
ema_decay = 0.5
flip = false
objective = "velocity"
schedule = "flow"
[sampling]
steps = [4, 8]
sampler = "dopri5"
guidance_channels = "all"
"""
SYSTEM = """
name = "digits-ode"
protocol = "few-digits.toml"
[base]
backbone = "dit-xs-4"
sampler = "dopri5"
objective = "velocity"
schedule = "flow"
guidance_scale = 1.5
guidance_interval = "0.5-5"
arguments = { input_size = 8, in_channels = 1, num_classes = 10 }
"""
TASK = ("--backbone", "dit-xs-4", "--protocol", "few-digits.toml", "--data", "digits.npz", "--device", "cpu")
FIXED = (*TASK, "--precision", "float32", "--micro-batch", "16", "--steps", "12")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with tiny_suite.registered():
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Some digits, a protocol of them, and a run of it in runs/, sampled as the protocol says."""
    path = tmp_path_factory.mktemp("adaptive")
    digits = load()
    write_samples(path / "digits.npz", [digits.images[:150]], digits.labels[:150], {})
    (path / "few-digits.toml").write_text(PROTOCOL)
    (path / "system.toml").write_text(SYSTEM)
    return path


@pytest.fixture(autouse=True)
def home(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def harness(*words, code=0):
    result = CliRunner().invoke(group, [str(each) for each in words])
    if code == 2:  # `harness.cli.main` prints it and exits with 2
        assert isinstance(result.exception, UserError), (result.exception, result.output)
        return str(result.exception)
    assert result.exit_code == code, (result.exception, result.output)
    return result.stdout


@pytest.fixture(scope="module")
def run(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        harness("run", *FIXED, "--no-report", "--out", "run")
    return folder / "run"


def sidecar(path):
    return json.loads((path / "samples.json").read_text())


def counted(monkeypatch):
    """The network's calls, as the number of images of each."""
    images, forward = [], DiT.forward

    def counting(self, x, t, y):
        images.append(len(x))
        return forward(self, x, t, y)

    monkeypatch.setattr(DiT, "forward", counting)
    return images


@pytest.mark.parametrize("guidance", ["1", "1.5", "1.5@0.5-5"])
def test_the_network_is_asked_as_often_as_it_is_told(guidance, run, monkeypatch):
    """By sidecar, record and table, with guidance and its interval; 24 images in batches of 10."""
    images = counted(monkeypatch)
    out = harness("sample", "--run", run, "--samples", "24", "--cfg", guidance, "--batch", "10", "--sampling-seed", "1")
    scale, _, interval = guidance.partition("@")
    wanted = {"seed": 1, "guidance_scale": float(scale), "guidance_interval": interval or None}
    (path,) = (
        each.parent
        for each in run.glob("samples/*/samples.json")
        if {name: sidecar(each.parent)["identity"]["sampling"].get(name) for name in wanted} == wanted
    )
    assert path.name in out
    data = sidecar(path)
    sampling = data["record"]["sampling"]
    assert data["evaluations_mean"] == sampling["evaluations_mean"] == pytest.approx(sum(images) / 24)
    assert data["evaluations_max"] == sampling["evaluations_max"] >= sampling["evaluations_mean"] > 20
    assert "steps" not in sampling and "evaluations" not in sampling and "evaluations" not in data
    assert data["identity"]["sampling"]["steps"] is None
    assert re.fullmatch(r"step12-dopri5(-cfg[^-]*(-5)?)?-n24-[0-9a-f]{8}", path.name)
    gflops = data["record"]["gflops"]
    assert sampling["gflops_per_image"] == pytest.approx(gflops * sum(images) / 24)


def test_record_and_table(run):
    (line, *_) = [json.loads(each) for each in (run / "records.jsonl").read_text().splitlines()]
    sampling = line["sampling"]
    assert sampling["sampler"] == "dopri5" and "steps" not in sampling
    assert sampling["gflops_per_image"] == pytest.approx(line["gflops"] * sampling["evaluations_mean"])
    harness("report", "--results", run, "--out", "report")
    tables = "\n".join(path.read_text() for path in run.parent.glob("report/**/*.md"))
    assert f"adaptive ({sampling['evaluations_mean']:.4g} evaluations)" in tables


def test_a_set_that_was_half_drawn_is_continued(run, monkeypatch):
    """The same bytes and the same counts as of a set that was drawn at once."""
    words = ("sample", "--run", run, "--samples", "24", "--sampling-seed", "2", "--batch", "10")
    draw, drawn = TorchChain.draw, []

    def failing(self, index, labels, advance):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(index)
        return draw(self, index, labels, advance)

    monkeypatch.setattr(TorchChain, "draw", failing)
    CliRunner().invoke(group, [str(each) for each in words])
    (shards,) = run.glob("samples/*/shards")
    assert len(list(shards.glob("shard-*.npy"))) == len(list(shards.glob("evaluations-*.npy"))) == 2
    monkeypatch.setattr(TorchChain, "draw", draw)
    images = counted(monkeypatch)
    harness(*words)
    continued = sidecar(shards.parent)
    assert not shards.exists() and 0 < sum(images) < 24 * continued["evaluations_mean"]
    whole = run.parent / "kept"
    shards.parent.rename(whole)
    harness(*words)
    again = sidecar(shards.parent)
    assert again["sha256"] == continued["sha256"] and again["record"] == continued["record"]


def test_the_batch_changes_last_bits_alone(run):
    """Or, where these decide whether a step is accepted, what the tolerances leave open."""
    sets = []
    for batch in ("24", "5"):
        harness("sample", "--run", run, "--samples", "24", "--sampling-seed", "3", "--batch", batch)
        (path,) = (
            each
            for each in run.glob("samples/*/samples.json")
            if (json.loads(each.read_text())["identity"]["sampling"]["seed"], sidecar(each.parent)["identity"]["batch"])
            == (3, int(batch))
        )
        sets.append((sidecar(path.parent)["record"], np.load(path.with_suffix(".npz"))["arr_0"].astype(int)))
    (one, images), (other, others) = sets
    assert np.abs(images - others).max() <= 8 and np.abs(images - others).mean() < 0.5
    assert one["sampling"]["evaluations_mean"] == pytest.approx(other["sampling"]["evaluations_mean"], rel=0.15)


def test_seeds_are_one_setting(run):
    """Of one setting are records whose evaluations, and so Gflops of an image, differ from seed to seed."""
    record = from_json((run / "records.jsonl").read_text().splitlines()[0])
    assert record.sampling is not None and record.training is not None
    sampling = dataclasses.replace(
        record.sampling,
        evaluations_mean=31.5,
        evaluations_max=50,
        gflops_per_image=1.5,
        seed=7,
        samples_sha256="0" * 64,
    )
    other = dataclasses.replace(record, sampling=sampling, training=dataclasses.replace(record.training, seed=7))
    assert experiment_key(record) == experiment_key(other) and not differing(record, other)
    for along, part in ((ALONG_SAMPLING, Sampling), (ALONG_TRAINING, Training), ((), Sampling)):
        assert len(group_by_settings([record, other], along, part)) == 1
    ddpm = dataclasses.replace(record.sampling, evaluations_mean=None, evaluations_max=None, gflops_per_image=2.0)
    fixed = dataclasses.replace(record, sampling=ddpm)
    assert experiment_key(fixed) != experiment_key(dataclasses.replace(fixed, sampling=sampling))


def test_a_system_in_torch_and_jax(run):
    """Last bits now and then decide whether a step is accepted. Seen: 3 of 255 levels, and 4 % of the evaluations."""
    found = []
    for framework in ("torch", "jax"):
        words = (
            "--system",
            "system.toml",
            "--weights",
            f"base={run}",
            "--batch",
            "12",
            "--samples",
            "24",
            "--device",
            "cpu",
        )
        harness("sample", *words, "--framework", framework, "--out", framework)
        (path,) = (run.parent / framework).glob("*/samples.json")
        found.append((sidecar(path.parent), np.load(path.with_suffix(".npz"))["arr_0"].astype(int)))
    (of_torch, images), (of_jax, others) = found
    assert np.abs(images - others).max() <= 8 and np.abs(images - others).mean() < 0.5 and images.std() > 20
    means = [each["record"]["sampling"]["evaluations_mean"] for each in (of_torch, of_jax)]
    assert means[0] == pytest.approx(means[1], rel=0.15)


def test_a_run_in_jax(home, monkeypatch):
    spec = registry.backbones.get("dit-xs-4")
    narrow = {**spec.defaults, "depth": 2, "width": 48, "heads": 4}  # its evaluations take most of the time
    monkeypatch.setitem(registry.backbones._items, spec.name, dataclasses.replace(spec, defaults=narrow))
    harness("run", *FIXED, "--framework", "jax", "--no-report", "--out", "jax-run", "--cfg", "1.5")
    (line, *_) = [json.loads(each) for each in (home / "jax-run" / "records.jsonl").read_text().splitlines()]
    assert (
        line["framework"] == "jax" and line["sampling"]["evaluations_max"] >= line["sampling"]["evaluations_mean"] > 40
    )
    assert line["sampling"]["evaluations_max"] % 2 == 0  # with guidance everywhere


def test_a_plan_says_that_it_does_not_know():
    plan = json.loads(harness("plan", *FIXED, "--json"))
    (row,) = plan["sampling"]  # one set, though the protocol has two numbers of steps
    assert row["sampler"] == "dopri5" and row["steps"] is row["gflops"] is row["gflops_per_image"] is None
    assert "100 images by dopri5: Gflops are not known before sampling" in harness("plan", *FIXED)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("plan", *FIXED, "--sampling-steps", "5"), "chooses its own steps, so it makes one sample set"),
        (("plan", *FIXED, "--match-sampling", "dit-xs-2@4"), "of dopri5 are not known before sampling"),
        (("plan", *FIXED, "--spacing", "karras"), "chooses its own times"),
        (("plan", *FIXED, "--cfg", "1.5@1e9-2e9", "--set", "objective=epsilon-fixed"), "guides nothing"),
        (("plan", *FIXED, "--set", "objective=dit"), "linear is a table of the timesteps"),
        (("flops", "--sampling", "sit-xl-2-256-ode"), "not known before sampling"),
        (("sample", "--system", "system.toml", "--weights", "base=run", "--sampling-steps", "9"), "leave out steps"),
        (("sample", "--run", "run", "--classes", "3", "--grid", "1x2", "--trajectory"), "every image has its own"),
    ],
)
def test_refusals(words, message, run):
    out = harness(*words, code=2)
    assert message in out and "Traceback" not in out and len(out.strip().splitlines()) <= 2
