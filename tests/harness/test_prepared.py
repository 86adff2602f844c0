"""The form of prepared data sets on the disk, and that training maps them."""

import dataclasses
import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from harness import registry
from harness.cli import group
from harness.data import prepared
from harness.errors import UserError
from harness.io import files
from harness.planning.plan import missing
from harness.planning.request import make_request


def make(folder, count=600, size=8, classes=3, name="mine", channels=3):
    """A prepared data set of noise."""
    folder.mkdir()
    random = np.random.RandomState(0)
    images = random.randint(0, 256, (count, size, size, channels)).astype(np.uint8)
    labels = np.sort(random.randint(0, classes, count)).astype(np.int64)
    np.save(folder / "images.npy", images)
    np.save(folder / "labels.npy", labels)
    step = prepared.CHUNK_IMAGES
    meta = prepared.Meta(
        name=name,
        shape=images.shape,
        crop="adm-center",
        classes=tuple(f"class-{i}" for i in range(classes)),
        chunks=tuple(prepared.chunk_sha256(images[i : i + step], labels[i : i + step]) for i in range(0, count, step)),
        source={"kind": "class folders"},
    )
    meta.write(folder)
    return meta, images, labels


def refused(call):
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


PROTOCOL = """
name = "tiny"
dataset = "prepared"
resolution = 8
image_channels = 3
num_classes = 3
input_size = 8
in_channels = 3
samples = 1000
suite = "embedded"
"""


def test_a_prepared_set_is_mapped_and_its_hash_is_not_computed_again(tmp_path, monkeypatch):
    meta, images, labels = make(tmp_path / "set")
    assert len(meta.chunks) == 3 and meta.images == 600 and meta.resolution == 8
    monkeypatch.setattr(prepared, "chunk_sha256", None)
    data = registry.datasets.get("prepared").load(tmp_path / "set")
    assert isinstance(data.images, np.memmap) and not data.images.flags.writeable
    assert np.array_equal(data.images, images) and np.array_equal(data.labels, labels)
    assert data.labels.dtype == np.int64 and data.name == "mine"
    assert data.sha256 == meta.sha256 == json.loads((tmp_path / "set" / "meta.json").read_text())["sha256"]
    assert data.downsampled(4) is data


def test_the_hash_is_of_images_labels_classes_and_nothing_else(tmp_path):
    meta, images, labels = make(tmp_path / "set")
    content = {
        "schema": 1, "shape": [600, 8, 8, 3], "chunk_images": 256,
        "chunks": list(meta.chunks), "classes": ["class-0", "class-1", "class-2"],
    }  # fmt: skip
    assert meta.sha256 == files.sha256_json(content)
    assert meta.chunks[1] == hashlib.sha256(images[256:512].tobytes() + labels[256:512].tobytes()).hexdigest()
    for same in ({"name": "other"}, {"source": {}}, {"notes": ("x",)}, {"software": {"pillow": "1"}}):
        assert dataclasses.replace(meta, **same).sha256 == meta.sha256
    for other in (
        {"classes": ("class-1", "class-0", "class-2")},
        {"chunks": meta.chunks[::-1]},
        {"shape": (600, 8, 8, 1)},
    ):
        assert dataclasses.replace(meta, **other).sha256 != meta.sha256


def edit(path, **changes):
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, **changes}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "meta.json").unlink(), "no prepared data set"),
        (lambda folder: (folder / "meta.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "meta.json").write_text("[]"), "not a data set file"),
        (lambda folder: edit(folder / "meta.json", schema=2), "newer harness"),
        (lambda folder: edit(folder / "meta.json", classes=["a", "b", "c"]), "contradicts its own hash"),
        (lambda folder: edit(folder / "meta.json", shape=[600, 8, 8]), "contradicts its own hash"),
        (lambda folder: edit(folder / "meta.json", chunk_images=128), "contradicts its own hash"),
        (lambda folder: np.save(folder / "images.npy", np.zeros((600, 8, 8, 1), np.uint8)), "where meta.json says"),
        (lambda folder: np.save(folder / "images.npy", np.zeros((600, 8, 8, 3), np.int8)), "where meta.json says"),
        (lambda folder: np.save(folder / "labels.npy", np.full(600, 3)), "image 0 has label 3"),
        (lambda folder: np.save(folder / "labels.npy", np.zeros(599, np.int64)), "where meta.json says"),
        (lambda folder: (folder / "images.npy").write_bytes(b"x"), "images.npy cannot be read"),
        (lambda folder: _cut(folder / "images.npy"), "images.npy cannot be read"),
        (lambda folder: _zip(folder / "images.npy"), "images.npy cannot be read"),
        (lambda folder: _zip(folder / "labels.npy"), "labels.npy cannot be read"),
        (lambda folder: np.save(folder / "images.npy", np.array([{}], object), allow_pickle=True), "cannot be read"),
    ],
)
def test_what_is_not_whole_is_refused(tmp_path, damage, message):
    make(tmp_path / "set")
    damage(tmp_path / "set")
    assert message in refused(lambda: prepared.load(tmp_path / "set"))


