"""Folders that are no classes: of operating systems, of the harness, empty. And classes without images, in every source."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from fake_imagenet import jpeg
from PIL import Image

from harness.data.prepare import prepare
from harness.data.sources import open_index
from harness.errors import UserError
from harness.images.open import open_images

PICTURE = jpeg(Image.new("RGB", (20, 20)))
NOTHING = {}
NO_CLASSES = {
    "__MACOSX": {"._a.jpg": b"x"},
    "lost+found": NOTHING,
    "@eaDir": {"a.jpg/SYNOPHOTO_THUMB_XL.jpg": PICTURE},
    "cache": {"features-0.npz": b"x"},
    "empty": NOTHING,
}


def tree(folder, content):
    """Files below `folder` by their names; a dictionary is a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in content.items():
        if isinstance(data, dict):
            tree(folder / name, data)
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
    return folder


def tar(path, members):
    with tarfile.open(path, "w") as out:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return path


def table(path, labels, data=PICTURE, image="image", label="label", names=None):
    columns = {label: labels, image: [{"bytes": data, "path": f"{i}.jpg"} for i in range(len(labels))]}
    metadata = None
    if names:
        metadata = {"huggingface": json.dumps({"info": {"features": {label: {"names": names, "_type": "ClassLabel"}}}})}
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns).replace_schema_metadata(metadata), path)
    return path


@pytest.mark.parametrize("other", NO_CLASSES)
@pytest.mark.parametrize("classes", [("bird", "cat"), ("0", "1")])
def test_a_folder_without_images_is_no_class_and_is_named(tmp_path, other, classes):
    content = {name: {"a.jpg": PICTURE} for name in classes}
    source = tree(tmp_path / "in", {**content, other: NO_CLASSES[other]})
    index, images = open_index(source, "mine"), open_images(source)
    assert index.classes == classes and index.labels.tolist() == images.labels.tolist() == [0, 1]
    for notes in (index.notes, images.notes):
        assert f"1 folders that are no classes, without images, were left out: {other}" in notes


@pytest.mark.parametrize("other", NO_CLASSES)
def test_such_a_folder_within_a_class_or_beside_images(tmp_path, other):
    if other in ("cache", "empty"):  # within a class only known names are passed over
        flat = tree(tmp_path, {"a.jpg": PICTURE, other: NO_CLASSES[other]})
        assert open_images(flat).notes[0].endswith(f"were left out: {other}")
        return
    source = tree(tmp_path, {"bird": {"a.jpg": PICTURE, other: NO_CLASSES[other]}})
    assert len(open_index(source, "mine").labels) == open_images(source).count == 1


def test_what_macs_pack_into_tars_is_no_image(tmp_path):
    members = {"a.jpg": PICTURE, "a.cls": b"0", "__MACOSX/._a.jpg": b"x", "._a.jpg": b"x", "._a.cls": b"x"}
    assert open_images(tar(tmp_path / "a.tar", members)).count == 1
    assert open_index(tmp_path / "a.tar", "mine").labels.tolist() == [0]
    inner = tar(tmp_path / "inner", {"a.jpg": PICTURE, "._a.jpg": b"x"}).read_bytes()
    assert len(open_index(tar(tmp_path / "b.tar", {"cat.tar": inner}), "mine").labels) == 1


def numbered_folders(folder):
    return tree(folder, {name: {"a.jpg": PICTURE} for name in ("1", "2", "3")})


def numbered_tar(folder):
    numbers = {f"{i}.cls": str(i).encode() for i in (1, 2, 3)}
    return tar(folder / "a.tar", {**numbers, **{f"{i}.jpg": PICTURE for i in (1, 2, 3)}})


def class_tars(folder):
    inner = {f"{i}.tar": tar(folder / "inner", {"a.jpg": PICTURE}).read_bytes() for i in (1, 2, 3)}
    return tar(folder / "all.tar", inner)


@pytest.mark.parametrize(
    "make", [numbered_folders, numbered_tar, class_tars, lambda folder: table(folder / "a.parquet", [1, 2, 3])]
)
def test_a_class_without_images_is_refused_by_its_name(tmp_path, make):
    with pytest.raises(UserError, match=r"class 0 \(label 0\) has no image; number the classes from 0, without a gap"):
        open_index(make(tmp_path), "mine")


