"""Losses for TensorBoard, read back by its own reader: each step once whatever was killed, and never a training lost."""

import importlib.util
import json
import logging
import os
import shutil
import struct
import time

import pytest
from command_process import start
from small_runs import request, workshop
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from harness import loggers, registry
from harness.errors import UserError
from harness.pipeline import training_loop
from harness.plugins.hook import Hook
from harness.runs import checkpoints
from harness.settings import TrainOptions

TRAIN = ["train", "--backbone", "dit-xs-4", "--set", "batch=16", "--precision", "float32", "--micro-batch", "16"]


def seen(folder):
    """What TensorBoard shows of a run: by tag, (step, value) in order."""
    reader = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    reader.Reload()
    tags = reader.Tags()["scalars"]
    return {tag: [(each.step, each.value) for each in reader.Scalars(tag)] for tag in tags}


def check_against_the_log(folder, steps):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    shown = seen(folder)
    assert set(shown) == {"train/loss", "train/mse", "train/vb", "train/steps_per_second"}
    for tag, value in (
        ("train/mse", lambda row: row["mse"]),
        ("train/vb", lambda row: row["vb"]),
        ("train/loss", lambda row: row["mse"] + row["vb"]),
    ):
        assert [step for step, _ in shown[tag]] == list(range(1, steps + 1))  # each once, none lost
        assert [each for _, each in shown[tag]] == pytest.approx([value(row) for row in rows], rel=1e-6)
    assert shown["train/steps_per_second"] and all(value > 0 for _, value in shown["train/steps_per_second"])


def later():
    """Files of one run are read in the order of their names, which hold whole seconds: no process starts so fast."""
    time.sleep(1.1)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    shop = workshop(tmp_path_factory.mktemp("plain") / "run", request(steps=8))
    shop.train(8)
    return shop.run.log.read_bytes()


def test_tensorboard_shows_every_step_and_the_log_is_the_same(plain, tmp_path):
    for until in (3, 8):
        workshop(tmp_path / "run", request(steps=8), loggers=["tensorboard"]).train(until)
        later()
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == plain
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 2
    check_against_the_log(tmp_path / "run", 8)


def test_a_logger_that_is_added_later_has_the_steps_before(plain, tmp_path):
    workshop(tmp_path / "run", request(steps=8)).train(3)
    workshop(tmp_path / "run", request(steps=8), loggers=["tensorboard"]).train(8)
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == plain
    check_against_the_log(tmp_path / "run", 8)


def test_what_a_killed_process_had_shown_beyond_its_checkpoint_is_shown_once(plain, tmp_path):
    run = tmp_path / "run"
    workshop(run, request(steps=8), loggers=["tensorboard"]).train(3)
    shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")
    later()
    workshop(run, request(steps=8), loggers=["tensorboard"]).train(7)
    for folder in (run / "checkpoints", *run.glob("snapshots/*7")):
        shutil.rmtree(folder)
    shutil.copytree(tmp_path / "checkpoints", run / "checkpoints")
    newest = max((run / "tensorboard").iterdir())
    with newest.open("ab") as file:  # the beginning of an event
        file.write(newest.read_bytes()[-20:])
    later()
    workshop(run, request(steps=8), loggers=["tensorboard"]).train(8)
    assert run.joinpath("log.jsonl").read_bytes() == plain
    assert len(list((run / "tensorboard").iterdir())) == 3
    check_against_the_log(run, 8)


@pytest.mark.slow
def test_killed_twice_each_step_is_there_once(tmp_path):
    steps, words = 20, [*TRAIN, "--out", "run", "--logger", "tensorboard", "--steps", 20]
    log = tmp_path / "run" / "log.jsonl"
    for most in (5, 12):
        process = start(words, tmp_path, 0.2)  # a checkpoint every 0.2 s
        while not log.exists() or len(log.read_bytes().splitlines()) < most:
            assert process.exitcode is None, (tmp_path / "output.txt").read_text()
            time.sleep(0.01)
        process.kill()
        process.join(60)
        later()
    process = start(words, tmp_path, 0.2)
    process.join(300)
    assert process.exitcode == 0, (tmp_path / "output.txt").read_text()
    assert (tmp_path / "output.txt").read_text().count("continues from") >= 1
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 3
    check_against_the_log(tmp_path / "run", steps)


