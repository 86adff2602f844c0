"""Pictures of classes: their size and content, both frameworks, runs and systems; never overwritten, never evaluated."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from small_runs import request, workshop
from small_vae import save_vae

import harness
from harness import registry
from harness.cli import group
from harness.data import imagenet
from harness.data.classes import display_name, read_classes
from harness.errors import UserError
from harness.io.files import sha256_file
from harness.pipeline import pictures
from harness.pipeline.pictures import draw_pictures, labels_of_classes
from harness.protocols import get_protocol
from harness.runs.pictures import is_picture
from harness.runs.samples import read_samples, write_samples
from harness.settings import SampleOptions
from reports.grid import PICTURE_GAP, headings_height, picture_scale, write_picture
from results.store import find_record_files, load

SIDE = 8  # pixels of a digit
BATCH = 8  # of grids and sample sets alike, so that both have the same bits


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A short run of DiT on digits."""
    shop = workshop(tmp_path_factory.mktemp("pictures") / "run", request(steps=30))
    shop.train(30)
    return shop.run.folder


def tiles(path, rows, columns, headings=(), side=SIDE, channels=1):
    """The images in a picture, at their own size: uint8 (rows, columns, H, W, C)."""
    with Image.open(path) as picture:
        canvas = np.asarray(picture).reshape(picture.height, picture.width, channels)
    scale = picture_scale(side, side, headings)
    cell, top = side * scale + PICTURE_GAP, headings_height(headings)
    found = np.empty((rows, columns, side, side, channels), np.uint8)
    for row in range(rows):
        for column in range(columns):
            y, x = top + row * cell, PICTURE_GAP + column * cell
            tile = canvas[y : y + side * scale, x : x + side * scale]
            found[row, column] = tile[::scale, ::scale]
            assert np.array_equal(found[row, column].repeat(scale, 0).repeat(scale, 1), tile)
    return found


def size_of(path):
    with Image.open(path) as picture:
        return picture.size


def strip_of(path, rows, side=SIDE, channels=1):
    """(the images of a strip, the headings of its columns)."""
    headings = json.loads(path.with_suffix(".json").read_text())["columns"]
    return tiles(path, rows, len(headings), headings, side, channels), headings


def draw(folder, classes="3,8", grid="2x5", **options):
    return harness.sample(run=folder, classes=classes, grid=grid, batch=BATCH, sampling_steps=12, **options)


def refused(*words):
    result = CliRunner().invoke(group, [str(each) for each in words])
    assert isinstance(result.exception, UserError), (result.exception, result.output)
    assert "\n" not in str(result.exception)
    return str(result.exception)


def sample_images(**options):
    (path,) = harness.sample(**{"batch": BATCH, "samples": 30, **options}).samples
    found = read_samples(path)
    return found.images, found.labels


def test_image_i_of_a_picture_is_image_i_of_a_sample_set_with_its_label(folder):
    result = draw(folder)
    assert result.samples == () and [each.name for each in result.pictures] == ["class-0003.png", "class-0008.png"]
    images, labels = sample_images(run=folder, labels="balanced", sampling_steps=12)
    for path, label in zip(result.pictures, (3, 8), strict=True):
        found = tiles(path, 2, 5).reshape(10, SIDE, SIDE, 1)
        assert labels[label] == label and np.array_equal(found[label], images[label])
        assert not np.array_equal(found[label - 1], images[label - 1])  # which has another label
        assert len(np.unique(found.reshape(10, -1), axis=0)) == 10


def test_a_sidecar_says_how_the_picture_was_made(folder):
    path = draw(folder, cfg=2).pictures[0]
    found = json.loads(path.with_suffix(".json").read_text())
    assert found["kind"] == "pictures" and found["sha256"] == sha256_file(path)
    assert found["class"] == {"label": 3, "names": []} and "no sample set" in found["note"]
    identity = found["identity"]
    assert (
        identity["training_steps"] == 30 and identity["grid"] == "2x5" and identity["sampling"]["guidance_scale"] == 2
    )
    assert "label_policy" not in identity["sampling"] and "count" not in identity
    assert "cfg2" in path.parent.name and path.parent.parent == folder / "pictures"


