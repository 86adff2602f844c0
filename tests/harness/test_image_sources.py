"""One door to images: whatever they are kept in, the same pixels, labels and hash; what is broken gets one line."""

import io
import os
import struct
import tarfile
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from evaluators.reference import images_sha256
from harness.errors import UserError
from harness.images.open import open_images
from harness.images.source import from_batches

N = 23
IMAGES = np.random.RandomState(0).randint(0, 256, (N, 9, 8, 3)).astype(np.uint8)
LABELS = np.sort(np.arange(N) % 3).astype(np.int64)  # sorted: class folders keep classes together


def png(image, **options):
    out = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(out, "PNG", **options)
    return out.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def pairs(start, stop):
    for i in range(start, stop):
        yield f"{i}.cls", str(LABELS[i]).encode()
        yield f"{i}.png", png(IMAGES[i])


def container(kind, folder, images=IMAGES, labels=LABELS):
    """(path to open, labels that it holds)"""
    if kind == "npz":
        np.savez(folder / "s.npz", images, labels)
        return folder / "s.npz", labels
    if kind == "deflated npz":
        np.savez_compressed(folder / "s.npz", images, labels.astype(np.uint8))
        return folder / "s.npz", labels
    if kind == "fortran npz":
        np.savez_compressed(folder / "s.npz", np.asfortranarray(images))
        return folder / "s.npz", None
    if kind in ("npy", "fortran npy"):
        np.save(folder / "s.npy", np.asfortranarray(images) if kind == "fortran npy" else images)
        return folder / "s.npy", None
    if kind == "png":
        for i, image in enumerate(images):
            (folder / f"image {i}.PNG").write_bytes(png(image))
        (folder / "about.txt").write_text("x")
        return folder, None
    if kind == "classes":
        for name in ("0", "1", "2"):
            (folder / name).mkdir()
        for i, image in enumerate(images):
            (folder / str(labels[i]) / f"{i}.png").write_bytes(png(image))
        return folder, labels
    if kind in ("shards", "pattern"):
        for shard, start in enumerate(range(0, N, 2)):  # 12 shards, so that 10 must come after 9
            save = np.savez if shard % 2 else np.savez_compressed
            save(folder / f"shard-{shard}.npz", images[start : start + 2], labels[start : start + 2])
        return (folder if kind == "shards" else folder / "shard-*.npz"), labels
    if kind == "tar":
        return write_tar(folder / "s.tar", pairs(0, N)), labels
    assert kind == "tars"
    for shard, start in enumerate(range(0, N, 2)):
        write_tar(folder / f"{shard}.tar", pairs(start, min(N, start + 2)))
    return folder, labels


KINDS = (
    "npz",
    "deflated npz",
    "fortran npz",
    "npy",
    "fortran npy",
    "png",
    "classes",
    "shards",
    "pattern",
    "tar",
    "tars",
)


@pytest.mark.parametrize("kind", KINDS)
def test_every_container_gives_the_same_images_labels_and_hash(tmp_path, kind):
    path, labels = container(kind, tmp_path)
    source = open_images(path, classes=3)
    assert (source.count, source.shape, source.lossy) == (N, (9, 8, 3), False)
    for size in (1, 5, 256):
        batches = list(source.batches(size))
        assert [len(each) for each in batches[:-1]] == [size] * (len(batches) - 1)
        assert all(each.dtype == np.uint8 for each in batches)
        np.testing.assert_array_equal(np.concatenate(batches), IMAGES)
    assert source.sha256() == open_images(path).sha256() == images_sha256(IMAGES)
    np.testing.assert_array_equal(source.array(), IMAGES)
    if labels is None:
        assert source.labels is None
    else:
        assert source.labels.dtype == np.int64
        np.testing.assert_array_equal(source.labels, labels)
        with pytest.raises(UserError, match="label 2 of image 16 is outside the 2 classes"):
            open_images(path, classes=2)


