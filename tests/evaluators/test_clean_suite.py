"""Suite clean against the clean-fid package: its resize bit for bit, its normalisation, its two metrics, its absence."""

import contextlib
import dataclasses
import json
import subprocess
import sys
import warnings

import inception_graph_maker as maker
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from evaluators import frechet, kernel_distance
from evaluators.features import INCEPTION_2015, INCEPTION_2015_CLEAN, Features, inception_v3
from evaluators.intervals import assign_blocks
from evaluators.statistics import statistics
from evaluators.suites import CLEAN
from harness import registry
from harness.cli import group
from harness.errors import UserError

cleanfid = pytest.importorskip("cleanfid")
from cleanfid import fid, inception_torchscript, resize  # noqa: E402, below what skips without the package

SIZES = (32, 64, 299, 512)


@pytest.fixture(scope="module")
def extractor(made_inception):
    return INCEPTION_2015_CLEAN.load(weights=made_inception.port)


class Layers(torch.nn.Module):
    """A replacement for clean-fid's network that records its input."""

    def forward(self, x):
        self.given = x.clone()
        return torch.zeros(len(x), 2048)


def by_clean_fid(images):
    """The resized and normalised input that clean-fid passes to the layers of its TorchScript network."""
    wrapper = inception_torchscript.InceptionV3W.__new__(inception_torchscript.InceptionV3W)
    torch.nn.Module.__init__(wrapper)
    wrapper.resize_inside, wrapper.layers = False, Layers()
    resizer = resize.build_resizer("clean")
    wrapper(torch.tensor(np.stack([resizer(image).transpose(2, 0, 1) for image in images])))
    return wrapper.layers.given.numpy()


