"""Samples of a system are of the entry of a checkpoint that is named, or of the moving average, in torch and in JAX."""

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from harness import registry
from harness.cli import group
from harness.runs.samples import read_samples, read_sidecar

TABLE = "y_embedder.embedding_table.weight"
SYSTEM = """
name = "tiny"
protocol = "digits-4"
label_policy = "random"
uint8_rule = "dit"

[base]
backbone = "dit-xs-2"
arguments = {{ input_size = 4, in_channels = 1, num_classes = 10, depth = 1 }}
steps = 2
sampler = "ddim"
clip_denoised = true
guidance_scale = {scale}
"""


@pytest.fixture(scope="module")
def weights():
    """(raw, average): two networks with no zero in them."""
    net = registry.backbones.get("dit-xs-2").build(input_size=4, in_channels=1, num_classes=10, depth=1)
    generator = torch.Generator().manual_seed(5)
    raw = {name: each + 0.05 * torch.randn(each.shape, generator=generator) for name, each in net.state_dict().items()}
    return raw, {name: each if name == "pos_embed" else each * 0.8 + 0.02 for name, each in raw.items()}


def sample(folder, path, *words, scale=1.0, framework="torch", text=SYSTEM):
    (folder / "tiny.toml").write_text(text.format(scale=scale))
    words = [
        "sample", "--system", folder / "tiny.toml", "--weights", f"base={path}", "--samples", 20, "--out", folder,
        "--framework", framework, "--device", "cpu", *words,
    ]  # fmt: skip
    done = CliRunner().invoke(group, [str(word) for word in words])
    if done.exit_code:
        return None, str(done.exception or done.output)
    return folder.joinpath(done.stdout.split("\n")[0]), read_samples(Path(done.stdout.split("\n")[0])).images


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_samples_are_of_the_entry_that_is_said(framework, weights, tmp_path):
    raw, average = weights
    torch.save(raw, tmp_path / "raw.pt")
    torch.save(average, tmp_path / "average.pt")
    torch.save({"model": raw, "ema": {"decay": 0.9, "shadow": average}}, tmp_path / "both.pt")
    torch.save({"model": raw, "ema": {"shadow_params": list(average.values())}}, tmp_path / "list.pt")
    torch.save({"model": raw, "model_ema1": average, "model_ema2": raw}, tmp_path / "two.pt")
    draws = {
        name: sample(tmp_path, tmp_path / file, *words, framework=framework)
        for name, file, words in (
            ("raw", "raw.pt", ()),
            ("average", "average.pt", ()),
            ("both", "both.pt", ()),
            ("both, raw", "both.pt", ("--entry", "base=model")),
            ("list", "list.pt", ()),
            ("two, average", "two.pt", ("--entry", "base=model_ema1")),
        )
    }
    assert all(path is not None for path, _ in draws.values()), draws
    images = {name: drawn for name, (_, drawn) in draws.items()}
    assert (images["raw"] != images["average"]).mean() > 0.2
    for name in ("both", "list", "two, average"):
        np.testing.assert_array_equal(images[name], images["average"])
    np.testing.assert_array_equal(images["both, raw"], images["raw"])
    assert len({path.parent.name for path, _ in draws.values()}) == len(draws)  # each has its own identity
    sidecar = read_sidecar(draws["both"][0])
    assert (
        sidecar["entries"] == {"base": "ema.shadow"} and sidecar["identity"]["weights"]["base"]["entry"] == "ema.shadow"
    )
    assert "entry" not in read_sidecar(draws["raw"][0])["identity"]["weights"]["base"]
    assert "choose one with --entry" in sample(tmp_path, tmp_path / "two.pt", framework=framework)[1]


def test_an_entry_belongs_to_a_part_with_a_file(weights, tmp_path):
    torch.save(weights[0], tmp_path / "raw.pt")
    assert "--entry decoder: system 'tiny' has the parts base" in sample(
        tmp_path, tmp_path / "raw.pt", "--entry", "decoder=x"
    )[1]  # fmt: skip
    assert "has no entry 'x'" in sample(tmp_path, tmp_path / "raw.pt", "--entry", "base=x")[1]
    words = ["sample", "--run", str(tmp_path), "--entry", "base=x"]
    assert "--entry 'base': the weights of a run are its own" in str(CliRunner().invoke(group, words).exception)


def test_a_system_states_the_spacing_of_its_times(weights, tmp_path):
    torch.save(weights[0], tmp_path / "raw.pt")
    usual = sample(tmp_path, tmp_path / "raw.pt")
    assert "spacing" not in read_sidecar(usual[0])["identity"]["system"]["base"]  # older identities stay
    text = SYSTEM.replace("steps = 2", 'steps = 2\nspacing = "trailing"').replace('"ddim"', '"dpm++-2m"')
    trailing = sample(tmp_path, tmp_path / "raw.pt", text=text)
    assert trailing[0] is not None, trailing[1]
    facts = read_sidecar(trailing[0])
    assert facts["identity"]["system"]["base"]["spacing"] == facts["record"]["sampling"]["spacing"] == "trailing"
    assert not np.array_equal(usual[1], trailing[1])
    assert "did you mean trailing?" in sample(tmp_path, tmp_path / "raw.pt", text=text.replace("ling", "lin"))[1]


def test_without_a_null_row_there_are_samples_but_no_guidance(weights, tmp_path):
    raw, _ = weights
    torch.save(raw, tmp_path / "whole.pt")
    torch.save({**raw, TABLE: raw[TABLE][:-1]}, tmp_path / "cut.pt")
    whole, cut = (sample(tmp_path, tmp_path / name)[1] for name in ("whole.pt", "cut.pt"))
    np.testing.assert_array_equal(whole, cut)
    assert "has no row for the null label, which guidance needs" in sample(tmp_path, tmp_path / "cut.pt", scale=2.0)[1]
