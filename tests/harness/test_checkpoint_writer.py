"""Checkpoints are written by a thread, while the training goes on."""

import json
import logging
import signal
import threading
import time

import numpy as np
import pytest
from safetensors.numpy import save
from small_runs import request, workshop

from harness.distributed.group import Stopped
from harness.engines.torch import trainer as torch_trainer
from harness.errors import RunError
from harness.io import tensor_files
from harness.pipeline import training_loop
from harness.runs import checkpoints

STEPS = 6


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an uninterrupted run, its checkpoint of the last step alone."""
    shop = workshop(tmp_path_factory.mktemp("whole") / "run", request(steps=STEPS))
    shop.train(STEPS)
    return shop.run


@pytest.fixture
def always(monkeypatch):
    """A checkpoint after each step."""
    monkeypatch.setattr(training_loop, "MIN_CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(training_loop, "CHECKPOINT_SHARE", 1e9)


@pytest.fixture
def steps(monkeypatch):
    """The steps that were done, as a list that grows, and a function that is called before each."""
    done, hooks, step = [], {}, torch_trainer.TorchEngine.step

    def watched(self, number, interrupted):
        hooks.get("before", lambda _: None)(number)
        done.append(number)
        return step(self, number, interrupted)

    monkeypatch.setattr(torch_trainer.TorchEngine, "step", watched)
    return done, hooks


def written(run, step):
    """Bytes of a checkpoint's tensors by file name."""
    folder = run.checkpoints / f"step-{step:08d}"
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def lines(run):
    return run.log.read_bytes()