def test_guidance_within_an_interval_is_named(folder):
    """In the folder's name as in that of a sample set, and in the caption, which makes the pictures differ."""
    plain, within = (draw(folder, classes="3", cfg=cfg).pictures[0] for cfg in ("2", "2@0.1-5"))
    assert "-cfg2-2x5-" in plain.parent.name and "-cfg2@0.1-5-2x5-" in within.parent.name
    identity = json.loads(within.with_suffix(".json").read_text())["identity"]
    assert identity["sampling"]["guidance_interval"] == "0.1-5"
    images = [tiles(path, 2, 5) for path in (plain, within)]
    assert images[0].shape == images[1].shape == (2, 5, SIDE, SIDE, 1) and not np.array_equal(*images)


def test_the_same_picture_is_not_drawn_again(folder, caplog, monkeypatch):
    (path,) = draw(folder, classes="5").pictures
    before = {each: each.stat().st_mtime_ns for each in path.parent.iterdir()}
    assert draw(folder, classes=[5]).pictures == draw(folder, classes="05").pictures == (path,)
    with caplog.at_level("INFO", "harness"):
        assert len(draw(folder, classes="4,5").pictures) == 2
    assert f"1 of 2 pictures is already in {path.parent}" in caplog.text
    assert {each: each.stat().st_mtime_ns for each in before} == before
    other = draw(folder, classes="5", sampling_seed=1).pictures[0]
    assert other.parent != path.parent and sha256_file(other) != sha256_file(path)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(UserError, match="is another picture than its sidecar says"):
        draw(folder, classes="5")


def test_a_strip_ends_in_the_sample(folder):
    for sampler in ("ddpm", "euler", "dpm++-2m"):
        grid, path = draw(folder, classes="7", sampler=sampler, trajectory=True).pictures
        assert path.name == "class-0007-trajectory.png"
        found, headings = strip_of(path, 4)
        assert headings[0].startswith("t = 9") and headings[-2:] == ["t = 0", "sample"] and len(headings) == 9
        samples = tiles(grid, 2, 5).reshape(10, SIDE, SIDE, 1)[:4]
        assert np.array_equal(found[:, -1], samples)
        assert np.array_equal(found[:, -2], samples)  # the last predicted image is the sample itself
        distance = np.abs(found.astype(float) - samples[:, None]).mean(axis=(0, 2, 3, 4))
        assert distance[0] > distance[4] > distance[-2] == 0


def test_a_strip_of_an_existing_grid_is_that_of_a_new_one(folder):
    options = {"classes": "1", "grid": "1x3", "eta": 1, "sampler": "ddim"}
    (grid,) = draw(folder, **options).pictures
    before = grid.stat().st_mtime_ns
    again, strip = draw(folder, **options, trajectory=True).pictures
    assert again == grid and grid.stat().st_mtime_ns == before
    assert np.array_equal(strip_of(strip, 3)[0][:, -1], tiles(grid, 1, 3)[0])


def test_batches_do_not_show(folder):
    one, other = (
        harness.sample(run=folder, classes=2, grid="2x3", batch=batch, sampling_steps=4, trajectory=True).pictures
        for batch in (1, 6)
    )
    assert one != other  # the batch size can change last bits
    for a, b, side in (
        (tiles(one[0], 2, 3), tiles(other[0], 2, 3), 6),
        (strip_of(one[1], 4)[0], strip_of(other[1], 4)[0], 4),
    ):
        assert a.shape == b.shape and side in (a.shape[0] * a.shape[1], a.shape[0])
        assert np.abs(a.astype(int) - b).max() <= 1


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--classes", "12"), "class 12 is outside 0 to 9"),
        (("--classes", "cat"), "unknown class 'cat'; known: the numbers 0 to 9"),
        (("--grid", "2x2"), "--grid belongs to --classes"),
        (("--trajectory",), "--trajectory belongs to --classes"),
        (("--classes", "1", "--samples", "10"), "--samples belongs to sample sets; with --classes --grid ROWSxCOLUMNS"),
        (("--classes", "1", "--labels", "random"), "--labels belongs to sample sets"),
    ],
)
def test_what_makes_no_sense_is_refused(words, text, folder):
    before = sorted(folder.rglob("*"))
    assert text in refused("sample", "--run", folder, *words)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("grid", ["4", "0x8", "4x", "-1x2", "2x2x2", "100x100", "axb", 4, (4, 8)])
def test_a_bad_grid_is_refused(grid):
    with pytest.raises(UserError, match=r"^--grid: .*(of the form ROWSxCOLUMNS|more than 1,024 images)"):
        SampleOptions(classes="1", grid=grid)


