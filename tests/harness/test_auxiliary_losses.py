"""Auxiliary losses with a frozen encoder and trained heads: exact, resumed to the bit, counted, and refused in one line."""

import json

import auxiliary_runs
import few_digits
import numpy as np
import pytest
import torch
from auxiliary_runs import AUXILIARY, session
from click.testing import CliRunner
from command_process import started
from safetensors.numpy import load_file
from small_runs import request
from test_many_processes import ended, environments
from test_plugin_files import forget

from harness import registry
from harness.cli import group
from harness.diffusion.auxiliary import read_auxiliary
from harness.errors import UserError
from harness.planning.matching import matched
from harness.planning.plan import make_plan
from harness.planning.plan_text import costs_text
from harness.planning.reference import parse_reference
from harness.runs import checkpoints
from reports import figures_loss

TOKENS, WIDTH = 4, 192  # of dit-xs-4 on digits
ENCODER_FLOPS = 16 * 4 * 6
HEADS_FLOPS = TOKENS * (WIDTH * 32 + 32 * 32 + 32 * 6)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    shop = session(tmp_path_factory.mktemp("whole") / "run", 6)
    shop.train(6)
    return shop


def rows(shop):
    return [json.loads(line) for line in shop.run.log.read_text().splitlines()]


def parts(shop):
    return {
        path.stem: load_file(path) for path in checkpoints.newest(shop.run.checkpoints).folder.glob("*.safetensors")
    }


def test_the_heads_learn_and_are_in_checkpoints_alone(whole, tmp_path):
    found = rows(whole)
    assert set(found[0]) == {"step", "mse", "vb", "repa"}
    assert found[-1]["repa"] < found[0]["repa"] < 0.5 and abs(found[0]["repa"]) < 1
    held = parts(whole)
    assert set(held) == {
        "model",
        "ema",
        "first_moment",
        "second_moment",
        "heads",
        "heads_first_moment",
        "heads_second_moment",
    }
    assert held["heads"]["projectors.0.0.weight"].shape == (32, WIDTH)
    assert np.abs(held["heads_second_moment"]["projectors.0.4.weight"]).max() > 0
    assert not any("projector" in name for name in held["ema"])
    plain = session(tmp_path / "plain", 6, settings={"auxiliary": ""})
    plain.train(6)
    assert set(parts(plain)) == {"model", "ema", "first_moment", "second_moment"}
    # the same data, noise and initial weights; from the second step on the alignment has moved the weights
    assert rows(plain)[0]["mse"] == found[0]["mse"] and rows(plain)[-1]["mse"] != found[-1]["mse"]
    assert plain.identity["recipe"] == {k: v for k, v in whole.identity["recipe"].items() if k != "auxiliary"}


def test_stopping_and_resuming_changes_no_bit(whole, tmp_path):
    for until in (2, 3, 6):  # a new process's worth of objects each time
        session(tmp_path / "run", 6).train(until)
    resumed = session(tmp_path / "run", 6)
    assert resumed.run.log.read_bytes() == whole.run.log.read_bytes()
    one, other = parts(whole), parts(resumed)
    assert one.keys() == other.keys()
    for name, tensors in one.items():
        assert all(np.array_equal(value, other[name][key]) for key, value in tensors.items()), name


def test_micro_batches_are_exact(whole, tmp_path):
    shop = session(tmp_path / "run", 6, micro_batch=5)
    shop.train(6)
    for one, other in zip(rows(whole), rows(shop), strict=True):
        assert other == pytest.approx(one, rel=1e-5)


def test_checkpointed_activations_are_tapped_once(whole, tmp_path):
    shop = session(tmp_path / "run", 6, gradient_checkpointing=True)
    shop.train(6)
    for one, other in zip(rows(whole), rows(shop), strict=True):
        assert other == pytest.approx(one, rel=1e-5)


def test_two_processes_make_the_same_run(whole, tmp_path):
    folder = tmp_path / "two"
    launched = [started(auxiliary_runs.main, str(folder), (3, 6), each) for each in environments(2)]
    assert ended(launched) == [0, 0]
    for one, other in zip(
        rows(whole), [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()], strict=True
    ):
        assert other == pytest.approx(one, rel=1e-5)
    one, two = parts(whole)["heads"], load_file(folder / "checkpoints" / "step-00000006" / "heads.safetensors")
    assert all(np.allclose(one[name], two[name], atol=1e-4) for name in one)


def test_encoder_and_heads_count_as_training_compute_and_are_shown_apart(whole):
    wanted = whole.request
    assert (wanted.auxiliary.encoder, wanted.auxiliary.heads) == (ENCODER_FLOPS, HEADS_FLOPS)
    plain = request(steps=6, settings={**auxiliary_runs.SETTINGS, "auxiliary": ""})
    extra = (ENCODER_FLOPS + 3 * HEADS_FLOPS) * 16 / 1e9
    assert wanted.gflops_step == pytest.approx(plain.gflops_step + extra)
    plan = make_plan(wanted)
    assert plan.training.gflops == pytest.approx(wanted.gflops_step * 6)
    assert plan.training.auxiliary["gflops"] == pytest.approx(extra * 6)
    assert f"auxiliary   {AUXILIARY}: 96 images x (" in costs_text(plan) and "auxiliary" not in costs_text(
        make_plan(plain)
    )
    assert "auxiliary" not in make_plan(plain).as_dict()["training"]
    # matched to steps of the plain network: what the loss costs is taken from the steps
    target = plain.gflops_step * 600
    match = matched(wanted, match=parse_reference("dit-xs-4@600")).match
    assert match.steps == round(target / wanted.gflops_step) < 600


