"""Guards: every fault, introduced into real digits or photographs, is found; in correct images nothing is found."""

import io
import time

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image

from evaluators.guards import GUARDS, NEVER_ALLOWED, GuardContext, check, collect_image_stats, enforce
from evaluators.jpeg_traces import MIN_COMBS, JpegTraces
from evaluators.reference import images_sha256
from harness.errors import UserError
from harness.images.open import open_images
from harness.images.source import from_batches

LEAST = {"fd": 100, "copies": 20}


@pytest.fixture(scope="module")
def digits():
    bunch = load_digits()
    order = np.random.RandomState(0).permutation(len(bunch.images))
    images = np.rint(bunch.images * 255 / 16).astype(np.uint8)[order, ..., None]
    return images, bunch.target[order].astype(np.int64)


@pytest.fixture(scope="module")
def halves(digits):
    """600 and 600 different digits: the samples of a perfect generator, and its reference."""
    return digits[0][:600], digits[0][600:1200]


@pytest.fixture(scope="module")
def photographs():
    """Crops (400, 64, 64, 3) of two photographs shrunk to a half and a third, so that no JPEG grid is left."""
    crops, random = [], np.random.RandomState(0)
    for name in ("china.jpg", "flower.jpg"):
        for factor in (2, 3):
            full = Image.fromarray(load_sample_image(name))
            image = np.asarray(full.resize((full.width // factor, full.height // factor), Image.BICUBIC))
            for _ in range(100):
                y, x = random.randint(image.shape[0] - 64), random.randint(image.shape[1] - 64)
                crops.append(image[y : y + 64, x : x + 64])
    return np.stack(crops)


def jpeg(images, quality):
    out = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "JPEG", quality=quality)
        out.append(np.asarray(Image.open(file)).reshape(image.shape))
    return np.stack(out)


def levels(samples, reference=None, **task):
    task = GuardContext(**{"minimum": LEAST, **task})
    found = check(samples, reference, task)
    assert all("\n" not in each.text and len(each.text) > 20 for each in found)
    return {each.name: each.level for each in found}


def test_nothing_is_found_in_real_digits_and_photographs(digits, halves, photographs):
    assert levels(*halves) == {}
    images, labels = digits
    source = from_batches([images[:600]], labels=labels[:600])
    assert levels(source, halves[1], classes=10, label_policy="random") == {}
    assert levels(photographs[::2], photographs[1::2]) == {}


def test_every_guard_is_documented_with_its_level():
    for name, rule in GUARDS.items():
        assert rule.startswith(("refused", "a warning")), name
    assert set(NEVER_ALLOWED) <= set(GUARDS)


def test_too_few_images(halves):
    assert levels(halves[0][:99], halves[1]) == {"too-few": "refuse"}
    assert levels(halves[0][:100], halves[1]) == {}


@pytest.mark.parametrize(
    ("name", "found"),
    [("FID-50K", True), ("fid50k", True), ("FD_1k", True), ("imagenet IS-50k", True)]
    + [("dit-xl-2-400k", False), ("FID", False), ("fid-0k", False), ("FID-50k-steps7", True), ("grid 9k", False)],
)
def test_a_name_that_promises_more_images(halves, name, found):
    assert levels(*halves, names=(name,)) == ({"name-of-count": "refuse"} if found else {})


def test_duplicates(halves):
    samples, reference = halves
    few = np.repeat(samples[:75], 8, axis=0)  # 75 distinct ones where 100 are needed
    assert levels(few, reference) == {"duplicates": "refuse"}
    assert levels(np.repeat(samples[:150], 4, axis=0), reference) == {"duplicates": "warn"}
    twice = np.concatenate([samples[:590], samples[:10]])
    assert levels(twice, reference) == {"duplicates": "warn"}
    assert levels(np.concatenate([samples[:596], samples[:4]]), reference) == {}  # 0.7 %
    assert levels(samples, np.repeat(reference[:150], 4, axis=0)) == {"duplicates": "warn"}
    many = np.repeat(samples[7:8], 40 * 256, axis=0)  # whose few coefficients must not pass for a comb of JPEG
    assert levels(many, reference, minimum={}) == {"duplicates": "refuse"}
    assert collect_image_stats(twice).distinct == 590


def test_constant_images(halves):
    samples, reference = halves
    one = samples.copy()
    one[123] = 0
    assert levels(one, reference) == {"constant": "warn"}
    assert "image 123" in check(one, reference, GuardContext())[0].text
    most = samples.copy()
    most[200:] = np.arange(400, dtype=np.uint8).reshape(-1, 1, 1, 1)
    assert levels(most, reference)["constant"] == "refuse"
    assert levels(one, one[::-1])["swapped"] == "refuse" and "constant" in levels(samples, one)


def test_a_flat_colour_is_constant_and_a_flat_row_is_not(photographs):
    images = photographs.copy()
    images[5] = (10, 20, 30)
    images[6] = images[6, :1, :1]
    images[7, :63] = images[7, :1, :1]
    found = collect_image_stats(images)
    assert (found.constant, found.first_constant) == (2, 5)


def test_ranges(halves):
    samples, reference = halves
    unit = (samples / 255).astype(np.uint8)
    assert levels(unit, reference, minimum={})["unit-range"] == "refuse"
    assert levels(np.rint(samples / 255).astype(np.uint8), reference, minimum={})["unit-range"] == "refuse"
    signed = (samples / 127.5 - 1).astype(np.int64).astype(np.uint8)  # -1 wraps to 255
    assert set(np.unique(signed)) == {0, 1, 255}
    assert levels(signed, reference, minimum={})["signed-range"] == "refuse"
    bilevel = (samples > 127).astype(np.uint8) * 255
    assert levels(bilevel, reference, minimum={})["signed-range"] == "warn"
    assert "signed-range" not in levels(bilevel, (reference > 127).astype(np.uint8) * 255, minimum={})
    assert levels(samples // 2, reference) == {"half-range": "warn"}
    assert levels(samples // 2 + 127, reference) == {"half-range": "warn"}
    assert levels(samples // 2, reference // 2) == {}
    almost = samples // 2
    almost[0, 0, 0, 0] = 255  # one bright pixel hides nothing
    assert levels(almost, reference) == {"half-range": "warn"}


@pytest.mark.parametrize("quality", [75, 90, 95])
def test_traces_of_jpeg_in_the_pixels(halves, photographs, quality):
    for samples, reference in (halves, (photographs[::2], photographs[1::2])):
        assert levels(jpeg(samples, quality), reference) == {"jpeg": "warn"}
        assert levels(samples, jpeg(reference, quality)) == {"jpeg": "warn"}
        assert levels(jpeg(samples, quality), jpeg(reference, quality)) == {}


def test_no_false_alarm_of_jpeg(digits, photographs):
    """Small sets, resized ones, and patterns locked to a grid of 2, 4 or 8 pixels."""

    def combs(images):
        traces = JpegTraces()
        traces.add(images)
        return traces.combs()

    random, images = np.random.RandomState(0), digits[0]
    for n in (50, 100, 400):
        for _ in range(8):
            assert combs(images[random.permutation(len(images))[:n]]) <= 2
            assert combs(photographs[random.permutation(len(photographs))[: n // 4]]) <= 2
    for factor in (2, 4, 8):
        assert combs(images[:400].repeat(factor, 1).repeat(factor, 2)) < MIN_COMBS / 2
        assert combs(photographs[:, ::factor, ::factor].repeat(factor, 1).repeat(factor, 2)) < MIN_COMBS / 2
    blocks = np.clip(photographs + random.randint(-9, 10, (400, 8, 8, 1)).repeat(8, 1).repeat(8, 2), 0, 255)
    assert combs(blocks.astype(np.uint8)) <= 2  # edges along the grid, as patches leave them, and no quantisation
    assert combs((images[:400].repeat(4, 1).repeat(4, 2) > 128).astype(np.uint8) * 255) < MIN_COMBS
    assert combs(images[:, :7]) == 0  # no whole block


def test_jpeg_files_are_known_by_the_container(tmp_path, halves):
    samples, reference = halves
    for i, image in enumerate(samples[:120]):
        Image.fromarray(image[..., 0]).save(tmp_path / f"{i}.jpg", quality=100)  # no trace in the pixels
    source = open_images(tmp_path)
    assert levels(source, reference) == {"jpeg": "refuse"}
    assert levels(samples, source) == {"jpeg": "warn"}
    assert levels(source) == {"jpeg": "warn"}
    assert levels(source, reference, allow=("jpeg",)) == {"jpeg": "warn"}


def test_swapped_or_same_images(tmp_path, halves):
    samples, reference = halves
    assert levels(samples, samples) == {"same-images": "refuse"}
    assert levels(samples, samples[::-1]) == {"swapped": "refuse"}
    assert levels(np.concatenate([samples, reference]), reference) == {"swapped": "refuse"}
    some = np.concatenate([samples, reference[:10]])
    assert levels(some, reference) == {"copies": "warn"}
    np.savez(tmp_path / "with.npz", arr_0=samples, mu=np.zeros(9), sigma=np.eye(9))
    np.savez(tmp_path / "without.npz", arr_0=reference)
    with_, without = open_images(tmp_path / "with.npz"), open_images(tmp_path / "without.npz")
    assert levels(with_, without) == {"swapped": "refuse"}
    assert levels(without, with_) == {} and levels(without, with_, reference_statistics=True) == {}
    np.savez(tmp_path / "both.npz", arr_0=reference, mu=np.zeros(9), sigma=np.eye(9))
    assert levels(with_, open_images(tmp_path / "both.npz")) == {"statistics-in-samples": "warn"}


def test_adms_images_are_no_statistics(halves):
    samples, reference = halves
    assert levels(samples, reference, reference_statistics=True) == {"reference-statistics": "warn"}
    ten = np.random.RandomState(0).randint(0, 256, (10_000, 8, 8, 1)).astype(np.uint8)
    assert levels(samples, ten) == {"reference-statistics": "warn"}
    assert levels(samples, ten, reference_is_file=False) == {}  # a data set of as many images
    assert levels(samples, ten, reference_statistics=True) == {"reference-statistics": "refuse"}
    assert "precision and recall" in check(samples, ten, GuardContext(reference_statistics=True))[0].text


def test_resolution(halves):
    samples, reference = halves
    larger = reference.repeat(2, 1).repeat(2, 2)
    assert levels(samples, larger) == {"resolution": "refuse"}
    assert levels(samples, reference.repeat(3, 3)) == {"resolution": "refuse"}


def test_labels(digits, halves):
    images, reference = digits[0][:600], halves[1]

    def found(labels, reference=reference, **task):
        return levels(from_batches([images], labels=labels), reference, classes=10, **task)

    random = np.random.RandomState(0)
    balanced = np.arange(600) % 10
    assert levels(images, reference, classes=10) == {"labels-missing": "warn"}
    assert levels(images, reference, classes=1) == {}
    for policy in ("random", "balanced", None):
        assert found(balanced, label_policy=policy) == {}
    assert found(balanced + 1) == {"labels-outside": "refuse"}
    assert found(balanced - 1) == {"labels-outside": "refuse"}
    shifted = balanced.copy()
    shifted[:2] = 9  # 59, 59 and 62
    assert found(shifted, label_policy="balanced") == {"labels-uneven": "warn"} and found(shifted) == {}
    uneven = random.choice(10, 600, p=np.array([5, 1, 1, 1, 1, 1, 1, 1, 1, 1]) / 14)
    assert found(uneven, label_policy="random") == {"labels-uneven": "warn"} == found(uneven)
    like_it = from_batches([reference], labels=random.permutation(uneven))
    assert found(uneven, like_it) == {}
    alarms = sum(bool(found(random.randint(0, 10, 600), None)) for _ in range(20))
    assert alarms == 0


def test_the_p_value_of_uneven_labels_equals_scipys():
    from scipy.stats import chisquare

    from evaluators.guards import _chi_square_p

    counts = np.random.RandomState(0).multinomial(5000, np.arange(1, 11) / 55)
    shares = np.full(10, 0.1)
    assert _chi_square_p(counts, shares) == pytest.approx(chisquare(counts).pvalue, rel=1e-9, abs=1e-300)
    counts = np.array([480, 520, 510, 490])
    assert _chi_square_p(counts, np.full(4, 0.25)) == pytest.approx(chisquare(counts).pvalue, rel=1e-12)


def test_image_stats_take_one_pass_and_do_not_depend_on_the_container(tmp_path, digits):
    images = digits[0]
    np.savez_compressed(tmp_path / "s.npz", images)
    passes = []
    one = collect_image_stats(
        from_batches((passes.append(1) or images[i : i + 100] for i in range(0, 1797, 100)), 1797)
    )
    other = collect_image_stats(open_images(tmp_path / "s.npz"))
    assert len(passes) == 18
    assert one.sha256 == other.sha256 == images_sha256(images)
    np.testing.assert_array_equal(one.hashes, other.hashes)
    assert (one.lowest, one.highest, one.distinct, one.constant) == (0, 255, 1797, 0)
    assert one.histogram.sum() == other.histogram.sum() == images.size
    np.testing.assert_array_equal(one.histogram, np.bincount(images.ravel(), minlength=256))
    stages = []
    collect_image_stats(images, name="digits", progress=lambda *each: stages.append(each))
    assert stages[-1] == ("pixel statistics of digits", 1797, 1797)


def test_enforcing(halves, caplog):
    samples, reference = halves
    enforce(check(samples // 2, reference, GuardContext()))
    (record,) = caplog.records
    assert record.levelname == "WARNING" and record.getMessage().endswith(" (half-range)")
    bad = np.repeat(samples[:1] // 255, 20, axis=0)
    with pytest.raises(UserError) as caught:
        enforce(check(bad, reference, GuardContext(minimum=LEAST)))
    assert str(caught.value).endswith("(too-few; also duplicates, unit-range)")
    with pytest.raises(UserError, match="did you mean swapped"):
        GuardContext(allow=("swaped",))
    with pytest.raises(UserError, match="cannot be waived"):
        GuardContext(allow=("resolution",))
    enforce(check(samples, samples, GuardContext(allow=("same-images",))))
    assert caplog.records[-1].getMessage().endswith("(allowed) (same-images)")


def test_image_stats_cost_little(photographs):
    images = np.tile(photographs, (6, 1, 1, 1))[:2048]
    source = from_batches([images])
    source.count, source._digest = len(images), "known"  # the content's hash is the record's own cost
    took = []
    for _ in range(3):
        start = time.process_time()
        collect_image_stats(source)
        took.append((time.process_time() - start) / len(images))
    print(f"{min(took) * 1e6:.1f} us an image of 64 x 64 x 3")
    assert min(took) < 60e-6  # measured 10 to 20 us; a loaded machine is given three times that