def test_grey_images_and_what_is_said_of_a_container(tmp_path):
    grey = IMAGES[..., :1]
    (tmp_path / "a").mkdir()
    path, _ = container("png", tmp_path / "a", grey)
    source = open_images(path)
    np.testing.assert_array_equal(source.array(), grey)
    assert source.notes == ("1 files that are no images were left out",)
    np.savez(tmp_path / "r.npz", arr_0=IMAGES, mu=np.zeros(3), sigma=np.eye(3))
    assert open_images(tmp_path / "r.npz").extra_arrays == ("mu", "sigma")
    np.savez(tmp_path / "s.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(UserError, match="statistics .* and no images"):
        open_images(tmp_path / "s.npz")


def test_class_folders_with_names_are_numbered_in_sorted_order(tmp_path):
    for name in ("n10", "n2", "n1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(png(IMAGES[int(name[1:])]))
    source = open_images(tmp_path)
    np.testing.assert_array_equal(source.array(), IMAGES[[1, 10, 2]])  # n1, n10, n2, as torchvision sorts
    assert source.labels.tolist() == [0, 1, 2] and "sorted order" in source.notes[0]


def test_a_stored_npz_is_mapped_and_a_deflated_one_streamed(tmp_path):
    images = np.zeros((4096, 64, 64, 3), np.uint8)  # 48 MiB
    images[:, 0, 0, 0] = np.arange(4096) % 256
    np.savez(tmp_path / "stored.npz", images)
    np.savez_compressed(tmp_path / "deflated.npz", images)
    del images
    assert isinstance(open_images(tmp_path / "stored.npz").array(), np.memmap)
    for name in ("stored.npz", "deflated.npz"):
        tracemalloc.start()
        source = open_images(tmp_path / name)
        first = [int(image[0, 0, 0]) for batch in source.batches(128) for image in batch]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert first == [i % 256 for i in range(4096)]
        assert peak < 8 << 20, f"{name}: {peak} bytes"  # a batch is 1.5 MiB
    with pytest.raises(UserError, match="held at once"):
        open_images(tmp_path / "deflated.npz").array(limit=1 << 20)


def test_live_generators():
    made = lambda sizes: (IMAGES[:n] for n in sizes)  # noqa: E731
    source = from_batches(made([3, 4]))
    assert source.shape == (9, 8, 3) and source.count is None
    with pytest.raises(UserError, match="give count=N"):
        source.sha256()
    assert [len(each) for each in source.batches(5)] == [5, 2]
    assert source.count == 7
    with pytest.raises(UserError, match="only once"):
        next(source.batches(5))
    endless = from_batches((IMAGES for _ in iter(int, 1)), count=50)
    assert sum(len(each) for each in endless.batches(7)) == 50
    assert endless.sha256() == images_sha256(np.concatenate([IMAGES] * 3)[:50])
    again = from_batches([IMAGES[:10], IMAGES[10:]], labels=LABELS)
    assert again.sha256() == images_sha256(again.array()) == images_sha256(IMAGES)
    with pytest.raises(UserError, match=r"than there are labels \(10\); give one label per image, or count=10"):
        from_batches([IMAGES[:10], IMAGES[10:]], labels=LABELS[:10]).sha256()
    assert from_batches([IMAGES], 10, labels=LABELS[:10]).sha256() == images_sha256(IMAGES[:10])
    assert from_batches([IMAGES]).sha256() == images_sha256(IMAGES)  # N is found first
    with pytest.raises(UserError, match="7 images came, 9 were expected"):
        list(from_batches(made([3, 4]), count=9).batches())
    with pytest.raises(UserError, match=r"float64 .* with values in \[0, 1\]"):
        from_batches([np.stack([np.zeros((4, 4, 3)), np.ones((4, 4, 3))])])
    with pytest.raises(UserError, match="channels first"):
        from_batches([np.zeros((2, 3, 8, 8), np.uint8)])
    with pytest.raises(UserError, match="are followed by"):
        list(from_batches([IMAGES, IMAGES[:, :8]]).batches())
    with pytest.raises(UserError, match="no images"):
        from_batches([])


def refused(path, read=True):
    with pytest.raises(UserError) as caught:
        source = open_images(path)
        if read:
            source.array()
    message = str(caught.value)
    assert "\n" not in message and str(path).rstrip("*") in message
    return message


@pytest.mark.parametrize("kind", ["npz", "deflated npz"])
def test_a_changed_byte_of_the_pixels_never_becomes_a_number(tmp_path, kind):
    path, _ = container(kind, tmp_path)
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    refused(path)
    path.write_bytes(bytes(data[: len(data) // 2]))
    assert "cut off while it was written" in refused(path)


def test_pillow_takes_a_png_with_a_wrong_checksum_and_the_door_does_not(tmp_path):
    data = bytearray(png(IMAGES[0]))
    end = data.index(b"IEND") - 8  # the four bytes before IEND's length: the checksum of the pixels
    data[end] ^= 1
    (tmp_path / "a.png").write_bytes(data)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), IMAGES[0])
    assert "checksum" in refused(tmp_path)
    (tmp_path / "a.png").write_bytes(png(IMAGES[0])[:-12])  # all pixels are there, the end is not
    assert "cut off" in refused(tmp_path)


def test_the_first_two_files_of_different_size_are_named(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(png(IMAGES[0] if i < 2 else IMAGES[0, :8]))
    message = refused(tmp_path, read=False)
    assert "0.png is (9, 8, 3)" in message and "2.png (8, 8, 3)" in message
    (tmp_path / "2.png").unlink()
    (tmp_path / "3.png").write_bytes(png(IMAGES[0, ..., :1]))
    assert "3.png (9, 8, 1)" in refused(tmp_path)


def test_modes_of_image_files(tmp_path):
    def folder(name, image, kind="PNG", **options):
        (tmp_path / name).mkdir()
        image.save(tmp_path / name / "x.png", kind, **options)
        return tmp_path / name

    rgb = Image.fromarray(IMAGES[0])
    palette = rgb.quantize(16)
    source = open_images(folder("p", palette))
    np.testing.assert_array_equal(source.array()[0], np.asarray(palette.convert("RGB")))
    assert source.notes == ("palette images were expanded to RGB",)
    bits = Image.fromarray(IMAGES[0, ..., 0] > 99)
    np.testing.assert_array_equal(open_images(folder("1", bits)).array()[0, ..., 0], (IMAGES[0, ..., 0] > 99) * 255)
    opaque = rgb.convert("RGBA")
    source = open_images(folder("opaque", opaque))
    np.testing.assert_array_equal(source.array()[0], IMAGES[0])
    assert source.notes == ("an opaque alpha channel was dropped",)
    opaque.putpixel((0, 0), (1, 2, 3, 254))
    assert "transparent" in refused(folder("alpha", opaque))
    assert "transparent" in refused(folder("key", rgb, transparency=(1, 2, 3)))
    assert "16 bits" in refused(folder("16", Image.fromarray(IMAGES[0, ..., 0].astype(np.uint16) * 256)))
    assert "CMYK" in refused(folder("cmyk", rgb.convert("CMYK"), "JPEG"))
    assert "animation" in refused(folder("apng", rgb, save_all=True, append_images=[Image.fromarray(IMAGES[1])]))
    assert "neither PNG" in refused(folder("gif", rgb, "GIF"))
    lossless = open_images(folder("webp", rgb, "WEBP", lossless=True))
    np.testing.assert_array_equal(lossless.array()[0], IMAGES[0])
    assert not lossless.lossy and open_images(folder("lossy", rgb, "WEBP")).lossy
    jpeg = open_images(folder("jpeg", rgb, "JPEG"))  # a JPEG called .png
    assert jpeg.lossy and "1 of 1 images were stored with loss" in jpeg.notes[0]


def test_a_png_that_claims_to_be_huge_is_refused_before_it_is_unpacked(tmp_path):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(1 << 20))) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + body)
    assert "more than" in refused(tmp_path)


def test_npz_refusals(tmp_path):
    def saved(*arrays, **named):
        np.savez(tmp_path / "x.npz", *arrays, **named)
        return refused(tmp_path / "x.npz")

    assert "Python objects" in saved(np.array([print], dtype=object))
    assert "arr_0 is float32" in saved(IMAGES.astype(np.float32)) and "channels first" in saved(
        IMAGES.transpose(0, 3, 1, 2)
    )
    assert "found images" in saved(images=IMAGES)
    assert "arr_1 is float64" in saved(IMAGES, LABELS.astype(float))
    assert "wanted one integer label" in saved(IMAGES, LABELS[1:])
    assert "no images" in saved(IMAGES[:0])
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("arr_0.npy", b"a")
        archive.writestr("arr_0.npy", b"b")
    assert "twice" in refused(tmp_path / "x.npz")
    for text in ("{'descr': '|u1', 'fortran_order': False, 'shape': (9999999999999, 8, 8, 3)}", "[" * 5000, "{}", ""):
        raw = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + IMAGES.tobytes()
        (tmp_path / "x.npy").write_bytes(raw)
        refused(tmp_path / "x.npy")


def test_tar_refusals(tmp_path):
    path = tmp_path / "s.tar"
    good = write_tar(path, pairs(0, 4)).read_bytes()
    broken = bytearray(good)
    broken[4 * 512 + 3] ^= 1  # the name of the third member
    path.write_bytes(broken)
    with tarfile.open(path) as archive:
        assert len(archive.getnames()) < 8  # tarfile takes it for the end of the archive
    assert "checksum" in refused(path)
    path.write_bytes(good[: 512 * 16])
    assert "cut off" in refused(path)
    path.write_bytes(good[: 512 * 15 + 9])
    assert "cut off" in refused(path)
    write_tar(path, [("../a.png", png(IMAGES[0]))])
    assert "leads out" in refused(path)
    write_tar(path, [*pairs(0, 2), ("9.png", png(IMAGES[0]))])
    assert "9.png has no partner" in refused(path)
    write_tar(path, [("0.cls", b"cat"), ("0.png", png(IMAGES[0]))])
    assert "whole number" in refused(path)
    write_tar(path, [("a\nb.png", b"junk")])
    assert "neither PNG" in refused(path)
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo("a.png")
        link.type, link.linkname = tarfile.SYMTYPE, "secret.png"
        archive.addfile(link)
    assert "never followed" in refused(path)
    with tarfile.open(tmp_path / "s.tar.gz", "w:gz") as archive:
        pass
    assert "compressed tar" in refused(tmp_path / "s.tar.gz")


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_tars_of_all_formats_with_long_names(tmp_path, form):
    long = "/".join(["d" * 40] * (6 if form != tarfile.USTAR_FORMAT else 4))
    with tarfile.open(tmp_path / "s.tar", "w", format=form) as archive:
        folder = tarfile.TarInfo("d" * 40)
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for i in range(3):
            data = png(IMAGES[i])
            info = tarfile.TarInfo(f"{long}/{i}.png")
            info.size, info.mtime = len(data), 0.5 if form == tarfile.PAX_FORMAT else 1
            archive.addfile(info, io.BytesIO(data))
    np.testing.assert_array_equal(open_images(tmp_path / "s.tar").array(), IMAGES[:3])


def test_folder_refusals(tmp_path):
    assert "no such file" in refused(tmp_path / "nothing")
    assert "nothing matches" in refused(tmp_path / "shard-*.npz")
    assert "no images in it" in refused(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    assert "unknown kind" in refused(tmp_path / "a.txt")
    (tmp_path / "a.png").symlink_to(tmp_path / "gone.png")
    assert "broken link" in refused(tmp_path)
    (tmp_path / "a.png").unlink()
    os.mkfifo(tmp_path / "a.png")  # reading it would wait for ever
    assert "no plain file" in refused(tmp_path)
    (tmp_path / "a.png").unlink()
    (tmp_path / "a.png").write_bytes(png(IMAGES[0]))
    np.savez(tmp_path / "a.npz", IMAGES)
    assert "side by side" in refused(tmp_path)
    (tmp_path / "a.npz").unlink()
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "b.png").write_bytes(png(IMAGES[0]))
    assert "images and folders of images" in refused(tmp_path)
    (tmp_path / "a.png").unlink()
    (tmp_path / "c" / "deeper").mkdir()
    assert "a folder inside a class folder" in refused(tmp_path)


def test_the_folder_of_a_run_is_refused_by_the_names_of_its_sample_sets(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    assert refused(tmp_path).endswith("is the folder of a run; harness sample draws its samples")
    for name in ("step2-ddpm10", "step2-ddpm5"):
        (tmp_path / "samples" / name).mkdir(parents=True)
        np.savez(tmp_path / "samples" / name / "samples.npz", IMAGES)
    sets = [str(tmp_path / "samples" / name) for name in ("step2-ddpm5", "step2-ddpm10")]
    assert refused(tmp_path).endswith(f"is the folder of a run; name one of its sample sets: {', '.join(sets)}")


def test_shards_that_do_not_fit_together(tmp_path):
    np.savez(tmp_path / "1.npz", IMAGES, LABELS)
    np.savez(tmp_path / "2.npz", IMAGES)
    assert "2.npz has no labels" in refused(tmp_path)
    np.savez(tmp_path / "2.npz", IMAGES[:, :8], LABELS)
    assert "keep one size" in refused(tmp_path)