def sent(path):
    """Steps and losses that a file of Weights & Biases holds: records of wandb's protocol in LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        left = 32768 - at % 32768  # of the block; less than a header is padding
        if left < 7:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record, whole = Record.FromString(whole), b""
            items = {(each.key or "/".join(each.nested_key)): each.value_json for each in record.history.item}
            if items:
                found.append((record.history.step.num, json.loads(items["train/loss"])))
    return found


@pytest.mark.slow
def test_weights_and_biases_has_each_step_once_after_a_kill(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    words = [*TRAIN, "--out", "run", "--logger", "wandb", "--steps", 20]
    log = tmp_path / "run" / "log.jsonl"
    process = start(words, tmp_path, 0.2)
    while not log.exists() or len(log.read_bytes().splitlines()) < 8:
        assert process.exitcode is None, (tmp_path / "output.txt").read_text()
        time.sleep(0.01)
    process.kill()
    process.join(60)
    process = start(words, tmp_path, 0.2)
    process.join(300)
    said = (tmp_path / "output.txt").read_text()
    assert process.exitcode == 0 and "continues from" in said and "warning" not in said, said
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    (path,) = (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")
    assert sent(path) == [(row["step"], pytest.approx(row["mse"] + row["vb"])) for row in rows]
    assert len(rows) == 20


def registered(monkeypatch, name):
    registry.loggers.names()
    monkeypatch.setitem(registry.loggers._items, name, Hook(name=name, call="no:where"))


class Recorder:
    """A logger that remembers the last step that it flushed."""

    needs_past_steps, written, flushed = False, 0, 0

    def __init__(self, run, done):
        Recorder.written = Recorder.flushed = done

    def write(self, step, values):
        assert step == Recorder.written + 1 and "train/loss" in values
        Recorder.written = step

    def flush(self):
        Recorder.flushed = Recorder.written

    def close(self):
        pass


def test_loggers_are_flushed_before_a_checkpoint_is_written(tmp_path, monkeypatch):
    registered(monkeypatch, "recorder")
    monkeypatch.setattr(loggers, "load_attribute", lambda address, what: Recorder)
    write, found = checkpoints.write, []

    def watched(root, step, *rest):
        found.append((step, Recorder.flushed))
        return write(root, step, *rest)

    monkeypatch.setattr(checkpoints, "write", watched)
    monkeypatch.setattr(training_loop, "MIN_CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(training_loop, "CHECKPOINT_SHARE", 1e9)
    workshop(tmp_path / "run", request(steps=4), loggers=["recorder"]).train(4)
    assert found == [(step, step) for step in (1, 2, 3, 4)]


class Broken:
    """A logger that fails at its fifth step."""

    needs_past_steps = False
    closed = 0

    def __init__(self, run, done):
        self.written = []

    def write(self, step, values):
        if step == 5:
            raise OSError("no space\nleft")
        assert step < 5

    def flush(self):
        pass

    def close(self):
        raise AssertionError("left out before")


def test_a_logger_that_fails_is_left_out_with_one_warning(plain, tmp_path, monkeypatch, caplog):
    registered(monkeypatch, "broken")
    monkeypatch.setattr(loggers, "load_attribute", lambda address, what: Broken)
    workshop(tmp_path / "run", request(steps=8), loggers=["broken"]).train(8)
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == plain
    assert [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING] == [
        "broken is left out from here on (OSError: no space); log.jsonl has everything"
    ]


def test_one_that_cannot_be_opened_is_left_out_too(plain, tmp_path, caplog):
    shop = workshop(tmp_path / "run", request(steps=8), loggers=["tensorboard"])
    (tmp_path / "run" / "tensorboard").write_text("in the way")
    shop.train(8)
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == plain
    assert sum("tensorboard is left out" in text for text in caplog.messages) == 1


def test_a_missing_library_is_refused_before_anything_is_trained(monkeypatch):
    loggers.check_installed(["tensorboard"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"--logger tensorboard needs tensorboard: pip install 'backbone-harness\[tensorboard\]'"
    ):
        loggers.check_installed(["tensorboard"])


def test_an_unknown_logger_is_one_line():
    with pytest.raises(UserError, match=r"--logger: unknown logger 'tensorbord'; did you mean tensorboard\?"):
        TrainOptions(backbone="dit-xs-4", logger=("tensorbord",))