def _cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def _zip(path):
    with path.open("wb") as file:
        np.savez(file, np.zeros(3))


def test_a_plan_names_the_command_that_is_missing(tmp_path):
    (tmp_path / "tiny.toml").write_text(PROTOCOL)

    def lacks(protocol, data=None):
        found = missing(make_request(backbone="dit-xs-2", protocol=str(protocol), steps=1, data=data))
        return next((each for each in found if each.startswith("data set")), None)

    assert "`harness data prepare imagenet --from PATH --out imagenet-256 --resolution 256`" in lacks("imagenet-256")
    assert "--resolution 512" in lacks("imagenet-512") and "--resolution 8`" in lacks(tmp_path / "tiny.toml")
    make(tmp_path / "set")
    assert lacks(tmp_path / "tiny.toml", tmp_path / "set") is None
    assert "is no prepared data set" in lacks(tmp_path / "tiny.toml", tmp_path)
    assert "prepared at 8 pixels, 256 are wanted" in lacks("imagenet-256", tmp_path / "set")
    make(tmp_path / "other", count=4, size=256)
    assert "is data set 'mine'" in lacks("imagenet-256", tmp_path / "other")
    make(tmp_path / "real", count=4, size=256, name="imagenet")
    assert "real holds images; encode them once by `harness data latents" in lacks("imagenet-256", tmp_path / "real")
    assert "is data set 'mine'" in refused(lambda: registry.datasets.get("imagenet").load(tmp_path / "other"))
    edit(tmp_path / "real" / "meta.json", classes=["a", "b", "c"])
    assert "contradicts its own hash" in lacks("imagenet-256", tmp_path / "real")


LARGE = """
import resource, sys
from pathlib import Path
import numpy as np
from harness.data.load import check_labels, training_data
from harness.planning.plan import missing
from harness.planning.request import make_request
request = make_request(backbone="dit-xs-2", protocol="tiny.toml", steps=1, data=Path("set"))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert missing(request) == []
data = training_data(request.protocol, request.data)
check_labels(data, 3)
print(request.run_spec(data).dataset_sha256)
batch = data.images[np.arange(0, len(data), len(data) // 256)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_set_larger_than_memory_is_begun_at_once(tmp_path):
    """5 GB of images, of which the disk holds none: whatever read them all would take long and be seen."""
    meta, _, labels = make(tmp_path / "set")
    shape, step = (400_000, 64, 64, 3), prepared.CHUNK_IMAGES
    meta = dataclasses.replace(meta, shape=shape, chunks=meta.chunks[:1] * -(-shape[0] // step))
    with (tmp_path / "set" / "images.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        file.truncate(file.tell() + int(np.prod(shape)))
    np.save(tmp_path / "set" / "labels.npy", np.resize(labels, shape[0]))
    meta.write(tmp_path / "set")
    (tmp_path / "tiny.toml").write_text(PROTOCOL.replace(" = 8", " = 64"))
    done = subprocess.run([sys.executable, "-c", LARGE], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    sha256, kilobytes = done.stdout.split()
    assert sha256 == meta.sha256
    assert int(kilobytes) < 300_000


@pytest.mark.parametrize("framework", ["torch", pytest.param("jax", marks=pytest.mark.slow)])
def test_training_on_a_mapped_set_is_training_on_its_images(tmp_path, monkeypatch, framework):
    if framework == "jax":
        pytest.importorskip("jax")
    _, images, labels = make(tmp_path / "set")
    np.savez(tmp_path / "same.npz", arr_0=images, arr_1=labels)
    (tmp_path / "tiny.toml").write_text(PROTOCOL)
    (tmp_path / "npz.toml").write_text(PROTOCOL.replace('"prepared"', '"npz"'))
    monkeypatch.chdir(tmp_path)
    words = [
        "--backbone",
        "dit-xs-4",
        "--steps",
        "2",
        "--set",
        "batch=8",
        "--precision",
        "float32",
        "--micro-batch",
        "8",
    ]
    for protocol, data in (("tiny", "set"), ("npz", "same.npz")):
        more = ["--protocol", f"{protocol}.toml", "--data", data, "--out", protocol, "--framework", framework]
        done = CliRunner().invoke(group, ["train", *words, *more], catch_exceptions=False)
        assert done.exit_code == 0, done.output
    assert (tmp_path / "tiny" / "log.jsonl").read_bytes() == (tmp_path / "npz" / "log.jsonl").read_bytes()
    run = json.loads((tmp_path / "tiny" / "run.json").read_text())
    assert run["identity"]["dataset_sha256"] == prepared.read_meta(tmp_path / "set").sha256