def test_empty_classes_that_a_source_names(tmp_path):
    content = {"0": {"a.jpg": PICTURE}, "1": NOTHING, "2": {"a.jpg": PICTURE}, "5": {"a.jpg": PICTURE}}
    with pytest.raises(UserError, match=r"class 1 \(label 1\) has no image, and 2 more have none"):
        open_index(tree(tmp_path / "in", content), "mine")
    named = table(tmp_path / "a.parquet", [0, 2], names=["bird", "cat", "dog"])
    with pytest.raises(UserError, match=r"class cat \(label 1\) has no image; add images of it, or remove it"):
        open_index(named, "mine")
    inner = {f"{name}.tar": tar(tmp_path / "i", files).read_bytes() for name, files in
             {"bird": {"a.jpg": PICTURE}, "cat": {"a.txt": b"x"}}.items()}  # fmt: skip
    with pytest.raises(UserError, match=r"class cat \(label 1\) has no image"):
        open_index(tar(tmp_path / "b.tar", inner), "mine")


def test_other_members_of_a_tar_of_class_tars(tmp_path):
    inner = {f"{name}.tar": tar(tmp_path / "i", {"a.jpg": PICTURE}).read_bytes() for name in ("bird", "cat")}
    system = {"._cat.tar": b"x", "__MACOSX/._bird.tar": b"x"}
    index = open_index(tar(tmp_path / "a.tar", {"README.txt": b"x", **inner, **system}), "mine")
    assert index.classes == ("bird", "cat") and index.labels.tolist() == [0, 1]
    assert index.notes == ("1 members that are not images were left out (first: README.txt)",)
    with pytest.raises(UserError, match="tars and images side by side"):
        open_index(tar(tmp_path / "b.tar", {**inner, "z.jpg": PICTURE}), "mine")


@pytest.mark.parametrize("other", ["val.tar", "train.tar"])  # with the word of a training split, too
def test_class_tars_beside_another_tar(tmp_path, other):
    source = tree(tmp_path / "in", {})
    for name in ("n01443537", "n01440764"):
        tar(source / f"{name}.tar", {f"{name}_1.JPEG": PICTURE})
    tar(source / other, {"devkit/readme.txt": b"x"})
    index = open_index(source, "mine")
    assert index.classes == ("n01440764", "n01443537") and index.labels.tolist() == [0, 1]
    assert index.notes == (f"tars without images were left out: {other}",)
    tar(source / other, {"ILSVRC2012_val_00000001.JPEG": PICTURE})
    message = rf"{other} holds images and lies beside 2 class tars \(first: n01440764.tar\).*; move it elsewhere$"
    with pytest.raises(UserError, match=message):
        open_index(source, "mine")
    for number, name in enumerate(("n01443537.tar", "n01440764.tar", other)):  # shards of such names
        tar(source / name, {f"{number}.jpg": PICTURE, f"{number}.cls": str(number).encode()})
    assert sorted(open_index(source, "mine").labels.tolist()) == [0, 1, 2]


def test_stray_files_and_other_splits_are_named(tmp_path):
    images = {"bird": {"a.jpg": PICTURE}, "cat": {"a.jpg": PICTURE, "a.HEIC": b"x"}}
    index = open_index(tree(tmp_path / "a", {**images, "labels.csv": b"x", "z.jpg": PICTURE}), "mine")
    assert "2 files beside the images were left out (first: labels.csv)" in index.notes
    index = open_index(tree(tmp_path / "b", {"train": images, "val": images, "x.txt": b""}), "mine")
    assert index.notes[0] == "only train/ was read, without val, x.txt beside it"
    shards = tree(tmp_path / "c", {})
    numbered_tar(shards)  # a.tar, which is left out as train-0.tar has the name of a training split
    members = {"a.jpg": PICTURE, "a.cls": b"0"}
    tar(shards / "train-0.tar", members)
    parquet.write_table(pa.table({"key": ["a"], "url": ["x"]}), shards / "metadata.parquet")
    index = open_index(shards, "mine")
    assert index.labels.tolist() == [0]
    assert index.notes == ("2 files beside the images were left out (first: a.tar)",)
    table(shards / "train.parquet", [0])
    (shards / "metadata.parquet").unlink()
    with pytest.raises(UserError, match=r"images in .tar and in .parquet files side by side"):
        open_index(shards, "mine")
    notes = open_images(tree(tmp_path / "d", {**images, "records.jsonl": b""})).notes
    assert "1 files that are no images were left out" in notes
    assert "1 of them are images of a format that is not read (first: a.HEIC)" in notes


def test_parquet_with_paths_but_no_bytes_is_refused_at_once(tmp_path):
    path = table(tmp_path / "a.parquet", [0, 1, 0], data=None)
    with pytest.raises(UserError, match=r"3 of its 3 images have no bytes, but paths \(first: 0.jpg\)"):
        open_index(path, "mine")


def test_notes_reach_the_command(tmp_path):
    made = prepare(
        "mine", tree(tmp_path / "in", {"bird": {"a.jpg": PICTURE, "x.txt": b""}}), tmp_path / "out", resolution=8
    )
    assert "1 files that are no images by their names were left out (first: x.txt)" in made.meta.notes
    assert np.load(tmp_path / "out" / "labels.npy").tolist() == [0]
