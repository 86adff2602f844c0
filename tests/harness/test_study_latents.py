"""A study over a protocol in latents: what its own commands have made is found again, and it ends with every run done."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tiny_suite
import torch
from click.testing import CliRunner
from small_vae import save_vae

from harness.cli import group
from harness.studies import state

PROTOCOL = """
name = "latents-32"
dataset = "npz"
resolution = 32
num_classes = 10
space = "latents"
input_size = 4
in_channels = 4
samples = 100
suite = "tiny"
[recipe]
batch = 12
learning_rate = 1e-3
[sampling]
steps = [3]
guidance_channels = "all"
"""
STUDY = """
protocol = "latents-32.toml"
backbones = ["dit-xs-4"]
budgets = { steps = [1, 2] }
data = "cache"
precision = "float32"
micro_batch = 12
device = "cpu"
[sampling]
steps = [2]
"""


@pytest.fixture(scope="module", autouse=True)
def suite():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with tiny_suite.registered():
        yield
    torch.set_num_threads(before)


def harness(*words):
    result = CliRunner().invoke(group, [str(each) for each in words])
    assert result.exit_code == 0, (result.exception, result.output)
    return result


def status():
    return json.loads(harness("study", "small.toml", "--status", "--json").stdout)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Images, an autoencoder, a cache of their latents, a protocol and a study of it, in the working directory."""
    monkeypatch.chdir(tmp_path)
    coarse = np.random.default_rng(1).integers(0, 256, (60, 4, 4, 3))
    images = np.kron(coarse, np.ones((1, 8, 8, 1))).astype(np.uint8)
    np.savez("images.npz", arr_0=images, arr_1=np.arange(60) % 10)
    save_vae(tmp_path / "vae", scaling_factor=0.8, shift_factor=0.1)
    (tmp_path / "latents-32.toml").write_text(PROTOCOL)
    (tmp_path / "small.toml").write_text(STUDY)
    harness("data", "latents", "images.npz", "--vae", "vae", "--out", "cache", "--device", "cpu")
    return tmp_path


def test_a_study_over_latents_ends_with_every_run_done(home):
    (run,) = status()["runs"]
    assert (run["state"], run["sample_sets_done"], run["sample_sets"]) == ("to do", 0, 2)
    ((program, *words),) = run["commands"]
    assert program == "harness"
    harness(*words)
    after = status()
    (run,) = after["runs"]
    assert (run["state"], run["steps_done"], run["sample_sets_done"], run["sample_sets"]) == ("done", 2, 2, 2)
    assert after["counts"]["done"] == 1 and after["gflops_left"] == 0

    code = (
        "import sys, tiny_suite\nfrom harness.cli import main\nsys.argv = ['harness', 'study', 'small.toml', '--status', '--json']\n"
        "try:\n    with tiny_suite.registered():\n        main()\nfinally:\n    assert not {'torch', 'diffusers', 'jax'} & sys.modules.keys()"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["runs"][0]["state"] == "done"

    said = harness("study", "small.toml")  # has nothing to launch, and writes the report
    assert "started" not in said.output
    table = (home / "runs" / "studies" / "small" / "report" / "table-latents-32.md").read_text()
    assert table.count("| dit-xs-4 ") == 2  # a row for each length of training


def test_samples_decoded_by_another_autoencoder_are_not_those_of_the_study(home):
    """The decoder is a part of what a sample set is: the study asks for the one that made the latents."""
    save_vae(home / "other", seed=2, scaling_factor=0.8, shift_factor=0.1)
    (run,) = status()["runs"]
    ((_, *words),) = run["commands"]
    harness(*words, "--decoder", "other")
    found = status()["runs"][0]
    assert (found["steps_done"], found["sample_sets_done"]) == (2, 0)
    harness(*words)
    found = status()["runs"][0]
    assert (found["state"], found["sample_sets_done"]) == ("done", 2)


def test_a_study_that_names_its_decoder_finds_what_that_decoder_made(home, monkeypatch):
    """Its weights are hashed once, however many sample sets there are."""
    state._decoder_identity.cache_clear()
    calls = []
    identity = state.read_identity
    monkeypatch.setattr(state, "read_identity", lambda *words: calls.append(words) or identity(*words))
    save_vae(home / "other", seed=2, scaling_factor=0.8, shift_factor=0.1)
    (home / "named.toml").write_text(f'decoder = "{home / "other"}"\n{STUDY}')

    def only_run(study):
        (run,) = json.loads(harness("study", study, "--status", "--json").stdout)["runs"]
        return run

    ((_, *words),) = only_run("named.toml")["commands"]
    assert words[words.index("--decoder") + 1] == str(home / "other")
    harness(*words)
    found = only_run("named.toml")
    assert (found["state"], found["sample_sets_done"], len(calls)) == ("done", 2, 1)
    assert only_run("small.toml")["sample_sets_done"] == 0