def test_the_bytes_are_the_library_s(tmp_path):
    numbers = np.random.default_rng(0)
    tensors = {f"b.{name}": numbers.integers(0, 2, (3, 5)).astype(name) for name in tensor_files.DTYPES}
    tensors |= {"a.scalar": np.float32(2), "zero": np.zeros((0, 4), np.int64), 'a"b\\': np.ones(1, np.float32)}
    tensors["large"] = numbers.normal(size=(3, tensor_files.PIECE_BYTES // 8))
    entry = tensor_files.write(tmp_path / "a", tensors, lambda: None)
    assert (tmp_path / "a").read_bytes() == save({name: np.asarray(value) for name, value in tensors.items()})
    assert entry == {"sha256": tensor_files.hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest(), "bytes": (tmp_path / "a").stat().st_size}  # fmt: skip
    tensor_files.write(tmp_path / "b", {"x": np.arange(6.0).reshape(2, 3).T}, lambda: None)  # of another order
    assert (tmp_path / "b").read_bytes() == save({"x": np.arange(6.0).reshape(2, 3).T.copy()})


def test_training_goes_on_while_a_checkpoint_is_written(whole, tmp_path, monkeypatch, steps):
    """It is of its own step nevertheless, and the log holds that step before it has its name."""
    done, hooks = steps
    shop = workshop(tmp_path / "run", request(steps=STEPS))
    write, go_on, found = checkpoints.write, threading.Event(), []

    def slow(root, step, *rest):
        assert go_on.wait(60)
        found.append((step, threading.current_thread() is threading.main_thread(), list(done), len(lines(shop.run).splitlines())))  # fmt: skip
        return write(root, step, *rest)

    def before(number):
        monkeypatch.setattr(
            training_loop, "MIN_CHECKPOINT_SECONDS", 0 if number == 2 else 1e9
        )  # due after step 2 alone
        monkeypatch.setattr(training_loop, "CHECKPOINT_SHARE", 1e9)
        if number == STEPS:
            go_on.set()

    hooks["before"] = before
    monkeypatch.setattr(checkpoints, "write", slow)
    shop.train(STEPS)
    (step, in_main, meanwhile, logged), _ = found
    assert step == 2 and not in_main and logged >= 2
    assert meanwhile[:5] == [1, 2, 3, 4, 5], "the training waited for the checkpoint"
    assert lines(shop.run) == lines(whole)
    short = workshop(tmp_path / "short", request(steps=STEPS))
    short.train(2)
    assert written(shop.run, 2) == written(short.run, 2) and len(written(shop.run, 2)) == 4
    assert written(shop.run, STEPS) == written(whole, STEPS)


def test_without_memory_for_a_copy_the_training_waits(whole, tmp_path, monkeypatch, always):
    monkeypatch.setattr(training_loop, "host_free_bytes", lambda: 0)
    monkeypatch.setattr("harness.runs.checkpoints.Thread", lambda **_: pytest.fail("a thread was started"))
    monkeypatch.setattr("harness.engines.torch.trainer.host_copies", lambda *_: pytest.fail("a copy was made"))
    shop = workshop(tmp_path / "run", request(steps=STEPS))
    shop.train(STEPS)
    assert sorted(path.name for path in shop.run.checkpoints.iterdir()) == ["step-00000005", "step-00000006"]
    assert written(shop.run, STEPS) == written(whole, STEPS)


def full_after(monkeypatch, count):
    """The disk is full in the middle of the second part of the checkpoint number `count`. Returns a list of the errors."""
    write, calls, full = tensor_files.write, [], []

    def filling(path, tensors, before_piece):
        calls.append(path.name)
        if len(calls) >= 4 * count - 2:
            path.write_bytes(b"a part of it")
            full.append(path)
            raise OSError(28, "No space left on device")
        return write(path, tensors, before_piece)

    monkeypatch.setattr(tensor_files, "write", filling)
    return full


def test_a_full_disk_stops_the_training_at_the_next_step(whole, tmp_path, monkeypatch, steps, always):
    done, hooks = steps
    shop = workshop(tmp_path / "run", request(steps=STEPS))
    with monkeypatch.context() as patch:
        full = full_after(patch, 3)
        patch.setattr(training_loop.CheckpointManager, "checkpoint", _only_checkpoints_of((1, 2, 3)))

        def before(number):  # the thread has failed when step 5 begins
            while number == 5 and not full:
                time.sleep(0.001)
            time.sleep(0.05 * (number == 5))

        hooks["before"] = before
        with pytest.raises(
            RunError, match=r"the disk is full, .*step-00000003 could not be written; free some space"
        ) as raised:
            shop.train(STEPS)
    assert "\n" not in str(raised.value) and done[-1] in (4, 5)  # as soon as the thread has failed
    assert [path.name for path in shop.run.checkpoints.iterdir()] == ["step-00000002"]
    again = workshop(shop.folder, request(steps=STEPS))
    again.train(STEPS)
    assert done[done.index(3, 3) :] == [3, 4, 5, 6]
    assert lines(again.run) == lines(whole) and written(again.run, STEPS) == written(whole, STEPS)


def _only_checkpoints_of(wanted):
    checkpoint = training_loop.CheckpointManager.checkpoint

    def chosen(self, keep=False):
        if self.done in wanted:
            checkpoint(self, keep)

    return chosen


def slow_from(monkeypatch, step, seconds):
    """A checkpoint of `step` or later takes `seconds`."""
    write = checkpoints.write

    def slow(root, number, parts, state, give_up):
        if number >= step:
            end = time.monotonic() + seconds
            while time.monotonic() < end and not give_up():
                time.sleep(0.001)
        return write(root, number, parts, state, give_up)

    monkeypatch.setattr(checkpoints, "write", slow)


@pytest.mark.parametrize(("grace", "kept"), [(0.3, 2), (60.0, 3)])
def test_sigterm_ends_within_its_grace(grace, kept, whole, tmp_path, monkeypatch, steps, caplog):
    """A checkpoint that takes longer is given up, and the one before it is kept."""
    done, hooks = steps
    shop = workshop(tmp_path / "run", request(steps=STEPS))
    shop.train(2)
    shop = workshop(tmp_path / "run", request(steps=STEPS))
    shop.grace, sent = grace, []

    def before(number):
        if number == 4:
            sent.append(time.monotonic())
            signal.raise_signal(signal.SIGTERM)

    hooks["before"] = before
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO, "harness"):
        slow_from(patch, 3, 30.0 if kept == 2 else 0.5)
        with pytest.raises(Stopped):
            shop.train(STEPS)
    assert time.monotonic() - sent[0] < 10
    assert f"checkpoint of step {kept} is in" in caplog.text and "Traceback" not in caplog.text
    assert ("0.3 s were too short for step" in caplog.text) == (kept == 2)
    assert [path.name for path in shop.run.checkpoints.glob("*.partial")] == []
    assert checkpoints.newest(shop.run.checkpoints).step == kept
    hooks.clear()
    again = workshop(shop.folder, request(steps=STEPS))
    again.train(STEPS)
    assert lines(again.run) == lines(whole) and written(again.run, STEPS) == written(whole, STEPS)


def test_sigterm_during_the_last_checkpoint_stops(tmp_path, monkeypatch):
    shop = workshop(tmp_path / "run", request(steps=2))
    write = checkpoints.write

    def slow(*arguments):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
        return write(*arguments)

    monkeypatch.setattr(checkpoints, "write", slow)
    with pytest.raises(Stopped):
        shop.train(2)
    assert checkpoints.newest(shop.run.checkpoints).step == 2


def test_a_second_ctrl_c_gives_the_checkpoint_up(tmp_path, monkeypatch):
    shop = workshop(tmp_path / "run", request(steps=2))
    write = checkpoints.write

    def slow(root, step, parts, state, give_up):
        for _ in range(2):
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            time.sleep(0.3)
        end = time.monotonic() + 20
        while not give_up() and time.monotonic() < end:
            time.sleep(0.001)
        return write(root, step, parts, state, give_up)

    monkeypatch.setattr(checkpoints, "write", slow)
    with pytest.raises(KeyboardInterrupt) as raised:
        shop.train(2)
    assert not isinstance(raised.value, Stopped)
    assert list(shop.run.checkpoints.iterdir()) == []


def test_the_last_good_checkpoint_is_the_one_that_is_being_written(tmp_path, monkeypatch, steps, always):
    shop = workshop(tmp_path / "run", request(steps=STEPS))
    slow_from(monkeypatch, 3, 0.5)
    losses = torch_trainer.TorchEngine.pop_losses
    monkeypatch.setattr(
        torch_trainer.TorchEngine, "pop_losses",
        lambda self, wait=True: [(float("nan"),) * len(row) if steps[0][-1] == 4 else row for row in losses(self, wait)],
    )  # fmt: skip
    with pytest.raises(RunError, match=r"not finite at step 4.*the last good checkpoint is of step 3 in"):
        shop.train(STEPS)
    state = json.loads((shop.run.checkpoints / "step-00000003" / "state.json").read_text())
    assert state["step"] == 3


def test_the_checkpoint_behind_a_damaged_one_is_kept_until_the_next_is_complete(tmp_path):
    """A run that goes on from it, because the newer one is damaged, would otherwise have none while that is written."""
    root = tmp_path / "checkpoints"

    def make(step, give_up=lambda: False):
        parts = [("model", lambda: {"x": np.zeros(4, np.float32)})]
        return checkpoints.write(root, step, parts, {}, give_up)

    for step in (1, 3):
        make(step)
    (root / "step-00000003" / "model.safetensors").write_bytes(b"damaged")
    for step in (2, 3):
        with pytest.raises(checkpoints.GivenUp):
            make(step, lambda: True)
        assert checkpoints.newest(root).step == 1
    make(2)
    assert checkpoints.newest(root).step == 2
    assert len(list(root.iterdir())) == checkpoints.KEPT


def test_without_a_thread_the_checkpoint_is_written_nevertheless(monkeypatch):
    """The system may allow no further one. A writer that waited for it would wait for ever."""

    def none(**_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(checkpoints, "Thread", none)
    with checkpoints.Writer() as writer:
        writer.start(lambda give_up: "written", beside=True)
        assert writer.done and writer.wait() == "written"
