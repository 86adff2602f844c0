"""Sample sets: what is written is read back, and every broken file gets one clear line."""

import errno
import hashlib
import io
import os
import zipfile

import numpy as np
import pytest

from harness.errors import RunError, UserError
from harness.runs.samples import read_samples, read_sidecar, sidecar_path, write_samples


@pytest.fixture
def images():
    return np.random.RandomState(0).randint(0, 256, (25, 8, 8, 3)).astype(np.uint8)


@pytest.fixture
def labels():
    return np.arange(25, dtype=np.int64) % 10


def shards(images, size=7):
    for start in range(0, len(images), size):
        yield images[start : start + size]


@pytest.fixture
def path(tmp_path, images, labels):
    write_samples(tmp_path / "samples.npz", shards(images), labels, {"seed": 3})
    return tmp_path / "samples.npz"


def refusal(path, **arguments):
    with pytest.raises(UserError) as caught:
        read_samples(path, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.parametrize("channels", [1, 3])
def test_round_trip_is_exact_and_readable_by_numpy(tmp_path, images, labels, channels):
    images = images[..., :channels]
    digest = write_samples(tmp_path / "s.npz", shards(images), labels, {"seed": 3})
    read = read_samples(tmp_path / "s.npz", classes=10, minimum=25)
    assert read.images.dtype == np.uint8 and read.labels.dtype == np.int64
    assert read.images.shape == (25, 8, 8, channels)
    np.testing.assert_array_equal(read.images, images)
    np.testing.assert_array_equal(read.labels, labels)
    assert read.sha256 == digest == hashlib.sha256((tmp_path / "s.npz").read_bytes()).hexdigest()
    with np.load(tmp_path / "s.npz", allow_pickle=False) as data:
        assert data.files == ["arr_0", "arr_1"]
        np.testing.assert_array_equal(data["arr_0"], images)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.json", "s.npz"]


def test_stored_images_are_mapped_and_compressed_ones_read(tmp_path, images, labels, path):
    assert isinstance(read_samples(path).images, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        read_samples(path).images[0] = 0
    np.savez_compressed(tmp_path / "c.npz", images, labels)
    read = read_samples(tmp_path / "c.npz")
    np.testing.assert_array_equal(read.images, images)
    np.savez(tmp_path / "f.npz", np.asfortranarray(images))
    read = read_samples(tmp_path / "f.npz")
    np.testing.assert_array_equal(read.images, images)
    assert read.labels is None


def test_bytes_do_not_depend_on_the_shards_or_the_clock(tmp_path, images, labels):
    one = write_samples(tmp_path / "1.npz", shards(images, 25), labels, {})
    other = write_samples(tmp_path / "2.npz", shards(images, 4), labels, {})
    assert one == other


def test_sidecar_says_how_it_was_made(path):
    facts = read_sidecar(path)
    assert facts["seed"] == 3 and facts["images"] == 25 and facts["shape"] == [8, 8, 3]
    assert facts["sha256"] == read_samples(path).sha256
    sidecar_path(path).write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="JSON"):
        read_sidecar(path)
    sidecar_path(path).unlink()
    with pytest.raises(UserError, match="missing"):
        read_sidecar(path)


def test_a_generator_that_dies_leaves_the_old_file_and_no_scraps(path, images, labels):
    before = path.read_bytes()

    def dying():
        yield images[:7]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_samples(path, dying(), labels, {})
    assert path.read_bytes() == before
    assert not list(path.parent.glob("*.tmp")) and not list(path.parent.glob(".*"))


@pytest.mark.parametrize("count", [24, 26])
def test_the_number_of_images_must_be_that_of_labels(tmp_path, images, labels, count):
    with pytest.raises(ValueError, match="25 images came"):
        write_samples(tmp_path / "s.npz", shards(images), np.zeros(count, np.int64), {})
    assert not list(tmp_path.iterdir())


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path, images, labels, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"the disk is full, .*s\.npz could not be written"):
        write_samples(tmp_path / "s.npz", shards(images), labels, {})
    assert not list(tmp_path.iterdir())


def test_missing_file(tmp_path):
    assert "no such file" in refusal(tmp_path / "none.npz")


def test_not_a_zip(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"\x93NUMPY not a zip")
    assert "not an npz" in refusal(tmp_path / "x.npz")


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.9, 0.999])
def test_truncated(path, keep):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    assert "cut off" in refusal(path)


def test_one_flipped_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    assert "checksum" in refusal(path)


def test_objects_are_never_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    np.savez(tmp_path / "x.npz", np.array([Bomb()], dtype=object))
    assert "Python objects" in refusal(tmp_path / "x.npz")
    assert not (tmp_path / "executed").exists()


def test_no_arr_0(tmp_path, images):
    np.savez(tmp_path / "x.npz", pictures=images)
    assert "no array arr_0 (found pictures)" in refusal(tmp_path / "x.npz")


def test_float_images(tmp_path):
    np.savez(tmp_path / "x.npz", np.linspace(-1, 1, 192, dtype=np.float32).reshape(1, 8, 8, 3))
    message = refusal(tmp_path / "x.npz")
    assert "float32 (1, 8, 8, 3) with values in [-1, 1]" in message and "wanted uint8 (N, H, W, C)" in message


@pytest.mark.parametrize(
    ("shape", "words"),
    [((4, 3, 8, 8), "channels first"), ((4, 8, 8), "(4, 8, 8)"), ((4, 8, 8, 4), "C 1 or 3"), ((), "()")],
)
def test_wrong_shape(tmp_path, shape, words):
    np.savez(tmp_path / "x.npz", np.zeros(shape, np.uint8))
    assert words in refusal(tmp_path / "x.npz")


def test_label_outside_the_classes(path):
    assert "label 9 of image 9 is outside the 9 classes" in refusal(path, classes=9)
    assert read_samples(path, classes=10).labels.max() == 9


@pytest.mark.parametrize("labels", [np.zeros(24, np.int64), np.zeros((25, 1), np.int64), np.zeros(25)])
def test_labels_of_wrong_length_or_type(tmp_path, images, labels):
    np.savez(tmp_path / "x.npz", images, labels)
    assert "one integer label per image, (25,)" in refusal(tmp_path / "x.npz")


def test_fewer_than_needed(path):
    assert "25 images are fewer than the 26 needed" in refusal(path, minimum=26)
    assert len(read_samples(path, minimum=25).images) == 25


def test_a_header_that_promises_more_than_there_is_allocates_nothing(tmp_path):
    buffer = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": (10**12, 8, 8, 1)}
    np.lib.format.write_array_header_1_0(buffer, header)
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", buffer.getvalue() + b"\0" * 64)
    assert "holds 64 bytes" in refusal(tmp_path / "x.npz")


def test_garbage_inside_the_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("arr_0.npy", b"hello")
    assert "not an npy array" in refusal(tmp_path / "x.npz")