@pytest.mark.parametrize("size", SIZES)
def test_input_of_the_network_is_clean_fids_bit_for_bit(size, extractor):
    images = maker.pictures(3, size, seed=size)
    images[0, : size // 2] = 255  # an edge, on which the bicubic overshoots and is clipped
    found = extractor.prepare(images)
    assert found.dtype == torch.float32 and found.shape == (3, 3, 299, 299)
    np.testing.assert_array_equal(found.numpy(), by_clean_fid(images))
    assert found.min() >= -1 and found.max() == (255 - 128) / 128


def test_the_resize_is_pillows_of_each_channel_in_float32_and_not_rounded(extractor):
    (image,) = maker.pictures(1, 48, seed=1)
    found = extractor.prepare(image[None]).numpy()[0] * 128 + 128
    for c in range(3):
        channel = Image.fromarray(image[..., c].astype(np.float32)).resize((299, 299), Image.Resampling.BICUBIC)
        np.testing.assert_allclose(found[c], np.clip(np.asarray(channel), 0, 255), atol=1e-4)
    assert np.abs(found - np.round(found)).max() > 0.4
    adm = inception_v3.preprocess(torch.from_numpy(image[None])).numpy()[0] * 128 + 128
    assert np.abs(found - adm).max() > 5  # another resize than ADM's


def test_features_are_those_of_the_weights_on_clean_fids_images(extractor, made_inception):
    images = maker.pictures(2, 64, seed=2)
    expected = maker.Runner(made_inception.writer.weights).features(torch.from_numpy(by_clean_fid(images)))
    found = extractor(images)
    for stage in ("pooled", "spatial", "logits"):
        difference = np.abs(getattr(found, stage) - expected[stage]).max()
        assert difference < inception_v3.TOLERANCES[stage] * np.sqrt((expected[stage] ** 2).mean()), stage
    grey = images[..., :1]
    np.testing.assert_array_equal(extractor(grey).pooled, extractor(np.repeat(grey, 3, axis=3)).pooled)


def test_hash_and_description_say_which_resize(extractor, made_inception):
    adm = INCEPTION_2015.load(weights=made_inception.port)
    assert extractor.sha256 != adm.sha256 and extractor.found == adm.found
    assert "clean-fid package in its mode clean" in extractor.description
    for mode in ("mode clean", "legacy_pytorch", "legacy_tensorflow"):
        assert mode in CLEAN.note


# The metrics, on stored features --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored():
    random = np.random.default_rng(3)
    mix = random.normal(0, 1, (64, 64)) / 8 + np.eye(64)
    samples = (random.normal(0.2, 0.5, (700, 64)) @ mix).astype(np.float32)
    reference = random.normal(0.1, 0.4, (900, 64)).astype(np.float32)
    return samples, reference


def test_fid_equals_clean_fids(stored):
    samples, reference = stored
    with warnings.catch_warnings(), contextlib.redirect_stdout(None):
        warnings.simplefilter("ignore", DeprecationWarning)  # it calls scipy's sqrtm with `disp`
        theirs = fid.fid_from_feats(samples, reference)
    ours = frechet.estimate(samples, statistics(reference), assign_blocks(len(samples))).value
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_kid_equals_clean_fids_on_all_samples(stored):
    """Its subsets are then the sets, and the random choice is an order."""
    samples, reference = (rows[:700].astype(np.float64) for rows in stored)
    theirs = fid.kernel_distance(reference, samples, num_subsets=2, max_subset_size=700)
    assert kernel_distance.estimate(samples, reference, assign_blocks(700)).value == pytest.approx(theirs, rel=1e-9)


def test_kid_is_the_mean_of_clean_fids_random_subsets(stored):
    samples, reference = stored
    np.random.seed(4)  # noqa: NPY002, clean-fid draws from numpy's global state
    draws = [fid.kernel_distance(reference, samples, num_subsets=20, max_subset_size=100) for _ in range(40)]
    ours = kernel_distance.estimate(samples, reference, assign_blocks(len(samples))).value
    error = np.std(draws, ddof=1) / np.sqrt(len(draws))
    assert abs(ours - np.mean(draws)) < 4 * error < 0.1 * ours


# The command ----------------------------------------------------------------------------------------------------------


TASK = """
name = "pictures"
dataset = "npz"
resolution = 32
num_classes = 10
input_size = 32
in_channels = 3
samples = 100
suite = "clean"
"""


@pytest.fixture
def arguments(tmp_path, made_inception):
    images = np.concatenate([maker.pictures(10, 32, seed) for seed in range(13)])
    np.savez(tmp_path / "samples.npz", arr_0=images[:100], arr_1=np.arange(100) % 10)
    np.savez(tmp_path / "reference.npz", arr_0=images[100:], mu=np.zeros(2048), sigma=np.eye(2048))  # of other features
    (tmp_path / "task.toml").write_text(TASK)
    return [
        "evaluate", tmp_path / "samples.npz", "--protocol", tmp_path / "task.toml", "--reference",
        tmp_path / "reference.npz", "--inception", made_inception.port,
    ]  # fmt: skip


def run(arguments):
    return CliRunner().invoke(group, list(map(str, arguments)))


def on_a_grid(x):
    """float32 (N, 3, 299, 299) to (N, 24): mean colour of 8 places."""
    return torch.nn.functional.adaptive_avg_pool2d(x, (2, 4)).flatten(1).numpy()


def test_records_and_note_say_the_mode(arguments, monkeypatch):
    """With a small network, because Inception's features would take a minute."""
    from evaluators.features import inception_clean

    small = dataclasses.replace(CLEAN, features=dataclasses.replace(INCEPTION_2015_CLEAN, dim=24))
    monkeypatch.setitem(registry.suites._items, registry.suites.get("clean").name, small)
    network = lambda self, images: Features(pooled=on_a_grid(self.prepare(images)))  # noqa: E731
    monkeypatch.setattr(inception_clean.CleanInceptionFeatures, "__call__", network)
    done = run([*arguments, "--json"])
    assert done.exit_code == 0, done.exception
    assert "has mu and sigma, which suite clean does not use" in done.stderr
    records = {each["metric"]: each for each in json.loads(done.stdout)["records"]}
    assert list(records) == ["fid", "kid"]
    for each in records.values():
        judged = each["evaluation"]
        assert (judged["suite"], judged["mode"]) == ("clean", "clean")
        assert judged["features"] == "inception-2015-12-05-clean"
        assert each["environment"]["versions"]["clean-fid"] and each["environment"]["versions"]["pillow"]
    resizer = resize.build_resizer("clean")

    def features(name):
        with np.load(arguments[1].with_name(name)) as data:
            x = np.stack([resizer(image).transpose(2, 0, 1) for image in data["arr_0"]])
        return on_a_grid(torch.from_numpy((x - 128) / 128))

    samples, reference = features("samples.npz"), features("reference.npz")
    expected = frechet.frechet_distance(statistics(samples), statistics(reference))
    assert records["fid"]["value"] == pytest.approx(expected, rel=1e-6)
    assert "suite clean: clean-fid's mode clean" in run(arguments).stdout


def test_without_the_package_the_refusal_is_one_line_with_the_command(arguments, monkeypatch):
    for module in [name for name in sys.modules if name.partition(".")[0] == "cleanfid"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delitem(sys.modules, "evaluators.features.inception_clean", raising=False)
    monkeypatch.setitem(sys.modules, "cleanfid", None)
    done = run(arguments)
    assert isinstance(done.exception, UserError)
    text = str(done.exception)
    assert "pip install 'backbone-harness[clean-fid]'" in text and "\n" not in text
    assert not arguments[1].with_name("records.jsonl").exists()


def test_the_resize_needs_no_torchvision():
    code = (
        "import sys; sys.modules['torchvision'] = None; import evaluators.features.inception_clean as module;"
        "print(module.build_resizer.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "cleanfid.resize", done.stderr
