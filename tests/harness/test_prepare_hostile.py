"""Sources made to mislead: sizes that lead back, pictures that would turn white or fill the memory, numbered classes."""

import io
import itertools
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from harness.data.photographs import Broken, decode
from harness.data.sources import open_index
from harness.errors import UserError
from harness.images.open import open_images
from harness.images.source import Damaged
from harness.images.tars import tar_members


@pytest.mark.parametrize("size", ["-1536", "+3", "1_0", "", "1" * 16])
def test_a_size_in_a_pax_header_that_is_none_is_damage(size, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as out:
        info = tarfile.TarInfo("a.png")
        info.pax_headers = {"size": size}
        out.addfile(info)
    with pytest.raises(Damaged, match="no size where one belongs"):
        list(itertools.islice(tar_members(tmp_path / "a.tar"), 5))  # of -1536 there would be no end


def block(kind, data, name="x"):
    """A header of that kind and its data, filled up to 512 bytes."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512)


@pytest.mark.parametrize("between", [b"", block(tarfile.XHDTYPE, b"12 mtime=12\n")])
def test_a_size_in_a_pax_header_is_that_of_the_file(between, tmp_path):
    """Not of another extended header before the file."""
    name, size = b"n" * 600, block(tarfile.XHDTYPE, b"11 size=20\n")
    data = size + between + block(tarfile.GNUTYPE_LONGNAME, name + b"\0") + block(tarfile.REGTYPE, b"p" * 20)
    (tmp_path / "a.tar").write_bytes(data + bytes(1024))
    assert list(tar_members(tmp_path / "a.tar")) == [(name.decode(), len(data) - 512, 20)]


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_an_extended_header_without_bound_is_damage(kind, tmp_path):
    data = block(kind, b"n" * ((1 << 20) + 1)) + block(tarfile.REGTYPE, b"p" * 20)
    (tmp_path / "a.tar").write_bytes(data + bytes(1024))
    with pytest.raises(Damaged, match="the extended header at byte 0 has 1,048,577 bytes"):
        list(tar_members(tmp_path / "a.tar"))


def png(array):
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()


def test_grey_of_16_bits_is_refused_rather_than_made_white():
    with pytest.raises(Broken, match="more than 8 bits a channel"):
        decode(png(np.full((20, 20), 1000, np.uint16)), 16, "x.png")


def test_a_picture_that_would_be_resized_beyond_the_bound_is_refused():
    with pytest.raises(Broken, match="1 x 5000 pixels would be resized to 128 x 640000"):
        decode(png(np.zeros((5000, 1, 3), np.uint8)), 128, "x.png")
    assert decode(png(np.zeros((400, 1, 3), np.uint8)), 128, "x.png").pixels.shape == (128, 128, 3)


def test_numbered_classes_are_their_labels_in_every_kind_of_source(tmp_path):
    wanted = list(range(11))  # 10 is the last, and comes after 1 as text
    with tarfile.open(tmp_path / "shard-0.tar", "w") as shard, tarfile.open(tmp_path / "classes.tar", "w") as outer:

        def add(out, name, data):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))

        for label in wanted:
            data = png(np.full((16, 16, 3), label, np.uint8))
            (tmp_path / "tree" / str(label)).mkdir(parents=True)
            (tmp_path / "tree" / str(label) / f"{label}.png").write_bytes(data)
            add(shard, f"{label}.png", data)
            add(shard, f"{label}.cls", str(label).encode())
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as out:
                add(out, f"{label}.png", data)
            add(outer, f"{label}.tar", inner.getvalue())
    listings = [open_index(tmp_path / name, "mine") for name in ("tree", "shard-0.tar", "classes.tar")]
    assert open_images(tmp_path / "tree").labels.tolist() == wanted
    for found in listings:
        assert found.labels.tolist() == wanted and found.classes == tuple(map(str, range(11))), found.kind
        for image in found.read(0):
            assert decode(image.read(), 16, image.name).pixels[0, 0, 0] == wanted[image.row], found.kind
    assert len({found.sha256 for found in listings}) == 1
    (tmp_path / "tree" / "20261127").mkdir()
    with pytest.raises(UserError, match="label 20261127 is beyond 100,000 classes"):
        open_index(tmp_path / "tree", "mine")


@pytest.mark.parametrize("folder", [".", "class"])
def test_a_pipe_named_as_an_image_is_refused_and_not_waited_for(folder, tmp_path):
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / "a.png").write_bytes(png(np.zeros((8, 8), np.uint8)))
    os.mkfifo(tmp_path / folder / "b.png")
    with pytest.raises(UserError, match="b.png: a broken link or no plain file"):
        open_index(tmp_path, "mine")
