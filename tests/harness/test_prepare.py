"""`harness data prepare` and `verify`: every kind of source, every bad input by its name, kills at any moment."""

import dataclasses
import fcntl
import io
import json
import os
import shutil
import sys
import tarfile

import numpy as np
import pytest
from click.testing import CliRunner
from fake_imagenet import as_parquet, as_shards, as_tars, cutting, jpeg, linked, make_tree
from PIL import Image

from harness.cli import group
from harness.data import imagenet, photographs, prepared
from harness.data.photographs import center_crop, decode
from harness.data.prepare import prepare
from harness.data.verify import verify
from harness.errors import UserError

SIZE = 16


def made(source, out, dataset="mine", resolution=SIZE, threads=2):
    return prepare(dataset, source, out, resolution=resolution, threads=threads).meta


def refused(call):
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """10 classes of 60 images."""
    folder = tmp_path_factory.mktemp("tree") / "train"
    make_tree(folder, 10, 60)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """All 1,000 classes, an image each."""
    folder = tmp_path_factory.mktemp("whole") / "train"
    make_tree(folder, 1000, 1, sides=(16, 24))
    return folder


def plain_crop(image, size):
    """The published recipe once more: from its description, and on arrays."""
    while min(image.size) >= 2 * size:
        image = halved(image)
    scale = size / min(image.size)
    array = np.asarray(
        image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    )
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top : top + size, left : left + size]


def halved(image):
    """Means of two pixels along each row, then along each column, halves rounded up."""
    if image.width % 2 or image.height % 2:
        return image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    array = np.asarray(image).astype(int)
    array = (array[:, ::2] + array[:, 1::2] + 1) // 2
    array = (array[::2] + array[1::2] + 1) // 2
    return Image.fromarray(array.astype(np.uint8))


@pytest.mark.parametrize(
    "shape", [(16, 16), (17, 16), (31, 33), (32, 32), (64, 48), (65, 97), (200, 33), (15, 40), (9, 8)]
)
def test_the_crop_is_adms(shape):
    image = cutting(np.random.RandomState(shape[0]), (210, 300)).resize(shape)
    assert np.array_equal(np.asarray(center_crop(image, SIZE)), plain_crop(image, SIZE))
    if shape == (16, 16):
        assert np.array_equal(np.asarray(center_crop(image, SIZE)), np.asarray(image))


def test_the_crop_takes_the_middle_rounded_down():
    wide = Image.fromarray(np.tile(np.arange(21, dtype=np.uint8)[None, :, None], (16, 1, 3)))
    assert np.asarray(center_crop(wide, 16))[0, :, 0].tolist() == list(range(2, 18))
    assert np.asarray(center_crop(wide.transpose(Image.Transpose.TRANSPOSE), 16))[:, 0, 0].tolist() == list(
        range(2, 18)
    )


def test_every_kind_of_source_gives_the_same_bytes(tree, tmp_path):
    classes = sorted(each.name for each in tree.iterdir())
    tars = as_tars(tree, tmp_path / "ILSVRC2012_img_train.tar")
    with tarfile.open(tars) as outer:
        outer.extractall(tmp_path / "class-tars", filter="data")
    sources = {
        "class folders": tree,
        "the folder above": tree.parent,
        "the official tar": tars,
        "its folder": tmp_path,
        "class tars": tmp_path / "class-tars",
        "shards": as_shards(tree, tmp_path / "shards", 50),
        "parquet": as_parquet(tree, tmp_path / "hub", 70, 30, classes=classes),
        "parquet of other names": as_parquet(tree, tmp_path / "plain", 600, 600, hub_names=False),
    }
    (tmp_path / "shards" / "validation-0.tar").write_bytes(b"not read")
    out = {name: tmp_path / "out" / name for name in sources}
    metas = {name: made(source, out[name]) for name, source in sources.items()}
    paths = sorted(tree.rglob("*.JPEG"))
    images, labels = (np.load(out["class folders"] / f"{name}.npy") for name in ("images", "labels"))
    assert labels.tolist() == [classes.index(path.parent.name) for path in paths]
    for row in (0, 1, 255, 256, 599):
        with Image.open(paths[row]) as image:
            assert np.array_equal(images[row], plain_crop(image, SIZE))
    for name, meta in metas.items():
        for array in ("images.npy", "labels.npy"):
            assert (out[name] / array).read_bytes() == (out["class folders"] / array).read_bytes(), name
        assert sorted(each.name for each in out[name].iterdir()) == ["images.npy", "labels.npy", "meta.json"], name
        assert meta.chunks == metas["class folders"].chunks and len(meta.chunks) == 3
        numbers = tuple(map(str, range(10)))
        assert meta.classes == (numbers if name in ("shards", "parquet of other names") else tuple(classes))
        assert str(tmp_path) not in (out[name] / "meta.json").read_text()
        assert verify(out[name]).holds
    data = prepared.load(out["parquet"])
    assert np.array_equal(data.images, images) and data.sha256 == metas["class folders"].sha256


