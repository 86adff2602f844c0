"""The folder of a run: which checkpoint is taken, what is refused in it, and what a fork takes along."""

import dataclasses
import logging

import numpy as np
import pytest
from small_runs import losses, request, workshop

from harness.errors import UserError
from harness.pipeline.train import RunSession
from harness.runs import checkpoints
from harness.runs.run import find_run
from harness.settings import TrainOptions


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    shop = workshop(tmp_path_factory.mktemp("whole") / "run", request(steps=12))
    shop.train(12)
    return shop


def test_the_newest_intact_checkpoint_is_taken(whole, tmp_path, caplog):
    shop = workshop(tmp_path / "run", request(steps=12))
    shop.train(4)
    shop.train(8)
    path = shop.run.checkpoints / "step-00000008" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    (shop.run.ema_checkpoint(8) / "state.json").unlink()
    again = workshop(tmp_path / "run", request(steps=12))
    with caplog.at_level(logging.INFO, "harness"):
        again.train(12)
    (warning,) = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    assert "model.safetensors does not match its checksum; trying the one before it" in warning
    assert "continues from the checkpoint of step 4" in caplog.messages
    assert again.run.log.read_bytes() == whole.run.log.read_bytes()


def test_no_intact_checkpoint_is_refused(tmp_path):
    shop = workshop(tmp_path / "run", request(steps=12))
    shop.train(2)
    (shop.run.checkpoints / "step-00000002" / "ema.safetensors").unlink()
    with pytest.raises(UserError, match=r"no intact checkpoint.*ema.safetensors is missing"):
        workshop(tmp_path / "run", request(steps=12)).train(12)


def test_checkpoints_keep_two_and_leave_nothing_half_made(tmp_path):
    tensors = {"a": np.arange(6, dtype=np.float32)}
    for step in range(1, 5):
        (tmp_path / f"step-{step:08d}.partial").mkdir(parents=True)
        checkpoints.write(tmp_path, step, [("model", lambda: tensors)], {"seconds": 0.0})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]
    assert checkpoints.newest(tmp_path).step == 4


@pytest.mark.parametrize(
    ("item", "value"),
    [
        ("spent", 3),
        ("spent", {"cpu": "x"}),
        ("spent", [1]),
        ("seconds", True),
        ("trained_with", [1]),
        ("trained_with", 1),
    ],
)
def test_a_state_whose_items_are_of_another_type_is_refused(item, value, tmp_path):
    checkpoints.write(tmp_path, 1, [("model", lambda: {"a": np.zeros(1, np.float32)})], {"seconds": 0.0, item: value})
    with pytest.raises(UserError, match="state.json of another form"):
        checkpoints.verify(tmp_path / "step-00000001")


def test_a_folder_of_another_run_is_refused(whole):
    with pytest.raises(UserError, match=r"holds another run \(seed is 0 there and 5 here\)"):
        workshop(whole.folder, request(seed=5))
    with pytest.raises(UserError, match=r"recipe.learning_rate is 0.001 there and 0.002 here"):
        workshop(whole.folder, request(settings={"learning_rate": "2e-3"}))
    assert find_run(whole.folder, whole.spec).identity == whole.run.identity


def test_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="other files and no run"):
        workshop(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_a_fork_goes_on_from_the_newest_checkpoint(whole, tmp_path):
    parent = workshop(tmp_path / "parent", request(steps=12))
    parent.train(5)
    resolved = dataclasses.replace(parent.run.resolved, micro_batch=7)
    fork = RunSession(request(steps=12), parent.data, tmp_path / "fork")
    fork.fork(parent.folder, resolved)
    assert fork.run.resolved.micro_batch == 7 and fork.run.identity == parent.run.identity
    fork.train(12)
    assert len(losses(fork)) == 12 and losses(fork)[:5] == losses(whole)[:5]
    for row, other in zip(losses(fork), losses(whole), strict=True):
        assert row["mse"] == pytest.approx(other["mse"], rel=2e-4)
    assert losses(parent) == losses(whole)[:5]  # the parent is left as it was
    other = RunSession(request(steps=12, seed=3), parent.data, tmp_path / "other")
    with pytest.raises(UserError, match="another experiment: seed is 0 there and 3 here"):
        other.fork(parent.folder, resolved)


def test_what_a_killed_creation_leaves_is_no_obstacle(tmp_path):
    for name in ("lock", "run.json.partial", "log.jsonl"):
        (tmp_path / name).write_text("")
    (tmp_path / "checkpoints" / "step-00000003.partial").mkdir(parents=True)
    shop = workshop(tmp_path, request(steps=2))
    shop.train(2)
    assert [row["step"] for row in losses(shop)] == [1, 2]


def test_a_run_goes_on_compiled_or_not_as_it_was_created(tmp_path):
    shop = workshop(tmp_path / "run")
    shop.run = dataclasses.replace(shop.run, resolved=dataclasses.replace(shop.run.resolved, compile="on"))

    for asked in ({}, {"compile": "on"}, {"compile": "auto"}):
        assert shop.begin(TrainOptions(backbone="dit-xs-4", **asked)) is shop.run
    with pytest.raises(UserError, match="created with compile on, which is frozen .*leave out --compile"):
        shop.begin(TrainOptions(backbone="dit-xs-4", compile="off"))


def test_a_run_cannot_be_trained_backwards(whole):
    with pytest.raises(UserError, match="kept no EMA checkpoint of step 7"):
        workshop(whole.folder, request(steps=12)).train(7)
