"""Every guard, from the command line: the name in its error or warning, and nothing written after an error."""

import dataclasses

import few_digits
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from pixel_features import SPEC, PixelFeatures

from evaluators.features import Features
from evaluators.guards import GUARDS, NEVER_ALLOWED
from evaluators.suites import BUILT_IN
from harness import registry
from harness.cli import group
from harness.data.digits import load
from harness.errors import RunError, UserError

TASK = few_digits.task("few", suite="adm")
SAMPLES, REFERENCE = slice(200), slice(200, 500)
DIGITS = load()
DIM, SPATIAL = 12, 9  # of the extractor


def statistics():
    return {"mu": np.zeros(DIM), "sigma": np.eye(DIM), "mu_s": np.zeros(SPATIAL), "sigma_s": np.eye(SPATIAL)}


class Place:
    """Valid samples and a valid reference, into which a test introduces one fault."""

    def __init__(self, folder):
        self.folder, self.arguments = folder, []
        self.samples = {"arr_0": (DIGITS.images[SAMPLES] * 0.8).astype(np.uint8), "arr_1": DIGITS.labels[SAMPLES]}
        self.reference = {"arr_0": DIGITS.images[REFERENCE].copy(), **statistics()}
        self.paths = {name: folder / f"{name}.npz" for name in ("samples", "reference")}

    def evaluate(self):
        """What the command did, after the files are written."""
        for name, path in self.paths.items():
            if path.suffix == ".npz":
                np.savez(path, **getattr(self, name))
        (self.folder / "task.toml").write_text(TASK)
        words = ["evaluate", self.paths["samples"], "--protocol", self.folder / "task.toml"]
        words += ["--reference", self.paths["reference"], "--out", self.folder / "out.jsonl", "--json"]
        return CliRunner().invoke(group, list(map(str, (*words, *self.arguments))))


@pytest.fixture
def place(tmp_path, monkeypatch):
    for into, item in (
        (registry.features, SPEC),
        (registry.suites, dataclasses.replace(BUILT_IN["adm"], features=SPEC)),
    ):
        into.names()
        monkeypatch.setitem(into._items, item.name, item)
        monkeypatch.setitem(into._owners, item.name, "these tests")
    return Place(tmp_path)


def too_few(p):
    p.samples = {key: array[:99] for key, array in p.samples.items()}


def name_of_count(p):
    p.arguments = ["--name", "FID-50K of mine"]


def duplicates(p):
    p.samples["arr_0"][50:] = p.samples["arr_0"][:1]


def some_duplicates(p):
    p.samples["arr_0"][:40] = p.samples["arr_0"][40:80]


def constant(p):
    p.samples["arr_0"][:120] = np.arange(120)[:, None, None, None]


def one_is_constant(p):
    p.samples["arr_0"][7] = 0


def unit_range(p):
    p.samples["arr_0"] = (p.samples["arr_0"] / p.samples["arr_0"].max()).round().astype(np.uint8)


def unit_range_of_the_reference(p):
    p.reference["arr_0"] = (p.reference["arr_0"] / 255).round().astype(np.uint8)


def signed_range(p):
    signed = (p.samples["arr_0"] / 100.0 - 1).round().astype(np.int8)
    p.samples["arr_0"] = signed.astype(np.uint8)


def bilevel(p):
    p.samples["arr_0"] = np.where(p.samples["arr_0"] > 100, 255, 0).astype(np.uint8)


def half_range(p):
    p.samples["arr_0"] //= 2


def jpeg(p):
    p.paths["samples"] = p.folder / "jpegs"
    p.paths["samples"].mkdir()
    for i, image in enumerate(p.samples["arr_0"]):
        Image.fromarray(image[..., 0]).save(p.paths["samples"] / f"{i:04d}.jpg", quality=80)


def same_images(p):
    p.reference["arr_0"] = p.samples["arr_0"]


def swapped(p):
    p.reference["arr_0"][:160] = p.samples["arr_0"][:160]


def swapped_files(p):
    del p.reference["mu"]
    p.samples |= statistics()


def copies(p):
    p.samples["arr_0"][:5] = p.reference["arr_0"][:5]


def statistics_in_samples(p):
    p.samples |= statistics()


def resolution(p):
    p.reference["arr_0"] = p.reference["arr_0"].repeat(2, axis=1).repeat(2, axis=2)


def resolution_of_the_samples(p):
    p.samples["arr_0"] = p.samples["arr_0"].repeat(2, axis=1).repeat(2, axis=2)


def channels(p):
    p.reference["arr_0"] = p.reference["arr_0"].repeat(3, axis=3)