def test_the_record_states_it_and_sampling_needs_no_heads(tmp_path, monkeypatch):
    """By the command line, with a loss and an encoder of one file."""
    monkeypatch.chdir(tmp_path)
    few_digits.write("digits.npz", 300)
    (tmp_path / "few.toml").write_text(few_digits.protocol("few-digits", steps=3))
    (tmp_path / "mine.py").write_text(PLUGIN)
    auxiliary = "mean-of-tokens:mean-colour:blocks.1+blocks.2"
    train = ["train", "--backbone", "dit-xs-4", "--protocol", "few.toml", "--data", "digits.npz", "--out", "run"]
    train += ["--precision", "float32", "--device", "cpu", "--plugin", "mine.py", "--set", f"auxiliary={auxiliary}"]
    try:
        for command in (train, ["sample", "--run", "run", "--samples", "4"]):
            forget()  # as in a process of its own: sampling does without the encoder, and without the file
            done = CliRunner().invoke(group, command)
            assert done.exit_code == 0, (done.exception, done.stderr)
    finally:
        forget()
    (side,) = (tmp_path / "run").glob("samples/*/samples.json")
    record = json.loads(side.read_text())["record"]
    training = record["training"]
    assert training["auxiliary"] == auxiliary
    heads = 2 * 4 * WIDTH  # a row of weights over the tokens of two taps
    assert training["auxiliary_gflops"] == pytest.approx(6 * 16 * 3 * heads / 1e9)
    assert training["gflops"] == pytest.approx(6 * 16 * 3 * record["gflops"] + training["auxiliary_gflops"])
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert set(run["identity"]["plugins"]) == {"auxiliary loss", "encoder"} and run["plugin_files"] == [
        str(tmp_path / "mine.py")
    ]
    first, *_ = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert set(json.loads(first)) == {"step", "mse", "vb", "mean-of-tokens"}
    assert figures_loss._term_weights("dit-xs-4", {"auxiliary": "repa:any:blocks.0"}) == {
        "mse": 1,
        "vb": 1,
        "repa": 0.5,
    }


PLUGIN = """
import torch
from evaluators.features.spec import FeatureSpec
from harness.diffusion.auxiliary import AuxiliaryLoss

class Heads(torch.nn.Module):
    def __init__(self, shapes, tokens):
        super().__init__()
        self.rows = torch.nn.ModuleList(torch.nn.Linear(shape[1], 1) for shape in shapes.values())
    def forward(self, tapped, tokens):
        guesses = [row(out).mean((1, 2)) for row, out in zip(self.rows, tapped.values())]
        return sum((guess - tokens.mean((1, 2))) ** 2 for guess in guesses)

def load_tokens(spec, device):
    return lambda images: images.mean((1, 2, 3))[:, None, None]

FEATURES = FeatureSpec(
    name="mean-colour", dim=1, classes=None, input_size=8, loader="nowhere:load", description="one token", tokens=f"{__name__}:load_tokens",
)
AUXILIARY_LOSSES = AuxiliaryLoss(name="mean-of-tokens", builders={"torch": f"{__name__}:Heads"})
"""


@pytest.mark.parametrize(
    ("auxiliary", "options", "message"),
    [
        ("repa", {}, r"is not of the form NAME:ENCODER:TAP\[\+TAP...\]\[:WEIGHT\]"),
        ("repa:small-encoder:blocks.0:-1", {}, "the weight '-1' is no positive number"),
        ("rope:small-encoder:blocks.0", {}, "unknown auxiliary loss 'rope'; did you mean repa"),
        ("repa:smal-encoder:blocks.0", {}, "unknown feature extractor 'smal-encoder'; did you mean small-encoder"),
        ("repa:none:blocks.0", {}, "needs an encoder"),
        ("repa:inception-2015-12-05:blocks.0", {}, "give no patch tokens"),
        ("repa:small-encoder:block.0", {}, "dit-xs-4 has no such tap: unknown module 'block.0'; did you mean blocks.0"),
        ("repa:small-encoder:t_embedder", {}, "neither tokens .T, D. nor a map"),
        (AUXILIARY, {"framework": "jax"}, "has no heads in jax; use --framework torch"),
        (AUXILIARY, {"backbone": "adm-classifier-64"}, "is for denoisers"),
    ],
)
def test_what_does_not_fit_is_one_line(auxiliary, options, message):
    auxiliary_runs.registered()
    with pytest.raises(UserError, match=message):
        request(settings={"auxiliary": auxiliary}, **options)


def test_it_is_not_compiled(tmp_path):
    shop = session(tmp_path / "run", 6)
    with pytest.raises(UserError, match="--compile on does not allow"):
        shop.measure(device="cpu", precision="float32", micro_batch=16, compile="on")


def test_a_packaged_encoder_works_and_one_recipe_has_one_text():
    wanted = request(settings={"auxiliary": "repa:efficientnet-lite0-96:blocks.1+blocks.2:.50"})
    assert (
        wanted.recipe.auxiliary
        == str(read_auxiliary(wanted.recipe.auxiliary))
        == "repa:efficientnet-lite0-96:blocks.1+blocks.2:0.5"
    )
    assert 20e6 < wanted.auxiliary.encoder < 80e6  # EfficientNet-Lite0 at 96 pixels without its head
    encoder = registry.features.get("efficientnet-lite0-96").load_tokens()
    images = torch.rand(2, 1, 8, 8) * 2 - 1
    assert encoder(images).shape == (2, 9, 320) and not encoder.net.training
