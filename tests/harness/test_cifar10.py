"""CIFAR-10 on made files of its layout: archive or folder, found where it was fetched, wrong files named."""

import gzip
import io
import tarfile

import numpy as np
import pytest
from click.testing import CliRunner

from harness import registry
from harness.cli import group
from harness.data import cifar10, public_files
from harness.data.cache_dir import downloads
from harness.data.load import load_data
from harness.errors import UserError
from harness.planning.plan import missing
from harness.planning.request import make_request

N = 7  # images of a batch


@pytest.fixture
def files(monkeypatch):
    """The files of a small CIFAR-10 by their names in the archive."""
    monkeypatch.setattr(cifar10, "IMAGES_PER_BATCH", N)
    dice = np.random.RandomState(0)
    names = [*cifar10.BATCHES, "test_batch.bin"]
    made = {}
    for name in names:
        records = dice.randint(0, 256, (N, 3073)).astype(np.uint8)
        records[:, 0] %= 10
        made[f"cifar-10-batches-bin/{name}"] = records.tobytes()
    return {**made, "cifar-10-batches-bin/batches.meta.txt": b"airplane\n"}


def archive(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as out:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return path


def unpacked(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def test_images_and_labels_are_those_of_the_training_batches(tmp_path, files):
    spec = registry.datasets.get("cifar-10")
    path = archive(tmp_path / "a" / cifar10.ARCHIVE, files)
    folder = unpacked(tmp_path / "b", files)
    for place in (path, path.parent, folder, folder / cifar10.FOLDER):
        data = spec.load(place)
        assert data.images.shape == (5 * N, 32, 32, 3) and data.labels.dtype == np.int64
        for batch in range(5):
            raw = np.frombuffer(files[f"cifar-10-batches-bin/data_batch_{batch + 1}.bin"], np.uint8).reshape(N, -1)
            for i in range(N):
                image = data.images[batch * N + i]
                assert data.labels[batch * N + i] == raw[i, 0]
                for channel in range(3):  # a plane of each colour, row by row
                    plane = raw[i, 1 + 1024 * channel : 1 + 1024 * (channel + 1)].reshape(32, 32)
                    np.testing.assert_array_equal(image[..., channel], plane)
    assert spec.class_names({})[8] == ("ship",)


def test_what_is_missing_or_wrong_is_named(tmp_path, files):
    spec = registry.datasets.get("cifar-10")

    def refused(place):
        with pytest.raises(UserError) as caught:
            spec.load(place)
        assert "\n" not in str(caught.value) and "harness data fetch cifar-10" in str(caught.value)
        return str(caught.value)

    assert "is not on this machine" in refused(None)
    assert f"is not in {tmp_path}" in refused(tmp_path)
    folder = unpacked(tmp_path / "b", files) / cifar10.FOLDER
    third = folder / "data_batch_3.bin"
    data = third.read_bytes()
    third.write_bytes(data[:-1])
    assert "data_batch_3.bin has 21,510 bytes and a batch of CIFAR-10 21,511" in refused(folder)
    third.write_bytes(b"\x0a" + data[1:])
    assert "image 0 has label 10, beyond 0 to 9" in refused(folder)
    third.unlink()
    assert "no file data_batch_3.bin in it" in refused(folder)
    del files["cifar-10-batches-bin/data_batch_2.bin"]
    assert "data_batch_2.bin is missing in it" in refused(archive(tmp_path / "c.tar.gz", files))
    cut = tmp_path / "d.tar.gz"
    cut.write_bytes((tmp_path / "c.tar.gz").read_bytes()[:3000])
    with pytest.raises(UserError):
        spec.load(cut)
    cut.write_bytes(gzip.compress(b"no tar"))
    with pytest.raises(UserError):
        spec.load(cut)
    (tmp_path / "py" / "cifar-10-batches-py").mkdir(parents=True)
    assert "is the Python version, a pickle that is not read" in refused(tmp_path / "py")


def test_the_protocol_finds_what_was_fetched(tmp_path, files):
    request = make_request(backbone="dit-s-2", protocol="cifar10-32", steps=10)
    assert request.protocol.resolution == 32 and request.protocol.suite == "adm"
    assert any("harness data fetch cifar-10" in each for each in missing(request))
    archive(downloads("cifar-10") / cifar10.ARCHIVE, files)
    assert missing(request) == []
    assert len(registry.datasets.get("cifar-10").load()) == 5 * N
    (public,) = public_files.DATASETS["cifar-10"].files
    assert (public.file, public.size) == (cifar10.ARCHIVE, 170_052_171)
    assert public.md5 == "c32a1d4ab5d03f1284b67883e8d87530"  # https://www.cs.toronto.edu/~kriz/cifar.html
    data = load_data(request.protocol, None)
    assert len(data.reference(request.protocol.reference_images)) == 5 * N  # its own training images are the reference


def test_another_file_of_that_name_is_not_taken_for_it(files):
    path = archive(downloads("cifar-10") / cifar10.ARCHIVE, files)
    done = CliRunner().invoke(group, ["data", "fetch", "cifar-10"])
    assert f"{path} exists and is not {cifar10.ARCHIVE}" in str(done.exception)
    assert "instead of 170,052,171" in str(done.exception)