def adms_images(p):
    p.reference = {"arr_0": np.random.RandomState(0).randint(0, 256, (10_000, 8, 8, 1)).astype(np.uint8)}


def no_statistics(p):
    del p.reference["mu"], p.reference["sigma"]


def labels_missing(p):
    del p.samples["arr_1"]


def labels_outside(p):
    p.samples["arr_1"] = p.samples["arr_1"] + 1


def labels_uneven(p):
    p.samples["arr_1"] = np.zeros(200, np.int64)


CASES = [  # (function that introduces the fault, the guard that finds it, its level)
    (too_few, "too-few", "refuse"),
    (name_of_count, "name-of-count", "refuse"),
    (duplicates, "duplicates", "refuse"),
    (some_duplicates, "duplicates", "warn"),
    (constant, "constant", "refuse"),
    (one_is_constant, "constant", "warn"),
    (unit_range, "unit-range", "refuse"),
    (unit_range_of_the_reference, "unit-range", "refuse"),
    (signed_range, "signed-range", "refuse"),
    (bilevel, "signed-range", "warn"),
    (half_range, "half-range", "warn"),
    (jpeg, "jpeg", "refuse"),
    (same_images, "same-images", "refuse"),
    (swapped, "swapped", "refuse"),
    (swapped_files, "swapped", "refuse"),
    (copies, "copies", "warn"),
    (statistics_in_samples, "statistics-in-samples", "warn"),
    (resolution, "resolution", "refuse"),
    (resolution_of_the_samples, "resolution", "refuse"),
    (channels, "resolution", "refuse"),
    (adms_images, "reference-statistics", "refuse"),
    (no_statistics, "reference-statistics", "warn"),
    (labels_missing, "labels-missing", "warn"),
    (labels_outside, "labels-outside", "refuse"),
    (labels_uneven, "labels-uneven", "warn"),
]


def test_every_guard_has_a_case():
    assert {name for _, name, _ in CASES} == set(GUARDS)


def test_valid_files_have_no_warnings(place, caplog):
    done = place.evaluate()
    assert done.exit_code == 0, done.exception
    assert "warning" not in done.stderr and not caplog.records


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0].__name__)
def test_guard(place, case):
    spoil, name, level = case
    spoil(place)
    done = place.evaluate()
    print(done.exception if level == "refuse" else done.stderr)
    if level == "warn":
        assert done.exit_code == 0, done.exception
        lines = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
        assert any(line.endswith(f" ({name})") for line in lines), done.stderr
        return
    assert isinstance(done.exception, UserError), done
    text = str(done.exception)
    assert f"({name}" in text and "\n" not in text
    assert not (place.folder / "out.jsonl").exists() and not done.stdout
    if name in NEVER_ALLOWED:
        place.arguments += ["--allow", name]
        assert isinstance(place.evaluate().exception, UserError)


@pytest.mark.parametrize("name", ["mu", "sigma", "mu_s", "sigma_s"])
def test_half_of_the_statistics_is_refused(place, name):
    del place.reference[name]
    done = place.evaluate()
    assert isinstance(done.exception, UserError), done.exception
    assert f"reference.npz: {name} of mu" in str(done.exception) and "is missing" in str(done.exception)
    assert not (place.folder / "out.jsonl").exists() and not done.stdout


@pytest.mark.parametrize("name", ["mu", "sigma", "mu_s", "sigma_s"])
@pytest.mark.parametrize("dtype", [np.complex64, "U3", bool])
def test_statistics_that_are_no_real_numbers_are_refused(place, name, dtype):
    place.reference[name] = place.reference[name].astype(dtype)
    done = place.evaluate()
    assert isinstance(done.exception, UserError), done.exception
    assert "statistics are real numbers" in str(done.exception) and not (place.folder / "out.jsonl").exists()


@pytest.mark.parametrize("where", ["samples", "reference"])
def test_features_that_are_not_finite(place, where, monkeypatch):
    plain = PixelFeatures.__call__
    bad = getattr(place, where)["arr_0"][3]

    def spoilt(self, images):
        seen = plain(self, images)
        rows = seen.pooled.copy()
        rows[(images == bad).all(axis=(1, 2, 3)), 2] = np.nan
        return Features(pooled=rows, logits=seen.logits, spatial=seen.spatial)

    monkeypatch.setattr(PixelFeatures, "__call__", spoilt)
    done = place.evaluate()
    print(done.exception)
    assert isinstance(done.exception, RunError)
    kind = "sample" if where == "samples" else "reference"
    assert str(done.exception).endswith(f"of image 3 are not finite ({kind} features)")
    assert not (place.folder / "out.jsonl").exists() and not done.stdout
