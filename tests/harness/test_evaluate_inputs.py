"""`harness evaluate` on what people have: folders of PNG, guards and their waiver, the newer metrics and the picture."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from harness.cli import group
from harness.data.digits import load
from harness.errors import UserError
from harness.runs.samples import write_samples


def evaluate(*arguments):
    return CliRunner().invoke(group, ["evaluate", *map(str, arguments)])


@pytest.fixture(scope="module")
def digits():
    return load()


def values(done):
    assert done.exit_code == 0, done.exception
    return {each["metric"]: each["value"] for each in json.loads(done.stdout)["records"]}


def test_a_folder_of_png_and_an_npz_of_the_same_images_give_the_same_numbers(tmp_path, digits):
    images, labels = digits.images[:100] // 2 * 2, digits.labels[:100]  # not the reference's own
    write_samples(tmp_path / "mine.npz", [images], labels, {})
    (tmp_path / "mine.json").unlink()
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = tmp_path / "png" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(folder / f"{index:04d}.png")
    settings = ("--suite", "embedded-modern", "--json")
    picture = tmp_path / "neighbours.png"
    packed = evaluate(tmp_path / "mine.npz", *settings, "--out", tmp_path / "a.jsonl", "--neighbours", picture)
    loose = evaluate(tmp_path / "png", *settings, "--out", tmp_path / "b.jsonl")
    assert list(values(packed)) == ["density", "coverage", "authenticity"]
    for metric, value in values(packed).items():  # another order of the images: the last bits of sums
        assert values(loose)[metric] == pytest.approx(value, rel=1e-6)
    assert values(packed)["authenticity"] < 0.5  # all but copies of the training images
    with Image.open(picture) as drawn:
        assert drawn.format == "PNG" and min(drawn.size) > 100


def test_guards_refuse_and_can_be_waived(tmp_path, digits):
    write_samples(tmp_path / "unit.npz", [(digits.images[:120] / 255).astype(np.uint8)], digits.labels[:120], {})
    (tmp_path / "unit.json").unlink()
    arguments = (tmp_path / "unit.npz", "--suite", "embedded-modern", "--json", "--out", tmp_path / "c.jsonl")
    done = evaluate(*arguments)
    assert isinstance(done.exception, UserError) and "(unit-range)" in str(done.exception)
    assert not (tmp_path / "c.jsonl").exists()
    done = evaluate(*arguments, "--allow", "unit-range", "--allow", "duplicates")
    assert len(values(done)) == 3 and "(allowed) (unit-range)" in done.stderr
