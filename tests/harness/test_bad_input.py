"""Bad input, one test each: the exit code, one line that says what, where and what to do, and nothing overwritten."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_runs import request, workshop

from harness.cli import main
from harness.data.digits import load
from harness.io import tensor_files
from harness.runs.run import lock_folder

TRAIN = [
    "train",
    "--backbone",
    "dit-xs-4",
    "--set",
    "batch=24",
    "--set",
    "learning_rate=1e-3",
    "--set",
    "ema_decay=0.9",
]
FIXED = ["--precision", "float32", "--micro-batch", "24"]

PROTOCOL = """
name = "mine"
dataset = "npz"
resolution = {size}
image_channels = 1
num_classes = {classes}
input_size = {size}
in_channels = 1
samples = 100
suite = "embedded"
"""


@pytest.fixture
def harness(monkeypatch, capfd, tmp_path):
    """Run the command line in this process, in a folder of its own: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["harness", *map(str, words)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        text = capfd.readouterr()
        return code, text.out, text.err

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run trained to step 4, never changed: tests copy it."""
    shop = workshop(tmp_path_factory.mktemp("trained") / "run", request(steps=4))
    shop.train(2)
    shop.train(4)
    return shop.run.folder


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def contents(folder):
    """Every file below `folder` with its bytes; the lock that a process holds while it works is no content."""
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if path.name != "lock"
    }


def refused(result, *parts, code=2):
    """Exactly one line says no, it holds every one of `parts`, and no traceback is shown."""
    found, _, stderr = result
    assert found == code, stderr
    assert "Traceback" not in stderr
    lines = [line for line in stderr.splitlines() if line.startswith("harness: ")]
    assert len(lines) == 1, stderr
    for part in parts:
        assert str(part) in lines[0], lines[0]
    # What was said besides, without progress and the plan of the run that was asked for.
    usual = re.compile(r"  |\S+ on protocol |.*: \d+/\d+ ")
    return [line for line in stderr.splitlines() if line not in lines and not usual.match(line)]


def digits_npz(path, images=None, labels=None, count=300):
    digits = load()
    np.savez(
        path,
        arr_0=digits.images[:count] if images is None else images,
        arr_1=digits.labels[:count] if labels is None else labels,
    )
    return path


def test_unknown_backbone(harness, tmp_path):
    for words in (["train", "--backbone", "dit-xs4"], ["plan", "--backbone", "dit_xs_4"], ["flops", "DiT-XS-4"]):
        assert not refused(harness(*words), "unknown backbone", "did you mean", "dit-xs-4")
    assert not refused(harness("train", "--backbone", "stylegan"), "unknown backbone 'stylegan'", "known:")
    assert contents(tmp_path) == {}


def test_backbone_that_does_not_fit_the_size_of_the_protocol(harness, tmp_path):
    (tmp_path / "ten.toml").write_text(PROTOCOL.format(size=10, classes=10))
    digits_npz(tmp_path / "ten.npz", np.zeros((300, 10, 10, 1), np.uint8))
    before = contents(tmp_path)
    words = ["train", "--backbone", "dit-xs-4", "--protocol", "ten.toml", "--data", "ten.npz", "--out", "run"]
    assert not refused(harness(*words), "input_size 10 is not divisible by patch 4", "dit-*-2")
    assert contents(tmp_path) == before


def test_images_of_another_size_than_the_protocol(harness, tmp_path):
    (tmp_path / "sixteen.toml").write_text(PROTOCOL.format(size=16, classes=10))
    digits_npz(tmp_path / "eight.npz")
    words = ["train", "--backbone", "dit-xs-4", "--protocol", "sixteen.toml", "--data", "eight.npz", "--out", "run"]
    assert not refused(harness(*words), "images (8, 8, 1)", "(16, 16, 1)")
    assert not (tmp_path / "run").exists()


def test_corrupt_checkpoint_in_training(harness, run):
    for step in (2, 4):
        path = run / "checkpoints" / f"step-{step:08d}" / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    before = contents(run)
    besides = refused(
        harness(*TRAIN, "--steps", 6, "--out", run),
        "no intact checkpoint is left in", run / "checkpoints", "model.safetensors does not match its checksum", "--out",
    )  # fmt: skip
    assert sum("trying the one before it" in line for line in besides) == 2
    assert contents(run) == before


def test_corrupt_snapshot_in_sampling(harness, run):
    path = run / "snapshots" / "step-00000004" / "ema.safetensors"
    data = path.read_bytes()
    path.unlink()  # a hard link: the checkpoint's own file stays whole
    path.write_bytes(data[:-100])
    before = contents(run)
    assert not refused(
        harness("sample", "--run", run, "--samples", 4, "--sampling-steps", 2),
        "ema.safetensors does not match its checksum", run / "snapshots" / "step-00000004",
    )  # fmt: skip
    assert contents(run) == before


@pytest.mark.parametrize("text", ["", "{", '{"schema": 1}', '{"schema": 1, "step": 4, "files": {"../ema": {}}}', "[]"])
def test_corrupt_state_of_a_snapshot(text, harness, run):
    (run / "snapshots" / "step-00000004" / "state.json").write_text(text)
    before = contents(run)
    assert not refused(harness("sample", "--run", run, "--samples", 4), "step-00000004")
    assert contents(run) == before


def evaluated(harness, path, *words):
    """Evaluate a file that must be refused; it and its folder stay as they were."""
    before = contents(path.parent)
    result = harness("evaluate", path, *words)
    assert contents(path.parent) == before
    return result


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.99])
def test_truncated_npz(keep, harness, tmp_path):
    path = digits_npz(tmp_path / "cut.npz")
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    assert not refused(evaluated(harness, path), path, "cut off while it was written", "make it again")


def test_damaged_npz(harness, tmp_path):
    path = digits_npz(tmp_path / "damaged.npz")
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 255
    path.write_bytes(data)
    assert not refused(evaluated(harness, path), path, "arr_0", "make it again")


def test_float_arr_0(harness, tmp_path):
    path = digits_npz(tmp_path / "float.npz", load().images[:300].astype(np.float32) / 255)
    assert not refused(evaluated(harness, path), path, "arr_0 is float32 (300, 8, 8, 1) with values in [0, 1]", "uint8")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((300, 8, 8), "arr_0 is uint8 (300, 8, 8)"),
        ((300, 1, 8, 8), "channels first"),
        ((300, 8, 8, 2), "C 1 or 3"),
        ((300, 16, 16, 1), "images are (16, 16, 1), but protocol 'digits' has (8, 8, 1)"),
        ((300, 8, 8, 3), "images are (8, 8, 3), but protocol 'digits' has (8, 8, 1)"),
    ],
)
def test_wrongly_shaped_arr_0(shape, message, harness, tmp_path):
    path = digits_npz(tmp_path / "shape.npz", np.zeros(shape, np.uint8))
    assert not refused(evaluated(harness, path), path, message)


def test_objects_in_an_npz_are_not_executed(harness, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    path = tmp_path / "trap.npz"
    np.savez(path, arr_0=np.array([Trap()], dtype=object))
    assert not refused(evaluated(harness, path), path, "Python objects")
    assert not (tmp_path / "executed").exists()


def test_fewer_samples_than_a_metric_needs(harness, tmp_path):
    path = digits_npz(tmp_path / "few.npz", count=99)
    assert not refused(evaluated(harness, path), "99", "100")


@pytest.mark.parametrize("label", [-1, 10])
def test_label_outside_the_classes_in_samples(label, harness, tmp_path):
    labels = load().labels[:300].copy()
    labels[7] = label
    path = digits_npz(tmp_path / "labels.npz", labels=labels)
    assert not refused(evaluated(harness, path), path, f"label {label} of image 7 is outside the 10 classes (0 to 9)")


@pytest.mark.parametrize(("classes", "label"), [(9, 9), (10, -3)])
def test_label_outside_the_classes_in_training_data(classes, label, harness, tmp_path):
    labels = load().labels[:300].copy()
    labels[5] = label
    (tmp_path / "mine.toml").write_text(PROTOCOL.format(size=8, classes=classes))
    digits_npz(tmp_path / "mine.npz", labels=labels)
    before = contents(tmp_path)
    words = ["train", "--backbone", "dit-xs-4", "--protocol", "mine.toml", "--data", "mine.npz", "--out", "run"]
    assert not refused(harness(*words), "'npz'", f"label {label}", f"classes 0 to {classes - 1}")
    assert contents(tmp_path) == before


def test_training_data_without_labels_or_cut_off(harness, tmp_path):
    (tmp_path / "mine.toml").write_text(PROTOCOL.format(size=8, classes=10))
    np.savez(tmp_path / "bare.npz", arr_0=load().images[:300])
    (tmp_path / "cut.npz").write_bytes((tmp_path / "bare.npz").read_bytes()[:5000])
    words = ["train", "--backbone", "dit-xs-4", "--protocol", "mine.toml", "--out", "run", "--data"]
    assert not refused(harness(*words, "bare.npz"), "bare.npz", "no labels (arr_1)")
    assert not refused(harness(*words, "cut.npz"), "cut.npz", "cut off")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "difference"),
    [
        (["--seed", "1"], "seed is 0 there and 1 here"),
        (["--set", "weight_decay=0.1"], "recipe.weight_decay is 0.0 there and 0.1 here"),
        (["--backbone", "dit-xs-2"], "backbone is 'dit-xs-4' there and 'dit-xs-2' here"),
    ],
)
def test_output_folder_of_another_run(words, difference, harness, run):
    before = contents(run)
    assert not refused(harness(*TRAIN, *words, "--out", run), run, "holds another run", difference, "--out")
    assert contents(run) == before


@pytest.mark.parametrize(
    ("words", "name"), [(["--precision", "bfloat16"], "precision"), (["--micro-batch", "5"], "micro-batch")]
)
def test_what_a_run_has_frozen_is_not_changed(words, name, harness, run):
    before = contents(run)
    refused(harness(*TRAIN, *words, "--steps", 6, "--out", run), "frozen", f"leave out --{name}", "--fork")
    assert contents(run) == before


def test_output_folder_that_holds_other_files(harness, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter-1.tex").write_text("precious")
    before = contents(tmp_path)
    assert not refused(harness(*TRAIN, "--out", "thesis"), "--out thesis", "other files", "empty folder")
    assert contents(tmp_path) == before


def test_out_that_is_a_file(harness, tmp_path):
    (tmp_path / "notes.txt").write_text("precious")
    for words in ([*TRAIN, "--out", "notes.txt"], [*TRAIN, "--out", "notes.txt/run"], ["report", "--out", "notes.txt"]):
        assert not refused(harness(*words), "notes.txt", "is a file", "folder")
        assert contents(tmp_path) == {Path("notes.txt"): b"precious"}


def test_run_file_of_a_newer_schema(harness, run):
    path = run / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 99}))
    before = contents(run)
    for words in ([*TRAIN, "--steps", 6, "--out", run], ["sample", "--run", run]):
        assert not refused(harness(*words), path, "newer harness (schema 99)", "update")
    assert contents(run) == before


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"schema": 1}', '{"schema": "1"}', "\udcff\udcfe", '{"schema": 1e999}', '{"schema": NaN}'],
)
def test_broken_run_file(text, harness, run):
    (run / "run.json").write_bytes(text.encode(errors="surrogateescape"))
    before = contents(run)
    for words in ([*TRAIN, "--steps", 6, "--out", run], ["sample", "--run", run]):
        assert not refused(harness(*words), run / "run.json")
    assert contents(run) == before


@pytest.mark.parametrize(
    ("part", "item", "value"),
    [
        ("resolved", "mesh", 1.5), ("resolved", "threads", "2"), ("resolved", "precision", None), ("resolved", "strange", 1),
        ("identity", "recipe", {"batch": "many"}), ("protocol", "samples", [1]), ("environment", None, [1]),
    ],
)  # fmt: skip
def test_items_of_a_run_file_that_are_of_another_type(part, item, value, harness, run):
    path = run / "run.json"
    data = json.loads(path.read_text())
    data[part] = value if item is None else {**data[part], item: value}
    path.write_text(json.dumps(data))
    assert not refused(harness("sample", "--run", run, "--samples", 4), path)


def test_second_process_in_the_same_run(harness, run):
    before = contents(run)
    with lock_folder(run):
        for words in ([*TRAIN, "--steps", 6, "--out", run], ["sample", "--run", run, "--samples", 4]):
            assert not refused(harness(*words), "another process is using", run, "wait for it or stop it")
    assert contents(run) == before


def test_folder_without_permission(harness, tmp_path, monkeypatch):
    # Root may write anywhere, so the system's answer is put in by hand.
    def deny(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", deny)
    assert not refused(
        harness(*TRAIN, *FIXED, "--out", tmp_path / "run"), tmp_path / "run", "Permission denied", code=1
    )


# A disk that is really full: a tmpfs of a few megabytes, in a mount namespace of the process's own.
NAMESPACE = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]
FULL = """
set -u
mount -t tmpfs -o size=20m tmpfs "$1"  || exit 99
"$2" -m harness $3; echo "CODE $?"
find "$1" -type f -size +0 | sort
echo "AGAIN"
mount -o remount,size=300m "$1"
"$2" -m harness $3; echo "CODE $?"
cat "$1/run/log.jsonl"
"""


def can_mount(folder):
    try:
        done = subprocess.run(
            [*NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", str(folder)], capture_output=True, timeout=30
        )
    except FileNotFoundError:
        return False
    return done.returncode == 0


def test_full_disk_while_a_checkpoint_is_written(trained, harness, tmp_path, monkeypatch):
    words = [*TRAIN, *FIXED, "--steps", "4", "--out", tmp_path / "disk" / "run"]
    (tmp_path / "disk").mkdir()
    if can_mount(tmp_path / "disk"):
        script = ["sh", "-c", FULL, "sh", tmp_path / "disk", sys.executable, " ".join(map(str, words))]
        done = subprocess.run(
            [*NAMESPACE, *map(str, script)], capture_output=True, text=True, timeout=200, cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        first, again = done.stdout.split("AGAIN")
        left = [line.rpartition("/run/")[2] for line in first.partition("CODE 1\n")[2].splitlines()]
        second = again.partition("CODE 0\n")[2]
        stderr = done.stderr
    else:  # no namespaces here: the system's own words for a full disk, put in by hand

        def full(path, *_):
            path.write_bytes(b"a part of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(tensor_files, "write", full)
            code, _, stderr = harness(*words)
        assert code == 1
        left = [str(path) for path in contents(tmp_path / "disk" / "run")]
        assert harness(*words)[0] == 0
        second = (tmp_path / "disk" / "run" / "log.jsonl").read_text()
    refused(
        (1, "", stderr), "the disk is full", "disk/run/checkpoints", "free some space and repeat the command", code=1
    )
    assert "run.json" in left and not [path for path in left if "partial" in path or "safetensors" in path], left
    assert second == (trained / "log.jsonl").read_text()


def test_full_disk_while_samples_are_written(harness, run, monkeypatch):
    # /dev/full answers every write as a full disk does, and every read without end: it stands where files are only
    # written. Only the link to it is ever renamed or removed.
    words = ["sample", "--run", run, "--samples", "100", "--sampling-steps", "2", "--batch", "50"]
    assert harness(*words)[0] == 0
    (done,) = run.glob("samples/*/samples.npz")
    whole = done.read_bytes()
    shards = done.parent / "shards"
    for path in done.parent.iterdir():
        path.unlink()
    shards.mkdir()
    (shards / "shard-00000050.npy.partial").symlink_to("/dev/full")
    assert not refused(harness(*words), "the disk is full", "shard-00000050.npy", "repeat the command", code=1)
    left = sorted(path.name for path in shards.iterdir() if not path.is_symlink())
    assert left == ["shard-00000000.npy"] and not done.exists()
    (shards / "shard-00000050.npy.partial").unlink()
    drawn = []
    from harness.engines.torch.sampling import TorchSampler

    draw = TorchSampler.draw
    monkeypatch.setattr(
        TorchSampler, "draw", lambda self, index, *rest: (drawn.append(index[0]), draw(self, index, *rest))[1]
    )
    assert harness(*words)[0] == 0
    assert drawn == [50]  # what had been saved was not drawn again
    assert done.read_bytes() == whole
    assert Path("/dev/full").is_char_device()