def test_imagenet_from_every_source_is_one_data_set(whole, tmp_path):
    sources = {
        "tree": whole,
        "tar": as_tars(whole, tmp_path / "any.tar"),
        "wds": as_shards(whole, tmp_path / "wds", 300),
        "hub": as_parquet(whole, tmp_path / "hub", 400, 100),
    }
    hashes = set()
    for name, source in sources.items():
        meta = made(source, tmp_path / "out" / name, "imagenet")
        hashes.add(meta.sha256)
        assert meta.classes == imagenet.classes() and meta.images == 1000
        assert meta.notes == ("1,000 images where ImageNet's training set has 1,281,167",)
    assert len(hashes) == 1


def test_the_classes_are_ilsvrcs():
    names = imagenet.classes()
    assert len(set(names)) == 1000 and list(names) == sorted(names)
    # places that everybody knows: tench, goldfish, golden retriever, sports car, toilet tissue
    assert [names[i] for i in (0, 1, 207, 817, 999)] == [
        "n01440764",
        "n01443537",
        "n02099601",
        "n04285008",
        "n15075141",
    ]
    devkit = imagenet.devkit_ids()
    assert sorted(devkit.values()) == list(range(1, 1001))
    assert [devkit[each] for each in ("n02119789", "n02100735", "n01440764", "n03255030")] == [1, 2, 449, 1000]


def test_a_tree_that_is_not_imagenets_is_named(whole, tmp_path):
    names = imagenet.classes()

    def said(change, name):
        change(tree := linked(whole, tmp_path / name))
        assert not (tmp_path / "out").exists()
        return refused(lambda: made(tree, tmp_path / "out", "imagenet"))

    text = said(lambda tree: shutil.rmtree(tree / names[7]), "a")
    assert f"1 of the 1,000 classes are missing (first: {names[7]})" in text and "shifted" in text
    assert "1 folders are no class of ImageNet (first: extra)" in said(lambda tree: (tree / "extra").mkdir(), "b")
    text = said(lambda tree: (tree / names[3]).rename(tree / "tiger shark"), "c")
    assert f"missing (first: {names[3]})" in text and "no class of ImageNet (first: tiger shark)" in text
    text = said(lambda tree: [(tree / each).rename(tree / str(i)) for i, each in enumerate(names)], "d")
    assert "numbers" in text and "WordNet id" in text
    text = said(lambda tree: next((tree / names[5]).iterdir()).unlink(), "e")
    assert f"1 of the 1,000 classes have no image (first: {names[5]}, label 5)" in text

    def swapped(tree):
        (file,) = (tree / names[9]).iterdir()
        file.rename(tree / names[8] / file.name)
        shutil.copy(next((tree / names[8]).iterdir()), tree / names[9] / "x.JPEG")

    text = said(swapped, "f")
    assert f"1 of 1,001 labels contradict their file names (first: {names[9]}_" in text and "has label 8" in text


@pytest.mark.parametrize("pack", [as_shards, as_parquet])
def test_labels_in_another_order_are_named(whole, tmp_path, pack):
    devkit = imagenet.devkit_ids()
    orders = {
        "the devkit": (lambda label, path: devkit[path.parent.name] - 1, "the order of the devkit (ILSVRC2012_ID"),
        "ids": (lambda label, path: devkit[path.parent.name], "the labels are ILSVRC2012_ID"),
        "one": (lambda label, path: label + 1, "begin at 1"),
        "a swap": (lambda label, path: {3: 4, 4: 3}.get(label, label), "2 of 1,000 labels contradict their file names"),
    }
    for number, (relabel, message) in enumerate(orders.values()):
        source = pack(whole, tmp_path / str(number), relabel=relabel)
        text = refused(lambda source=source: made(source, tmp_path / "out", "imagenet"))
        assert message in text and not (tmp_path / "out.partial").exists()