@pytest.mark.parametrize("classes", ["", "1,,2", []])
def test_classes_without_a_name_are_refused(classes):
    with pytest.raises(UserError, match="^--classes: .* names nothing"):
        SampleOptions(classes=classes)


def test_classes_are_numbers_or_names():
    names = registry.datasets.get("imagenet").class_names({})
    assert len(names) == 1000 and len({each for known in names for each in known}) == 2000
    assert read_classes(["207", "Golden Retriever", "n02099601", "otter"], names, 1000) == (207, 360)
    assert display_name(207, names) == '"golden retriever" (207)' and display_name(3, ()) == "3"
    # classes of the paper's figures that have the same name there
    for name, label in (("volcano", 980), ("lion", 291), ("macaw", 88), ("space shuttle", 812), ("coral reef", 973)):
        assert read_classes([name], names, 1000) == (label,)
    assert imagenet.devkit_ids()[imagenet.classes()[207]] == 193 or len(imagenet.devkit_ids()) == 1000
    with pytest.raises(UserError, match="unknown class 'goldn retriever'; did you mean golden retriever"):
        read_classes(["goldn retriever"], names, 1000)
    clothes = registry.datasets.get("fashion-mnist").class_names({})
    assert read_classes(["ankle boot", "0"], clothes, 10) == (9, 0)
    assert registry.datasets.get("prepared").class_names({}) == ()


def test_an_unconditional_system_has_no_classes():
    protocol = get_protocol("digits")
    spec = SimpleNamespace(name="any")
    options = SampleOptions(classes="0")
    for arguments in ({}, {"num_classes": 0}):
        with pytest.raises(UserError, match="the run r is unconditional, so its images have no class; leave out"):
            labels_of_classes(options, protocol, [(spec, arguments)], {}, "the run r")
    assert labels_of_classes(options, protocol, [(spec, {"num_classes": 10})], {}, "the run r")[0] == (0,)


def test_a_generator_has_no_trajectory(tmp_path):
    job = pictures.PictureJob(
        folder=tmp_path / "none", identity={}, labels=(0,), names=(), grid=pictures.DEFAULT_GRID, trajectory=True,
        plans=(("base", None),), caption=(), batch=1,
    )  # fmt: skip
    with pytest.raises(UserError, match="--trajectory needs a sampler with steps, and base is a generator"):
        draw_pictures(job, lambda: None, {}, lambda: "any")


def test_pictures_are_no_samples(folder):
    path = draw(folder).pictures[0]
    assert is_picture(path)
    for where in (path.parent, path.parent.parent):
        assert "holds pictures to look at, no samples" in refused("evaluate", where, "--name", "any")
    assert not (folder / "records.jsonl").exists()
    # What `harness report` reads: a sample set beside the pictures has records, and the pictures add none.
    (path,) = harness.sample(run=folder, samples=100, sampling_steps=2).samples
    records = harness.evaluate(path).records
    read = load(find_record_files([folder])).records
    assert {record.id for record in read} == {record.id for record in records} and len(records) > 1


def test_a_run_in_jax_gives_the_same_pictures(folder, tmp_path):
    """Of the same weights, as those of a system."""
    pytest.importorskip("jax")
    (tmp_path / "mine.toml").write_text(
        'name = "mine"\nprotocol = "digits"\n[base]\nbackbone = "dit-xs-4"\nsteps = 12\nclip_denoised = true\n'
        "arguments = { input_size = 8, in_channels = 1, num_classes = 10 }\n"
    )
    options = {
        "system": tmp_path / "mine.toml", "weights": {"base": folder}, "out": tmp_path / "out", "batch": BATCH,
        "device": "cpu",
    }  # fmt: skip
    options["system"] = str(options["system"])
    found = {}
    for framework in ("torch", "jax"):
        grid, strip = harness.sample(**options, framework=framework, classes="6", grid="2x4", trajectory=True).pictures
        assert grid.parent.parent == tmp_path / "out" / "pictures"
        images, labels = sample_images(**options, framework=framework)
        at = [i for i in range(8) if labels[i] == 6]
        shown = tiles(grid, 2, 4).reshape(8, SIDE, SIDE, 1)
        assert at and np.array_equal(shown[at], images[at])
        steps, headings = strip_of(strip, 4)
        assert np.array_equal(steps[:, -1], shown[:4])
        # In jax the predicted images are computed by another compiled function than the samples.
        assert np.abs(steps[:, -2].astype(int) - shown[:4]).max() <= (framework == "jax")
        found[framework] = steps.astype(int), headings
    assert found["torch"][1] == found["jax"][1]
    assert np.abs(found["torch"][0] - found["jax"][0]).max() <= 2


