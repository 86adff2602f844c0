"""Formats of image files, and sources whose labels are elsewhere or nowhere: columns of other names, .json members, tars of
class folders, flat folders."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from click.testing import CliRunner
from PIL import Image

from harness import registry
from harness.cli import group
from harness.data.images import ImageSet
from harness.data.load import check_labels
from harness.data.prepare import prepare
from harness.data.sources import open_index
from harness.errors import UserError
from harness.images.open import open_images
from harness.systems.spec import Component, System

IMAGES = np.random.RandomState(0).randint(0, 4, (6, 16, 16, 3)).astype(np.uint8) * 60


def encoded(image, kind, **options):
    out = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(out, kind, **options)
    return out.getvalue()


def png(i):
    return encoded(IMAGES[i], "PNG")


def tar(path, members):
    with tarfile.open(path, "w") as out:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return path


def put(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


KINDS = {"bmp": "BMP", "gif": "GIF", "tif": "TIFF", "TIFF": "TIFF", "jfif": "JPEG"}


@pytest.mark.parametrize("ending", KINDS)
def test_formats_are_read_in_folders_and_tars(tmp_path, ending):
    image = Image.fromarray(IMAGES[0][..., 0])
    data = encoded(image, KINDS[ending])
    stored = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    folder = put(tmp_path / "d", {f"c/a.{ending}": data})
    packed = tar(tmp_path / "a.tar", {f"a.{ending}": data, "a.cls": b"0"})
    for path in (folder, packed):
        source = open_images(path)
        found = source.array()[0]
        np.testing.assert_array_equal(found if found.shape[-1] == 3 else found.repeat(3, -1), stored)
        assert source.lossy == (ending == "jfif")
        assert prepare("mine", path, tmp_path / f"out-{path.name}", resolution=16).meta.images == 1
        np.testing.assert_array_equal(np.load(tmp_path / f"out-{path.name}" / "images.npy")[0], stored)


@pytest.mark.parametrize("ending", ["bmp", "gif", "tif"])
def test_a_format_under_the_name_of_another_and_a_cut_file_are_refused(tmp_path, ending):
    data = encoded(IMAGES[0], KINDS[ending])
    with pytest.raises(UserError, match="nor what its ending says"):
        open_images(put(tmp_path / "a", {"x.png": data}))
    with pytest.raises(UserError):
        open_images(put(tmp_path / "b", {f"x.{ending}": data[: len(data) // 2]})).array()


def test_what_would_lose_something_is_refused(tmp_path):
    several = {"save_all": True, "append_images": [Image.fromarray(IMAGES[1])]}
    cases = {
        "a.gif": (encoded(Image.fromarray(IMAGES[0]), "GIF", **several), "an animation"),
        "a.tif": (encoded(Image.fromarray(IMAGES[0]), "TIFF", **several), "an animation"),
        "b.tif": (encoded(Image.fromarray(IMAGES[0][..., 0].astype(np.uint16) * 256), "TIFF"), "colour mode I;16"),
        "c.tif": (encoded(IMAGES[0], "TIFF", compression="jpeg"), "stored with loss"),
    }
    for i, (name, (data, words)) in enumerate(cases.items()):
        with pytest.raises(UserError, match=words):
            open_images(put(tmp_path / str(i), {name: data}))
    source = put(tmp_path / "in", {"c/a.gif": cases["a.gif"][0]})
    meta = prepare("mine", source, tmp_path / "out", resolution=16).meta
    assert "only the first image of several in a GIF: 1 (a.gif)" in meta.notes


def table(path, columns, names=None, label=None):
    features = {"info": {"features": {label: {"names": names, "_type": "ClassLabel"}}}}
    metadata = {"huggingface": json.dumps(features)} if names else None
    parquet.write_table(pa.table(columns).replace_schema_metadata(metadata), path)
    return path


PICTURES = [{"bytes": png(i), "path": None} for i in range(4)]


@pytest.mark.parametrize(
    ("image", "label"), [("img", "label"), ("img", "fine_label"), ("image", "labels"), ("pic", "cls")]
)
def test_columns_of_other_names(tmp_path, image, label):
    more = {"coarse_label": [7, 7, 7, 7]} if label == "fine_label" else {}
    path = table(tmp_path / "a.parquet", {**more, image: PICTURES, label: [1, 0, 1, 0]}, ["cat", "dog"], label)
    index = open_index(path, "mine")
    assert index.classes == ("cat", "dog") and index.labels.tolist() == [0, 0, 1, 1]
    assert index.notes == (() if label == "label" else (f"labels are the column {label}",))
    meta = prepare("mine", path, tmp_path / "out", resolution=16).meta
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "images.npy"), IMAGES[[1, 3, 0, 2]])
    assert meta.classes == ("cat", "dog")


def test_columns_that_differ_and_labels_that_are_words(tmp_path):
    table(tmp_path / "0.parquet", {"img": PICTURES, "label": [0, 0, 0, 0]})
    table(tmp_path / "1.parquet", {"image": PICTURES, "label": [0, 0, 0, 0]})
    with pytest.raises(UserError, match="1.parquet has columns image and label, and .*0.parquet img and label"):
        open_index(tmp_path, "mine")
    words = table(tmp_path / "words.parquet", {"img": PICTURES, "label": ["a", "b", "c", "d"]})
    with pytest.raises(UserError, match="has columns img, label; wanted are"):
        open_index(words, "mine")


def unlabelled_table(folder):
    return table(folder / "a.parquet", {"image": PICTURES, "caption": list("abcd")})


def flat(folder):
    return put(folder / "flat", {f"{i}.png": png(i) for i in range(4)})


def unlabelled_tar(folder):
    return tar(folder / "a.tar", {**{f"{i}.png": png(i) for i in range(4)}, "0.json": b'{"caption": "x"}'})


@pytest.mark.parametrize("make", [unlabelled_table, flat, unlabelled_tar])
def test_images_without_labels_are_one_class_and_that_is_said(tmp_path, make):
    meta = prepare("mine", make(tmp_path), tmp_path / "out", resolution=16).meta
    assert meta.classes == ("unlabelled",) and any("there are no labels" in each for each in meta.notes)
    assert np.load(tmp_path / "out" / "labels.npy").tolist() == [0] * 4
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "images.npy"), IMAGES[:4])
    with pytest.raises(UserError):
        open_index(make(tmp_path), "imagenet")


@pytest.mark.parametrize("document", ["{}", '{{"label": {}, "caption": "x"}}', '{{"cls": {}}}'])
def test_labels_in_json_members(tmp_path, document):
    members = {}
    for i, label in enumerate((1, 0, 2, 1)):
        members |= {f"{i}.json": document.format(label).encode(), f"{i}.png": png(i)}
    path = tar(tmp_path / "a.tar", members)
    assert open_images(path).labels.tolist() == [1, 0, 2, 1]
    assert open_index(path, "mine").labels.tolist() == [0, 1, 1, 2]
    with pytest.raises(UserError, match="some of its tars have labels"):
        tar(tmp_path / "b.tar", {"9.png": png(4)})
        open_index(tmp_path, "mine")


def test_tars_of_class_folders(tmp_path):
    one = {"train/bird/0.png": png(0), "train/cat/1.png": png(1)}
    two = {"train/cat/2.png": png(2), "train/dog/3.png": png(3)}
    shards = tmp_path / "shards"
    shards.mkdir()
    tar(shards / "0.tar", one)
    tar(shards / "1.tar", two)
    source = open_images(shards)
    assert source.labels.tolist() == [0, 1, 1, 2]  # each shard alone would number its own from 0
    np.testing.assert_array_equal(source.array(), IMAGES[:4])
    index = open_index(shards, "mine")
    assert index.classes == ("bird", "cat", "dog") and index.labels.tolist() == [0, 1, 1, 2]
    assert open_images(shards / "0.tar").labels.tolist() == [0, 1]
    numbered = tar(tmp_path / "n.tar", {"0/a.png": png(0), "1/a.png": png(1)})
    assert open_images(numbered).labels.tolist() == open_index(numbered, "mine").labels.tolist() == [0, 1]
    wrapped = tar(tmp_path / "w.tar", {"samples/a.png": png(0), "samples/b.png": png(1)})
    assert open_images(wrapped).labels is None
    tar(shards / "2.tar", {"9.png": png(4)})
    with pytest.raises(UserError):
        open_images(shards)


TASK = """name = "plain"
dataset = "npz"
resolution = 8
image_channels = 1
num_classes = {classes}
input_size = 8
in_channels = 1
samples = 100
suite = "embedded"
"""


@pytest.mark.parametrize("backbone", ["dit-xs-4", "adm-xs"])
def test_a_model_without_classes_is_trained_sampled_and_judged(tmp_path, monkeypatch, backbone):
    from harness.data.digits import load

    monkeypatch.chdir(tmp_path)
    np.savez("plain.npz", load().images[:200])
    Path("plain.toml").write_text(TASK.format(classes=0))
    words = ["run", "--backbone", backbone, "--protocol", "plain.toml", "--data", "plain.npz", "--steps", "2"]
    words += ["--sampling-steps", "2", "--device", "cpu", "--precision", "float32", "--no-report", "--set", "batch=8"]
    done = CliRunner().invoke(group, words)
    assert done.exit_code == 0, done.exception
    (path,) = tmp_path.glob("runs/*/samples/*/samples.npz")
    with np.load(path) as samples:
        assert samples["arr_1"].tolist() == [0] * 100
    (records,) = tmp_path.glob("runs/*/records.jsonl")
    assert len(records.read_text().splitlines()) == 6
    Path("plain.toml").write_text(TASK.format(classes=3))
    done = CliRunner().invoke(group, words)
    assert "has no labels (arr_1)" in str(done.exception) and "num_classes = 0" in str(done.exception)


def test_an_unconditional_network_fits_a_protocol_with_classes():
    arguments = {"input_size": 8, "in_channels": 1, "num_classes": 0}
    system = System(
        name="u", protocol="digits", base=Component(backbone="adm-xs", arguments=arguments), summary="without classes"
    )
    assert system.params() > 0


def test_a_class_without_images_is_named_before_training(caplog):
    images = ImageSet(name="mine", images=np.zeros((3, 8, 8, 1), np.uint8), labels=np.array([1, 2, 4]))
    check_labels(images, 5)
    assert "data set 'mine' has no image of class 0, nor have 1 more" in caplog.text


@pytest.mark.parametrize(
    ("name", "protocol", "scale"),
    [("adm-g-64", "imagenet-64", 1.0), ("adm-g-128", "imagenet-128", 0.5), ("adm-g-256-uncond", "imagenet-256", 10.0)],
)
def test_systems_of_adm_in_pixels_and_without_classes(name, protocol, scale):
    """Scales: README.md of openai/guided-diffusion."""
    guided, plain = registry.systems.get(name), registry.systems.get(name.replace("adm-g", "adm"))
    assert guided.protocol == plain.protocol == protocol and guided.classifier.scale == scale
    assert plain.classifier is None and plain.base == guided.base
    assert guided.base.arguments.get("num_classes", 1000) == (0 if "uncond" in name else 1000)
    task = registry.protocols.get(protocol)
    if "uncond" not in name:
        assert (task.space, task.resolution, task.suite) == ("pixels", int(protocol.partition("-")[2]), "adm")