def test_damaged_images_are_all_named_and_the_rest_is_done(tree, tmp_path, caplog):
    caplog.set_level("INFO")
    copy = linked(tree, tmp_path / "copy")
    paths = sorted(copy.rglob("*.JPEG"))
    original = {i: paths[i].read_bytes() for i in (3, 10, 300)}

    def put(i, data):
        paths[i].unlink()  # it is a link to the fixture's
        paths[i].write_bytes(data)

    put(3, original[3][: len(original[3]) // 2])
    put(10, b"<html>no such image</html>")
    put(300, b"")
    text = refused(lambda: made(copy, tmp_path / "out"))
    assert text.startswith("3 images cannot be used: ") and "repeat the command" in text
    for i, reason in ((3, "damaged or cut off"), (10, "no image that Pillow can read"), (300, "an empty file")):
        name = f"{paths[i].parent.name}/{paths[i].name}"
        assert any(name in each and reason in each for each in text.split("; ")), (name, text)
        warnings = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
        assert any(each.startswith("cannot be used") and name in each for each in warnings)
    assert not (tmp_path / "out").exists()
    journal = (tmp_path / "out.partial" / "journal.jsonl").read_text().splitlines()
    assert [json.loads(line)["unit"] for line in journal[1:]] == [2]  # two chunks hold the damaged ones
    for i, data in original.items():
        put(i, data)
    caplog.clear()
    meta = made(copy, tmp_path / "out")
    assert "continues after 88 of 600 images" in caplog.messages
    assert meta.sha256 == made(tree, tmp_path / "same").sha256
    assert content(tmp_path / "out") == content(tmp_path / "same")


def test_a_source_that_is_broken_throughout_is_given_up(tmp_path, monkeypatch):
    (tmp_path / "tree" / "a").mkdir(parents=True)
    for i in range(300):
        (tmp_path / "tree" / "a" / f"{i}.jpg").write_bytes(b"nothing")
    text = refused(lambda: made(tmp_path / "tree", tmp_path / "out"))
    assert text.startswith("100 images cannot be used (given up after 100)") and "and 95 more" in text


def test_odd_images_are_converted_as_everybody_does_and_told(tmp_path):
    picture = cutting(np.random.RandomState(0), (40, 60))
    png = io.BytesIO()
    picture.convert("P").save(png, "PNG")
    files = {
        "a.JPEG": jpeg(picture.convert("CMYK")),
        "b.JPEG": png.getvalue(),
        "c.JPEG": jpeg(picture.convert("L")),
        "d.JPEG": jpeg(picture, exif=Image.Exif()),
        "e.JPEG": jpeg(picture.convert("CMYK")),
    }
    (tmp_path / "tree" / "x").mkdir(parents=True)
    for name, data in files.items():
        (tmp_path / "tree" / "x" / name).write_bytes(data)
    (tmp_path / "tree" / "x" / "notes.txt").write_text("x")
    meta = made(tmp_path / "tree", tmp_path / "out")
    assert meta.notes == (
        "1 files that are no images by their names were left out (first: notes.txt)",
        "CMYK JPEG converted to RGB: 2 (a.JPEG, e.JPEG)",
        "P PNG converted to RGB: 1 (b.JPEG)",
    )
    images = np.load(tmp_path / "out" / "images.npy")
    for row, data in enumerate(files.values()):
        with Image.open(io.BytesIO(data)) as image:
            assert np.array_equal(images[row], plain_crop(image.convert("RGB"), SIZE))
    assert decode(png_of(picture), SIZE, "n02105855_2933.JPEG").note == "PNG under the name of a JPEG"
    assert decode(png_of(picture), SIZE, "x.png").note is None


def png_of(image):
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def test_bombs_are_refused(monkeypatch):
    monkeypatch.setattr(photographs, "MAX_PIXELS", 1000)
    with pytest.raises(UserError, match="pixels are more than"):
        decode(png_of(Image.new("RGB", (40, 40))), SIZE, "x.png")
    monkeypatch.setattr(photographs, "MAX_FILE_BYTES", 100)
    with pytest.raises(UserError, match="no image of a data set"):
        decode(bytes(101), SIZE, "x.png")


def tar(path, members):
    with tarfile.open(path, "w") as out:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return path


PICTURE = jpeg(Image.new("RGB", (20, 20)))
NOT_SOURCES = {
    "nothing": (lambda path: path / "none", "no such file or folder"),
    "an empty folder": (lambda path: path, "no class folders"),
    "another file": (lambda path: _file(path / "x.zip", b""), "cannot be prepared"),
    "no images": (lambda path: _file(path / "a" / "x.txt", b"").parent.parent, "no images"),
    "deep": (lambda path: _file(path / "a" / "b" / "x.jpg", b"").parents[2], "a folder inside a class folder"),
    "no label": (
        lambda path: tar(path / "x.tar", [("a.jpg", PICTURE), ("b.jpg", PICTURE), ("b.cls", b"0")]),
        "a.jpg has no partner",
    ),
    "no image": (lambda path: tar(path / "x.tar", [("a.cls", b"1")]), "has no partner"),
    "words": (lambda path: tar(path / "x.tar", [("a.jpg", PICTURE), ("a.cls", b"cat")]), "one whole number"),
    "twice": (lambda path: tar(path / "x.tar", [("a.jpg", b"1"), ("a.jpg", b"2"), ("a.cls", b"1")]), "twice"),
    "two": (lambda path: tar(path / "x.tar", [("a.jpg", b"1"), ("a.png", b"2"), ("a.cls", b"1")]), "label both"),
    "mixed": (lambda path: tar(path / "x.tar", [("a.tar", b""), ("a.jpg", b"2")]), "tars and images side by side"),
    "cut": (lambda path: _cut(tar(path / "x.tar", [("a.jpg", PICTURE), ("a.cls", b"1")])), "cut off"),
    "cut within": (lambda path: tar(path / "x.tar", [("n01440764.tar", PICTURE)]), "n01440764.tar cannot be read"),
    "no parquet": (lambda path: _file(path / "x.parquet", b"PAR1xxxx"), "cannot be read"),
    "columns": (lambda path: _table(path / "x.parquet", {"img": [b""], "label": [1]}), "has columns img, label"),
    "column": (lambda path: _table(path / "x.parquet", {"image": [b""], "label": [1]}), "has columns image, label"),
    "unlabelled": (lambda path: _table(path / "x.parquet", _hub([-1, -1])), "label -1, as in splits without labels"),
    "none": (lambda path: _table(path / "x.parquet", _hub([1, None])), "image 1 of row group 0 has no label"),
}


def _file(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def _cut(path):
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"ustar") + 300])
    return path