def test_a_cascade_shows_the_steps_of_both_networks(tmp_path):
    from harness.data.load import load_data
    from harness.pipeline.train import RunSession
    from harness.planning.request import make_request

    low = make_request(backbone="adm-xs", protocol="digits-4", steps=4, settings={"batch": "24"})
    up = workshop(tmp_path / "up", request("adm-u-xs", steps=4, settings={"conditioning_noise": "0.2"}))
    up.train(4)
    base = RunSession(low, load_data(low.protocol, None), tmp_path / "low")
    base.create(up.run.resolved)
    base.train(4)
    grid, strip = harness.sample(
        system="digits-cascade-augmented", weights={"base": tmp_path / "low", "upsampler": tmp_path / "up"},
        sampling_steps=12, classes="9", grid="1x2", trajectory=True, out=tmp_path / "out",
    ).pictures  # fmt: skip
    found, headings = strip_of(strip, 2)
    assert headings[0] == "base: t = 999" and headings[4].startswith("upsampler: t = ") and headings[-1] == "sample"
    assert len(headings) == 9 and np.array_equal(found[:, -1], tiles(grid, 1, 2)[0])
    assert np.array_equal(found[:, -2], found[:, -1])  # the upsampler's last row, of 24 rows in all
    small = found[:, :4, ::2, ::2]  # of 4 pixels, shown at 8
    assert np.array_equal(small.repeat(2, 2).repeat(2, 3), found[:, :4])
    assert not np.array_equal(found[:, 4:8, ::2, ::2].repeat(2, 2).repeat(2, 3), found[:, 4:8])


def test_latents_are_decoded(tmp_path):
    rng = np.random.default_rng(1)
    images = np.kron(rng.integers(0, 256, (60, 4, 4, 3)), np.ones((1, 8, 8, 1))).astype(np.uint8)
    write_samples(tmp_path / "images.npz", [images], np.arange(60) % 10, {})
    save_vae(tmp_path / "vae", scaling_factor=0.8, shift_factor=0.1)
    (tmp_path / "task.toml").write_text(
        'name = "latents-32"\ndataset = "npz"\nresolution = 32\nnum_classes = 10\nspace = "latents"\ninput_size = 4\n'
        'in_channels = 4\nsamples = 100\nsuite = "embedded"\n[recipe]\nbatch = 12\n[sampling]\nsteps = [3]\n'
    )
    words = ["data", "latents", "images.npz", "--vae", "vae", "--out", "cache", "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        result = CliRunner().invoke(group, words)
        assert result.exit_code == 0, (result.exception, result.output)
        harness.train(
            backbone="dit-xs-4", protocol="task.toml", data="cache", steps=3, out="run", device="cpu",
            precision="float32", micro_batch=6,
        )  # fmt: skip
        grid, strip = harness.sample(run="run", classes="4", grid="2x2", trajectory=True, sampler="euler").pictures
        found, headings = strip_of(tmp_path / strip, 4, side=32, channels=3)
        assert headings[-2:] == ["t = 0", "sample"] and len(headings) == 4
        assert np.array_equal(found[:, -2], found[:, -1])
        assert np.array_equal(found[:, -1], tiles(tmp_path / grid, 2, 2, (), 32, 3).reshape(4, 32, 32, 3))


def test_a_picture_is_as_large_as_its_images_and_its_text(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 64, 64, 3), np.uint8)
    path = write_picture(images, tmp_path / "a.png")
    assert size_of(path) == (max(3 * 66 + 2, 240), 2 + 2 * 66)
    assert np.array_equal(tiles(path, 2, 3, (), 64, 3), images)
    headings = ["t = 999", "a heading that is too long for 64 pixels", ""]
    wide = write_picture(images, tmp_path / "b.png", headings=headings, caption=["word " * 40, "end"])
    assert size_of(wide)[0] == 3 * (64 * picture_scale(64, 64, headings) + 2) + 2
    assert picture_scale(64, 64, headings) == 4 and size_of(wide)[1] > 24 + 2 * 258
    assert np.array_equal(tiles(wide, 2, 3, headings, 64, 3), images)
