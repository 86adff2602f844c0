"""The sample grid: where each image stands, and that its pixels are repeated and never changed."""

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from harness.errors import RunError, UserError
from reports.grid import write_grid


def _tiles(path, rows, columns, side, gap=2):
    """Tiles read back from the right and the bottom, where there is no label."""
    with Image.open(path) as image:
        picture = np.asarray(image)
    step = side + gap
    left = picture.shape[1] - columns * step - gap
    top = picture.shape[0] - rows * step - gap
    assert top == 0 and left > 0
    cuts = [
        [picture[gap + r * step :, left + gap + c * step :][:side, :side] for c in range(columns)] for r in range(rows)
    ]
    return picture, left, cuts


def test_digits_grid(tmp_path):
    digits = load_digits()
    images = np.round(digits.images * 255 / 16).astype(np.uint8)[..., None]  # (1797, 8, 8, 1)
    path = write_grid(images, digits.target, tmp_path / "grids" / "samples.png", columns=6)
    picture, left, tiles = _tiles(path, 10, 6, 48)
    assert picture.dtype == np.uint8 and picture.ndim == 2
    for label in range(10):
        wanted = images[digits.target == label][:6, ..., 0]
        for column in range(6):
            tile = tiles[label][column]
            np.testing.assert_array_equal(tile[::6, ::6], wanted[column])
            np.testing.assert_array_equal(tile, tile[::6, ::6].repeat(6, 0).repeat(6, 1))
        margin = picture[2 + 50 * label :, :left][:48]
        assert margin.min() < 100 and (margin[:, -4:] == 255).all()  # the class is written there


def test_colour_short_rows_chosen_classes_and_scale(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    labels = np.array([207, 3, 207, 999, 3])
    path = write_grid(images, labels, tmp_path / "g.png", columns=3, scale=2, classes=[207, 3])
    picture, _, tiles = _tiles(path, 2, 3, 32)
    assert picture.shape[2] == 3
    for (row, column), index in {(0, 0): 0, (0, 1): 2, (1, 0): 1, (1, 1): 4}.items():
        np.testing.assert_array_equal(tiles[row][column], images[index].repeat(2, 0).repeat(2, 1))
    assert (tiles[0][2] == 255).all() and (tiles[1][2] == 255).all()


def test_bad_input_and_a_full_disk(tmp_path, monkeypatch):
    images, labels = np.zeros((4, 8, 8, 1), np.uint8), np.arange(4)
    for bad_images, bad_labels, changes in (
        (images.astype(np.float32), labels, {}),
        (images[..., 0], labels, {}),
        (images.repeat(2, axis=3), labels, {}),
        (images[:0], labels[:0], {}),
        (images, labels[:3], {}),
        (images, labels.astype(float), {}),
        (images, labels, {"columns": 0}),
        (images, labels, {"scale": 0}),
        (images, labels, {"classes": []}),
    ):
        with pytest.raises(UserError, match="a sample grid needs"):
            write_grid(bad_images, bad_labels, tmp_path / "g.png", **changes)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunError, match="the disk is full, .*g.png could not be written"):
        write_grid(images, labels, tmp_path / "g.png")
    assert list(tmp_path.iterdir()) == []