def _hub(labels):
    return {"image": [{"bytes": PICTURE, "path": "x.jpg"}] * len(labels), "label": labels}


def _table(path, columns):
    import pyarrow as pa
    import pyarrow.parquet as parquet

    parquet.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize("case", NOT_SOURCES)
def test_what_is_no_source_is_named(tmp_path, case):
    make, message = NOT_SOURCES[case]
    assert message in refused(lambda: made(make(tmp_path), tmp_path.parent / f"out-{case}"))
    assert not list(tmp_path.parent.glob(f"out-{case}*"))


def test_without_pyarrow_parquet_is_refused_with_the_fix(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    _file(tmp_path / "x.parquet", b"")
    assert "pip install pyarrow" in refused(lambda: made(tmp_path, tmp_path / "out"))


def test_nothing_is_overwritten_and_nothing_repeated(tree, tmp_path, monkeypatch):
    def run(*words):
        return CliRunner().invoke(group, ["data", "prepare", *map(str, words)])

    words = ["mine", "--from", tree, "--out", tmp_path / "out", "--resolution", SIZE]
    done = run(*words)
    assert done.exit_code == 0 and "600 images 16x16x3 in 10 classes" in done.output
    before = content(tmp_path / "out")
    document = json.loads(CliRunner().invoke(group, ["data", "prepare", *map(str, words), "--json"]).stdout)
    assert document["new"] is False and document["chunks"] == 3 and document["shape"] == [600, 16, 16, 3]
    for other in (["yours", *words[1:]], [*words[:-1], 8], [words[0], "--from", tree / "..", *words[3:-1], 17]):
        assert "holds another data set" in str(run(*other).exception)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    assert "holds something else" in str(run(*words[:4], tmp_path / "full").exception)
    assert "holds something else" in str(run(*words[:4], tmp_path / "full" / "mine.txt").exception)
    (tmp_path / "empty").mkdir()
    assert run(*words[:4], tmp_path / "empty", *words[5:]).exit_code == 0
    assert content(tmp_path / "empty") == content(tmp_path / "out") == before
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 500_000))
    text = refused(lambda: made(tree, tmp_path / "large", resolution=256))
    assert "needs 0.1 GB more, and 0.0 GB are free there" in text and not list(tmp_path.glob("large*"))
    assert "data set ''" in str(run("", *words[1:]).exception)


