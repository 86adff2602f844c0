"""Fashion-MNIST: the IDX reader, where the files are looked for, and the real images where they are installed."""

import gzip
import hashlib
import json
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from file_server import serving

from harness import registry
from harness.cli import group
from harness.data import fashion_mnist, public_files
from harness.data.cache_dir import downloads
from harness.data.idx import read_idx
from harness.data.public_files import DATASETS, PublicDataset, PublicFile
from harness.errors import UserError
from harness.planning.plan import missing
from harness.planning.request import make_request

NAMES = [name for name, *_ in fashion_mnist.FILES]


def idx(array, kind=0x08):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, kind, array.ndim, *array.shape) + array.tobytes()


def small():
    """Four arrays of the data set's form, much smaller."""
    random = np.random.RandomState(0)
    counts = {"train": 6, "t10k": 4}
    return {
        name: random.randint(1, 255, (counts[name.partition("-")[0]], 28, 28)[:dimensions]).astype(np.uint8)
        if dimensions == 3
        else random.randint(0, 10, counts[name.partition("-")[0]]).astype(np.uint8)
        for name, dimensions, _ in fashion_mnist.FILES
    }


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A machine without the data set, for which small files stand in. Returns their arrays."""
    arrays = small()
    monkeypatch.delenv("HARNESS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "no-package")
    files = tuple((n, arrays[n].ndim, hashlib.sha256(arrays[n].tobytes()).hexdigest()) for n in NAMES)
    monkeypatch.setattr(fashion_mnist, "FILES", files)
    monkeypatch.chdir(tmp_path)
    return arrays


def put(folder, arrays, packed=True):
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        data = idx(array)
        (folder / f"{name}{'.gz' if packed else ''}").write_bytes(gzip.compress(data) if packed else data)
    return folder


def refused(call):
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def request(data=None):
    return make_request(backbone="dit-xs-2", protocol="fashion-mnist-32", steps=1, data=data)


@pytest.mark.parametrize("packed", [True, False])
def test_the_two_parts_are_joined_and_padded_with_the_background(home, tmp_path, packed):
    data = registry.datasets.get("fashion-mnist").load(put(tmp_path / "here", home, packed))
    assert data.images.shape == (10, 32, 32, 1) and data.images.dtype == np.uint8 and data.labels.dtype == np.int64
    assert np.array_equal(data.images[:6, 2:30, 2:30, 0], home[NAMES[0]])
    assert np.array_equal(data.images[6:, 2:30, 2:30, 0], home[NAMES[2]])
    assert data.images.astype(int).sum() == sum(int(home[name].astype(int).sum()) for name in NAMES[::2])
    assert data.labels.tolist() == [*home[NAMES[1]], *home[NAMES[3]]]


def test_it_is_found_where_a_fetch_or_the_package_puts_it(home, tmp_path, monkeypatch):
    spec = registry.datasets.get("fashion-mnist")
    (lack,) = missing(request())
    assert "harness data fetch fashion-mnist" in lack and "apt-get install dataset-fashion-mnist" in lack
    assert "--data" in lack and refused(spec.load) in lack
    put(fashion_mnist.DEBIAN, home)
    assert missing(request()) == [] and len(spec.load()) == 10
    fetched = put(downloads("fashion-mnist"), home)
    assert fetched.is_relative_to(tmp_path / "cache")
    (fetched / f"{NAMES[1]}.gz").unlink()  # begun there and not ended: named, never mixed with the package's
    assert f"no file {NAMES[1]}.gz" in refused(spec.load)
    (lack,) = missing(request(tmp_path / "nowhere"))
    assert f"{tmp_path / 'nowhere'} does not exist" in lack
    (lack,) = missing(request(tmp_path))
    assert f"no file {NAMES[0]}.gz in it" in lack
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert downloads("x") == Path.home() / ".cache" / "backbone-harness" / "x"


def test_files_of_another_data_set_are_not_taken_for_it(home, tmp_path):
    home[NAMES[2]] = home[NAMES[2]] ^ 1
    said = refused(lambda: fashion_mnist.load(put(tmp_path / "mnist", home)))
    assert f"{NAMES[2]}.gz is not Fashion-MNIST's" in said and "MNIST's files have the same names" in said


GOOD = idx(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no IDX file"),
        (b"<html>", "no IDX file"),
        (GOOD[:3], "no IDX file"),
        (GOOD[:9], "header is cut off"),
        (GOOD[:-1], "holds 23 of 24 bytes"),
        (GOOD + b"x", "more bytes than the 24"),
        (idx(np.zeros((1, 1, 1), np.uint8), 0x0D), "IDX type 0x0d"),
        (idx(np.zeros(5, np.uint8)), "1 dimensions where 3"),
        (idx(np.zeros((0, 28, 28), np.uint8)), "header says (0, 28, 28)"),
        (struct.pack(">BBBB3I", 0, 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1), "header says"),
    ],
)
@pytest.mark.parametrize("packed", [True, False])
def test_a_broken_file_is_named(tmp_path, content, message, packed):
    path = tmp_path / "some-images.gz"
    path.write_bytes(gzip.compress(content) if packed else content)
    said = refused(lambda: read_idx(path, 3))
    assert message in said and "some-images.gz" in said


def test_damage_that_only_a_checksum_finds_and_missing_files(tmp_path):
    path = tmp_path / "x.gz"
    packed = bytearray(gzip.compress(GOOD, 0))  # stored: a flipped bit stays a value
    path.write_bytes(packed)
    assert np.array_equal(read_idx(path, 3).ravel(), np.arange(24))
    packed[packed.index(bytes(range(24))) + 5] ^= 1
    path.write_bytes(packed)
    assert "CRC" in refused(lambda: read_idx(path, 3))
    path.write_bytes(gzip.compress(GOOD)[:-6])
    assert "cannot be read" in refused(lambda: read_idx(path, 3))
    assert "No such file" in refused(lambda: read_idx(tmp_path / "none", 3))


def test_a_bomb_is_not_unpacked(tmp_path):
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(GOOD + bytes(1 << 26), 1))
    tracemalloc.start()
    try:
        assert "more bytes than" in refused(lambda: read_idx(path, 3))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_fetching_puts_all_files_where_a_run_finds_them(home, tmp_path, monkeypatch):
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    contents = {f"{name}.gz": gzip.compress(idx(array)) for name, array in home.items()}

    def public(address):
        return PublicDataset(
            name="fashion-mnist",
            summary="",
            files=tuple(
                PublicFile(
                    name=name, file=name, summary="", urls=(f"{address}/{name}",), size=len(content),
                    md5=hashlib.md5(content).hexdigest(),
                )
                for name, content in contents.items()
            ),
        )  # fmt: skip

    def fetch(*words):
        return CliRunner().invoke(group, ["data", "fetch", "fashion-mnist", *map(str, words)])

    with serving(b"", paths={f"/{name}": content for name, content in contents.items()}) as server:
        address = server.url.rpartition("/")[0]
        monkeypatch.setitem(public_files.DATASETS, "fashion-mnist", public(address))
        done = fetch()
        assert done.exit_code == 0 and done.output.count("as published") == 4, done.output
        assert missing(request()) == [] and len(fashion_mnist.load()) == 10
        asked = len(server.requests)
        assert fetch().output.count("exists already") == 4 and len(server.requests) == asked
        documents = json.loads(fetch("--out", tmp_path / "mine", "--url", f"{address}/", "--json").output)
        assert [Path(each["path"]).name for each in documents] == list(contents)
        assert len(fashion_mnist.load(tmp_path / "mine")) == 10
        server.paths[f"/{NAMES[3]}.gz"] = contents[f"{NAMES[3]}.gz"][:-1] + b"\1"
        done = fetch("--out", tmp_path / "again")
        assert isinstance(done.exception, UserError) and f"{NAMES[3]}.gz was not fetched" in str(done.exception)
        assert "its md5 is" in str(done.exception)
        assert sorted(path.name for path in (tmp_path / "again").iterdir()) == sorted(f"{n}.gz" for n in NAMES[:3])
    (tmp_path / "file").touch()
    assert "name a folder" in str(fetch("--out", tmp_path / "file").exception)


def test_the_addresses_are_those_of_the_publisher():
    dataset = DATASETS["fashion-mnist"]
    assert [each.file for each in dataset.files] == [f"{name}.gz" for name in NAMES]
    assert all(each.md5 and each.size and len(each.urls) == 2 for each in dataset.files)
    assert "fashion-mnist" in CliRunner().invoke(group, ["data", "fetch"]).output


real = pytest.mark.skipif(
    fashion_mnist.missing(None) is not None, reason="Fashion-MNIST is not installed (dataset-fashion-mnist)"
)


@real
def test_the_real_images():
    data = fashion_mnist.load()
    assert data.images.shape == (70_000, 32, 32, 1)
    assert (
        np.bincount(data.labels).tolist() == [7000] * 10 and np.bincount(data.labels[:60_000]).tolist() == [6000] * 10
    )
    assert data.labels[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]  # as in the publisher's pictures
    frame = np.ones((32, 32), bool)
    frame[2:30, 2:30] = False
    assert not data.images[:, frame].any()
    assert abs(data.images[:60_000, 2:30, 2:30].mean() / 255 - 0.2860) < 1e-4  # the mean that everybody normalises with


@real
def test_a_run_on_the_real_images(tmp_path, monkeypatch):
    """Trained and sampled; the whole with its evaluation takes the features of 70,000 images."""
    monkeypatch.chdir(tmp_path)
    words = ["--protocol", "fashion-mnist-32", "--backbone", "dit-xs-4", "--steps", "2", "--set", "batch=4"]
    words += ["--precision", "float32", "--micro-batch", "4", "--out", "run"]
    done = CliRunner().invoke(group, ["train", *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    losses = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 2 and 0.3 < losses[0]["mse"] < 3
    done = CliRunner().invoke(group, ["sample", "--run", "run", "--sampling-steps", "2", "--samples", "4"])
    assert done.exit_code == 0, done.output
    (samples,) = (tmp_path / "run").rglob("samples.npz")
    with np.load(samples) as found:
        assert found["arr_0"].shape == (4, 32, 32, 1)
