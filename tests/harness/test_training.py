"""The trainer on real digits: resume to the bit, exact accumulation, recipe items, guards."""

import dataclasses
import io
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from small_runs import SecondProcess, losses, request, workshop

from harness.data.digits import load
from harness.distributed import group as group_module
from harness.distributed.group import ProcessGroup, Stopped
from harness.engines.torch import process_group
from harness.engines.torch import trainer as torch_trainer
from harness.errors import RunError, UserError
from harness.pipeline import training_loop
from harness.pipeline.train import RunSession
from harness.pipeline.training_loop import (
    AGREE_STEPS,
    STOP,
    CheckpointManager,
    Loggers,
    newest_checkpoint,
    time,
    train,
)
from harness.runs import checkpoints
from harness.runs.provenance import TrainingTime
from harness.runs.run import find_run


def weights(shop, step):
    return load_file(shop.run.ema_checkpoint(step) / "ema.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    shop = workshop(tmp_path_factory.mktemp("whole") / "run", request(steps=12))
    shop.train(12)
    return shop


def test_the_log_has_every_step_and_training_learns(whole):
    rows = losses(whole)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert all(math.isfinite(row["mse"]) and math.isfinite(row["vb"]) for row in rows)
    # adaLN-Zero starts with output 0, so the first loss is the mean square of the noise.
    assert rows[0]["mse"] == pytest.approx(1.0, abs=0.15)
    assert rows[-1]["mse"] < rows[0]["mse"]


def test_stopping_and_resuming_changes_no_bit(whole, tmp_path):
    for until in (3, 4, 9, 12):  # a new process's worth of objects each time
        workshop(tmp_path / "run", request(steps=12)).train(until)
    resumed = workshop(tmp_path / "run", request(steps=12))
    assert resumed.run.log.read_bytes() == whole.run.log.read_bytes()
    one, other = weights(whole, 12), weights(resumed, 12)
    assert one.keys() == other.keys() and len(one) > 50
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert resumed.run.ema_checkpoint_steps() == [3, 4, 9, 12]


def test_a_part_that_does_not_fit_is_refused(whole, tmp_path, monkeypatch):
    folder, wanted = whole.run.checkpoints / "step-00000012", whole.request
    engine = torch_trainer.TorchEngine(
        wanted.spec, torch_trainer.build(wanted.spec, wanted.arguments, 0), arguments=wanted.spec.arguments(**wanted.arguments), recipe=wanted.recipe,
        seed=0, resolved=whole.run.resolved, data=whole.data,
    )  # fmt: skip
    path = tmp_path / "part.safetensors"
    moment = load_file(folder / "first_moment.safetensors")
    save_file({name: value for name, value in moment.items() if name != "step"}, path)
    with pytest.raises(UserError, match="part.safetensors does not fit this network: step is missing"):
        engine.load("first_moment", path)
    model = load_file(folder / "model.safetensors")
    save_file({name: np.ascontiguousarray(value[:1]) for name, value in model.items()}, path)
    # the first row of each tensor, which is what this process would hold of sharded weights
    monkeypatch.setattr(torch_trainer, "local_shard", lambda tensor: tensor.detach()[:1])
    with pytest.raises(UserError, match=r"does not fit this network: \S+ \(1,.*\) is not in it"):
        engine.load("model", path)


def test_a_log_longer_than_the_checkpoint_is_cut(whole, tmp_path):
    shop = workshop(tmp_path / "run", request(steps=12))
    shop.train(5)
    with shop.run.log.open("a") as file:  # what a killed process had logged after its last checkpoint
        file.write('{"step": 6, "mse": 9.0, "vb": 9.0}\n{"step": 7, "ms')
    workshop(tmp_path / "run", request(steps=12)).train(12)
    assert shop.run.log.read_bytes() == whole.run.log.read_bytes()


def test_micro_batches_add_up_to_the_batch(whole, tmp_path):
    shop = workshop(tmp_path / "run", request(steps=12), micro_batch=7)  # 24 = 7 + 7 + 7 + 3
    shop.train(12)
    for row, other in zip(losses(shop), losses(whole), strict=True):
        assert row["mse"] == pytest.approx(other["mse"], rel=2e-4)
        assert row["vb"] == pytest.approx(other["vb"], rel=2e-3, abs=1e-5)
    assert losses(shop)[0]["mse"] == pytest.approx(losses(whole)[0]["mse"], rel=1e-6)


def test_another_seed_is_another_sequence(whole, tmp_path):
    shop = workshop(tmp_path / "run", request(steps=2, seed=1))
    shop.train(2)
    assert losses(shop)[0]["mse"] != losses(whole)[0]["mse"]


def test_gradient_checkpointing_changes_no_bit(whole, tmp_path):
    wanted = request(steps=12, gradient_checkpointing=True)
    assert wanted.arguments["gradient_checkpointing"] is True
    shop = workshop(tmp_path / "run", wanted)
    shop.train(12)
    assert shop.run.log.read_bytes() == whole.run.log.read_bytes()


def test_gradient_checkpointing_is_kept_by_a_run(whole, tmp_path):
    resolved = dataclasses.replace(whole.run.resolved, gradient_checkpointing=True)
    RunSession(request(gradient_checkpointing=True), whole.data, tmp_path / "run").create(resolved)
    continued = RunSession(request(), whole.data, tmp_path / "run")  # without the flag
    assert continued.request.arguments["gradient_checkpointing"] is True
    assert "gradient_checkpointing" not in RunSession(request(), whole.data, whole.folder).request.arguments


def test_ema_follows_the_stated_average(tmp_path):
    """Against a per-tensor average written out here, over real steps; the ramp included."""
    for ramp in ("false", "true"):
        wanted = request(steps=4, settings={"ema_ramp": ramp, "ema_decay": "0.9"})
        shop = workshop(tmp_path / ramp, wanted)
        engine = torch_trainer.TorchEngine(
            wanted.spec, torch_trainer.build(wanted.spec, wanted.arguments, 0), arguments=wanted.spec.arguments(**wanted.arguments), recipe=wanted.recipe,
            seed=0, resolved=shop.run.resolved, data=shop.data,
        )  # fmt: skip
        expected = {name: value.detach().clone() for name, value in engine.net.state_dict().items()}
        fixed = expected["pos_embed"].clone()
        for step in range(1, 5):
            engine.step(step, lambda: False)
            decay = min(0.9, (1 + step) / (10 + step)) if ramp == "true" else 0.9
            for name, value in engine.net.state_dict().items():
                expected[name] = decay * expected[name] + (1 - decay) * value
        ema = dict(engine.state_dicts())["ema"]()
        moved = 0
        for name, value in expected.items():
            assert ema[name].dtype == np.float32
            np.testing.assert_allclose(ema[name], value.numpy(), rtol=1e-5, atol=1e-7)
            moved += not np.array_equal(ema[name], engine.net.state_dict()[name].numpy())
        assert moved > 20  # the average lags behind the weights, or the test shows nothing
        assert np.array_equal(ema["pos_embed"], fixed.numpy())  # a fixed table does not drift


def test_label_dropout_replaces_the_stated_share(monkeypatch, tmp_path):
    seen = []
    wanted = request(steps=40, settings={"label_dropout": "0.3"})
    shop = workshop(tmp_path / "run", wanted)
    net = torch_trainer.build(wanted.spec, wanted.arguments, 0)
    forward = net.forward
    monkeypatch.setattr(net, "forward", lambda x, t, y: (seen.append(y.clone()), forward(x, t, y))[1])
    engine = torch_trainer.TorchEngine(
        wanted.spec,
        net,
        arguments=wanted.spec.arguments(**wanted.arguments),
        recipe=wanted.recipe,
        seed=0,
        resolved=shop.run.resolved,
        data=shop.data,
    )
    for step in range(1, 41):
        engine.step(step, lambda: False)
    labels = torch.cat(seen)
    assert labels.shape == (960,) and labels.dtype == torch.int64
    share = (labels == 10).double().mean().item()
    assert abs(share - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 960)


def test_every_image_is_seen_once_an_epoch(tmp_path):
    wanted = request(steps=1, settings={"batch": "600", "label_dropout": "0"})
    shop = workshop(tmp_path / "run", wanted)
    engine = torch_trainer.TorchEngine(
        wanted.spec, torch_trainer.build(wanted.spec, wanted.arguments, 0), arguments=wanted.spec.arguments(**wanted.arguments), recipe=wanted.recipe,
        seed=0, resolved=shop.run.resolved, data=shop.data,
    )  # fmt: skip
    count = len(shop.data)
    x, _, draws = engine._batch(range(count + 5))  # five images into the second epoch
    y = draws.y
    assert x.shape == (count + 5, 1, 8, 8) and x.dtype == torch.float32
    assert x.min() == -1 and x.max() == 1
    pixels = ((x[:count] + 1) * 127.5).round().to(torch.uint8).reshape(count, -1).numpy()
    original = shop.data.images.reshape(count, -1)
    assert sorted(map(bytes, pixels)) == sorted(map(bytes, original))
    assert not np.array_equal(pixels[:5], ((x[count:] + 1) * 127.5).round().to(torch.uint8).reshape(5, -1).numpy())
    assert np.array_equal(np.bincount(y[:count].numpy()), np.bincount(shop.data.labels))


def test_a_loss_that_is_not_finite_stops_the_run_with_step_and_checkpoint(tmp_path):
    shop = workshop(tmp_path / "run", request(steps=40))
    shop.train(3)
    # Rates this far off overflow within a few steps.
    broken = workshop(tmp_path / "broken", request(steps=40, settings={"learning_rate": "1e30"}))
    with pytest.raises(RunError, match=r"not finite (at|after) step \d+.*checkpoint.*learning_rate"):
        broken.train(40)
    assert broken.run.ema_checkpoint_steps() == []


def test_interruption_leaves_weights_untouched(tmp_path):
    wanted = request(steps=2)
    shop = workshop(tmp_path / "run", wanted, micro_batch=6)
    engine = torch_trainer.TorchEngine(
        wanted.spec, torch_trainer.build(wanted.spec, wanted.arguments, 0), arguments=wanted.spec.arguments(**wanted.arguments), recipe=wanted.recipe,
        seed=0, resolved=shop.run.resolved, data=shop.data,
    )  # fmt: skip
    before = {name: value.clone() for name, value in engine.net.state_dict().items()}
    asked = iter([False, False, True])
    assert engine.step(1, lambda: next(asked)) is False
    assert engine.pop_losses() == []
    assert all(torch.equal(before[name], value) for name, value in engine.net.state_dict().items())


def unwatched(run):
    """No loggers."""
    return Loggers((), run, 0, {})


def test_checkpoints_are_due_by_cost_and_by_loss(whole):
    manager = CheckpointManager(whole.run, None, None, unwatched(whole.run), 0, TrainingTime(None, ""), cost=0.0)
    now = manager._saved_at
    for beside, cost, age, due in (
        (True, 0.0, 1, False),
        (True, 0.0, 3, True),
        (True, 1.0, 40, False),
        (True, 1.0, 60, True),
        (True, 60.0, 239, False),  # work is done, and can be lost, while the next one is written
        (True, 60.0, 241, True),
        (True, 200.0, 199, False),
        (True, 200.0, 201, True),
        (False, 60.0, 299, False),
        (False, 60.0, 301, True),
    ):
        manager._beside, manager._cost, manager._saved_at = beside, cost, now - age
        assert manager.checkpoint_due() is due, (cost, age)


def test_a_group_reads_its_losses_at_the_same_steps(whole, monkeypatch):
    """However long a process takes: one that stopped alone would leave the others waiting for it. The main process decides
    when; if any process is interrupted, all stop."""
    other = {"stop": 0}

    class Two(ProcessGroup):
        size, index = 2, 1

        def all_max(self, value):
            assert value in (0, STOP)  # the main process decides on steps and checkpoints
            return max(value, 2 * 4 + 1 + other["stop"])  # by the main process: again in 4 steps, and a checkpoint

    class Counted:
        loss_terms, read = {"mse": 1.0}, 0

        def pop_losses(self, wait):
            self.read += 1
            return []

    found = {}
    for name, group in (("one", ProcessGroup()), ("two", Two())):
        found[name] = []
        for patience in (0.0, 1e9):
            monkeypatch.setattr(training_loop, "LOG_SECONDS", patience)
            engine, log = Counted(), io.StringIO()
            manager = CheckpointManager(
                whole.run, engine, log, unwatched(whole.run), 0, TrainingTime(None, ""), cost=0.0, group=group
            )
            manager._logged_at -= 1
            at = []
            for step in range(1, 11):
                before = engine.read
                manager.count_step()
                at += [step] * (engine.read - before)
                stop, due = manager.decide(False)
                assert not stop and due == (name == "two" and step in (1, 5, 9))
            found[name].append(at)
    assert found["one"][0] and not found["one"][1]
    assert found["two"] == [[1, 5, 9]] * 2
    for interrupted in (False, True):
        manager = CheckpointManager(
            whole.run, Counted(), io.StringIO(), unwatched(whole.run), 0, TrainingTime(None, ""), cost=0.0, group=Two()
        )
        other["stop"] = 0 if interrupted else STOP
        manager.count_step()
        assert manager.decide(interrupted)[0]


def test_a_group_without_room_for_a_copy_gives_no_checkpoint_up(tmp_path, monkeypatch):
    """Its processes gather each part together while it is written: one that gave up alone would leave the others waiting."""

    class Two(ProcessGroup):
        size = 2

    gathered = []

    def part(name):
        return name, lambda: gathered.append(name) or {"x": np.zeros(3, np.float32)}

    monkeypatch.setattr(training_loop, "host_free_bytes", lambda: 0)
    run = SimpleNamespace(log=tmp_path / "log.jsonl", checkpoints=tmp_path / "checkpoints")
    engine = SimpleNamespace(
        loss_terms={},
        pop_losses=lambda wait: [],
        finite=lambda: True,
        state_dicts=lambda copy: [part("model"), part("ema")],
    )
    loggers = SimpleNamespace(flush=lambda: None)
    with run.log.open("a") as log, checkpoints.Writer(lambda: 0.0) as writer:  # its deadline is over
        manager = CheckpointManager(
            run, engine, log, loggers, 0, TrainingTime(None, ""), cost=0.0, group=Two(), writer=writer
        )
        manager.done = 1
        manager.checkpoint()
    assert gathered == ["model", "ema"] and manager.saved == 1


def test_a_group_agrees_on_an_interruption_before_the_first_step(tmp_path):
    class Other(ProcessGroup):
        """Another process was interrupted."""

        size = 2

        def all_max(self, value):
            return max(value, 1)

    shop = workshop(tmp_path / "run", request(steps=2))
    with pytest.raises(Stopped):
        train(
            shop.run, SimpleNamespace(loss_terms={"mse": 1.0}, pop_losses=lambda wait: []), 2, gflops_step=1.0, state_bytes=1, device="",
            group=Other(),
        )  # fmt: skip


def test_the_main_process_decides_whether_an_ema_checkpoint_is_there(whole, tmp_path, monkeypatch):
    """A file system may show a new file to one machine before another. If each process looked for itself, one that trains
    would wait for ever for one that does not."""
    begun = []
    monkeypatch.setattr("harness.pipeline.train.get_backend", lambda framework: begun.append(framework) or 1 / 0)
    fresh = workshop(tmp_path / "run", request(steps=12))
    fresh.group = SecondProcess(value=1)
    fresh.train(12)
    train(fresh.run, None, 12, gflops_step=1.0, state_bytes=1, device="", group=fresh.group)
    assert not begun
    monkeypatch.setattr(whole, "group", SecondProcess(value=0))
    with pytest.raises(ZeroDivisionError):
        whole.train(12)
    assert begun == ["torch"]


class Follower(SecondProcess):
    """A process whose main process broadcasts these values, one after the other."""

    def __init__(self, *values):
        self.values = iter(values)

    def broadcast(self, value):
        return next(self.values)


def test_the_main_process_alone_reads_a_checkpoint_for_its_checksums(whole, monkeypatch):
    """And the others take its word, of which checkpoint is the newest intact one, too."""
    hashed, root = [], whole.run.checkpoints
    step = checkpoints._steps(root)[-1]
    sha256_file = checkpoints.files.sha256_file
    monkeypatch.setattr(checkpoints.files, "sha256_file", lambda path: (hashed.append(path), sha256_file(path))[1])
    alone = newest_checkpoint(root, ProcessGroup())
    assert len(hashed) == 4
    assert newest_checkpoint(root, Follower(step)) == alone and len(hashed) == 4
    assert newest_checkpoint(root, Follower(0)) is None
    monkeypatch.setattr(group_module, "FILE_SECONDS", 0.2)
    with pytest.raises(UserError, match=f"process 1 does not see .*step-{step + 1:08d}"):
        newest_checkpoint(root, Follower(step + 1))


def test_a_file_that_is_seen_late_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(group_module, "FILE_POLL_SECONDS", 0.01)
    late, listed = tmp_path / "run" / "run.json", []
    late.parent.mkdir()
    iterdir = Path.iterdir

    def looked(path):
        listed.append(path)
        if len(listed) == 3:
            late.write_text("{}")
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", looked)
    SecondProcess(value=0).await_file(late)
    assert listed == [late.parent] * 3
    ProcessGroup().await_file(tmp_path / "nowhere")  # of a process that works alone there is nobody else who writes
    monkeypatch.setattr(group_module, "FILE_SECONDS", 0.05)
    with pytest.raises(UserError, match=r"process 1 does not see .*never 0.05 s after .* need a shared file system"):
        SecondProcess(value=0).await_file(tmp_path / "never")


def test_a_run_that_another_process_sees_first_is_waited_for(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(group_module, "FILE_SECONDS", 0.05)
    with pytest.raises(UserError, match="process 1 does not see .*run.json"):
        RunSession(request(steps=12), load(), tmp_path / "run", SecondProcess(value=1))

    def appears(self, path):
        shutil.copytree(whole.folder, path.parent)

    monkeypatch.setattr(ProcessGroup, "await_file", appears)
    session = RunSession(whole.request, load(), tmp_path / "run", SecondProcess(value=1))
    assert session.run is not None and session.run.identity == whole.run.identity
    with pytest.raises(UserError, match="see different contents"):
        RunSession(whole.request, load(), whole.folder, SecondProcess(value=0))


@pytest.mark.parametrize(("error", "done"), [(Stopped, True), (KeyboardInterrupt, False), (SystemExit, False)])
def test_only_a_stop_that_was_agreed_on_is_a_good_end(error, done):
    """A second Ctrl-C interrupts one process alone, and the others learn that it has failed."""
    sent, group = [], process_group.TorchProcessGroup.__new__(process_group.TorchProcessGroup)
    group._watch = SimpleNamespace(end=lambda done: sent.append(done))
    with pytest.raises(error), group.collective_scope():
        raise error
    assert sent == [done]


def test_a_process_takes_the_only_gpu_that_is_visible_to_it(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert process_group.gpu(1) == 1  # two processes and one GPU: refused
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert process_group.gpu(1) == 0  # as srun --gpus-per-task=1 starts it
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert process_group.gpu(1) == 1


def test_a_group_agrees_sooner_where_steps_are_long(whole, monkeypatch):
    """So that Ctrl-C acts within seconds."""

    class MainProcess(ProcessGroup):
        size = 2

        def all_max(self, value):
            return value

    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for seconds, apart in ((0.001, AGREE_STEPS), (0.5, 4), (60.0, 1)):
        manager = CheckpointManager(
            whole.run,
            None,
            io.StringIO(),
            unwatched(whole.run),
            0,
            TrainingTime(None, ""),
            cost=0.0,
            group=MainProcess(),
        )
        manager.done, now[0] = 1, now[0] + seconds
        manager.decide(False)
        assert manager._agree_steps == apart


def test_items_that_came_later_change_no_identity_at_their_default(whole, tmp_path):
    assert "conditioning_noise" not in whole.run.identity["recipe"]
    data = json.loads((whole.run.folder / "run.json").read_text())
    assert "conditioning_noise" not in data["identity"]["recipe"]
    data["identity"]["recipe"]["conditioning_noise"] = 0.0  # as some have it
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps(data))
    assert find_run(tmp_path / "run", whole.spec).identity == whole.run.identity
    noisy = workshop(tmp_path / "noisy", request("adm-u-xs", steps=1, settings={"conditioning_noise": "0.1"}))
    assert noisy.run.identity["recipe"]["conditioning_noise"] == 0.1