def test_a_partial_folder_of_another_job_is_left_alone(tree, tmp_path):
    copy = linked(tree, tmp_path / "copy")
    path = sorted(copy.rglob("*.JPEG"))[300]
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole[:100])
    refused(lambda: made(copy, tmp_path / "out"))
    assert "begun with another resolution" in refused(lambda: made(copy, tmp_path / "out", resolution=8))
    assert "begun with another data set" in refused(lambda: made(copy, tmp_path / "out", "yours"))
    extra = copy / path.parent.name / "extra.JPEG"
    extra.write_bytes(whole)
    assert "begun with another list of images" in refused(lambda: made(copy, tmp_path / "out"))
    extra.unlink()
    path.write_bytes(whole)
    journal = tmp_path / "out.partial" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes() + b'{"unit": 1, "sha')  # killed while it wrote
    assert made(copy, tmp_path / "out").sha256 == made(tree, tmp_path / "same").sha256
    (tmp_path / "busy.partial").mkdir()
    descriptor = os.open(tmp_path / "busy.partial", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert "another process is making" in refused(lambda: made(tree, tmp_path / "busy"))
    os.close(descriptor)


@pytest.mark.parametrize("first_line", [b"\0" * 9, b"[]", b"5"])
def test_a_journal_without_its_first_line_is_begun_again(first_line, whole, tmp_path, monkeypatch):
    def stop(job):
        raise UserError("stopped")

    def begun():
        with monkeypatch.context() as patch:
            patch.setattr("harness.data.prepare._Job.finish", stop)
            assert refused(lambda: made(whole, tmp_path / "out")) == "stopped"
        return journal.read_bytes().partition(b"\n")

    journal = tmp_path / "out.partial" / "journal.jsonl"
    line, end, rest = begun()
    journal.write_bytes(first_line + end + rest)
    assert begun()[0] == line  # so that the next process can continue it
    assert made(whole, tmp_path / "out").images == 1000


def test_verify_finds_a_flipped_byte_and_says_where(tree, tmp_path):
    made(tree, tmp_path / "out")
    assert verify(tmp_path / "out").kind == "prepared data set"

    def flipped(name, place):
        path = tmp_path / "out" / name
        data = bytearray(path.read_bytes())
        data[place] ^= 1
        path.write_bytes(data)

    step = SIZE * SIZE * 3
    flipped("images.npy", -step * 60)
    done = CliRunner().invoke(group, ["data", "verify", str(tmp_path / "out")])
    assert "chunk 2 (images 512 to 599, or their labels) differs from its hash: damaged" in str(done.exception)
    flipped("images.npy", 128 + 255 * step)
    text = refused(lambda: verify(tmp_path / "out"))
    assert "chunk 0 (images 0 to 255" in text and "so do 1 more of 3 chunks" in text
    flipped("images.npy", -step * 60)
    flipped("images.npy", 128 + 255 * step)
    assert verify(tmp_path / "out").holds
    flipped("labels.npy", 128 + 8 * 300)
    assert "chunk 1 (images 256 to 511" in refused(lambda: verify(tmp_path / "out"))
    flipped("labels.npy", 128 + 8 * 300)
    meta = (tmp_path / "out" / "meta.json").read_text()
    (tmp_path / "out" / "meta.json").write_text(meta.replace('"n01440764"', '"n01440765"'))
    assert "contradicts its own hash" in refused(lambda: verify(tmp_path / "out"))
    assert "is no prepared data set" in refused(lambda: verify(tmp_path))


def test_verify_knows_imagenets_classes(whole, tmp_path):
    made(whole, tmp_path / "out", "imagenet", resolution=4)
    assert "1,000 classes" in verify(tmp_path / "out").text
    meta = prepared.read_meta(tmp_path / "out")
    names = list(meta.classes)
    names[2:4] = names[3], names[2]
    dataclasses.replace(meta, classes=tuple(names)).write(tmp_path / "out")
    assert "its classes are not ImageNet's in their order (label 2)" in refused(lambda: verify(tmp_path / "out"))
