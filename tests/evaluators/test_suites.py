"""Suites: from images to measurements with names, error bars and refusals."""

import dataclasses

import numpy as np
import pytest
from sklearn.datasets import load_digits

from evaluators.features import Features, FeatureSpec
from evaluators.reference import build_reference, images_sha256
from evaluators.suites import BUILT_IN, EMBEDDED, METRICS, Suite, evaluate_samples
from harness.errors import RunError, UserError

KEYS = ["fd", "kid", "is", "precision", "recall", "copies"]


class Pixels:
    """An extractor that needs no network, and counts its images."""

    name, sha256, dim, description = "pixels", "0" * 64, 64, "for tests"

    def __init__(self):
        self.seen = 0

    def __call__(self, images):
        self.seen += len(images)
        pooled = images.reshape(len(images), -1)[:, :64].astype(np.float32) / 255
        return Features(pooled=pooled, logits=pooled[:, ::6])


SPEC = FeatureSpec(name="pixels", dim=64, classes=11, input_size=8, loader="tests:none", description="for tests")
SUITE = Suite(name="pixels", version=1, features=SPEC, metrics=EMBEDDED.metrics)


@pytest.fixture(scope="module")
def digits():
    images = np.round(load_digits().images * 255 / 16).astype(np.uint8)[..., None]
    return images[np.random.RandomState(0).permutation(len(images))]


@pytest.fixture(scope="module")
def reference(digits):
    return build_reference(digits[:500], Pixels())


def test_embedded_suite_tells_digits_from_noise(digits):
    reference = build_reference(digits[:150], EMBEDDED.features.load())
    stages = []
    noise = np.random.RandomState(0).randint(0, 256, (100, 8, 8, 1)).astype(np.uint8)
    real = evaluate_samples(digits[150:250], reference, EMBEDDED, progress=lambda *a: stages.append(a))
    bad = {m.metric: m for m in evaluate_samples(noise, reference, EMBEDDED)}
    assert [m.metric for m in real] == KEYS
    assert stages[:2] == [("sample features", 0, 100), ("sample features", 100, 100)]
    assert stages[-1] == ("metrics", 6, 6)
    for m in real:
        assert isinstance(m.value, float) and m.n == 100
        assert m.low <= m.value <= m.high
    real = {m.metric: m for m in real}
    assert real["fd"].high * 5 < bad["fd"].low and real["kid"].high < bad["kid"].low
    assert real["precision"].low > bad["precision"].high
    assert real["recall"].value > 0.7 and bad["recall"].value < 0.1
    assert real["copies"].value < 0.06


def test_values_do_not_depend_on_the_order_of_the_images(digits, reference):
    images = digits[500:800]
    one = evaluate_samples(images, reference, SUITE)
    other = evaluate_samples(images[::-1], reference, SUITE)
    for a, b in zip(one, other, strict=True):
        assert a.value == pytest.approx(b.value, rel=1e-6, abs=1e-9)


def test_copies_are_looked_for_in_the_training_images(digits, reference):
    samples = digits[900:1100]
    share = {m.metric: m.value for m in evaluate_samples(samples, reference, SUITE, training=digits[700:1200])}
    assert share["copies"] == 1.0


def test_too_few_samples_name_the_metrics(digits, reference):
    with pytest.raises(UserError, match=r"99 samples are too few for suite pixels: fd needs 100, .*draw at least 100"):
        evaluate_samples(digits[:99], reference, SUITE)
    only = dataclasses.replace(SUITE, metrics=(METRICS["copies"],))
    assert evaluate_samples(digits[:20], reference, only)[0].value == 1.0


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((200, 8, 8, 1), np.float32), "uint8 images"),
        (np.zeros((200, 16, 16, 1), np.uint8), "samples are (16, 16, 1) but the reference (8, 8, 1)"),
        (np.zeros((200, 8, 8, 3), np.uint8), "samples are (8, 8, 3)"),
    ],
)
def test_images_that_do_not_fit_are_refused(images, words, reference):
    with pytest.raises(UserError) as caught:
        evaluate_samples(images, reference, SUITE)
    assert words in str(caught.value)


def test_a_reference_of_other_features_is_refused(digits, reference):
    with pytest.raises(UserError, match="uses features efficientnet-lite0-96, but the reference was built with pixels"):
        evaluate_samples(digits[:200], reference, EMBEDDED)


def test_features_that_are_not_finite_fail(digits, reference):
    class Broken(Pixels):
        def __call__(self, images):
            features = super().__call__(images)
            features.pooled[3, 2] = np.nan
            return features

    with pytest.raises(RunError, match="image 3 are not finite"):
        evaluate_samples(digits[:200], dataclasses.replace(reference, extractor=Broken()), SUITE)
    with pytest.raises(RunError, match="not finite"):
        build_reference(digits[:200], Broken())


def test_cache_is_used_and_repaired(digits, tmp_path):
    first = Pixels()
    made = build_reference(digits[:100], first, cache=tmp_path)
    assert first.seen == 100 and len(list(tmp_path.iterdir())) == 1
    again = Pixels()
    kept = build_reference(digits[:100], again, cache=tmp_path)
    assert again.seen == 0 and kept.sha256 == made.sha256 == images_sha256(digits[:100])
    np.testing.assert_array_equal(kept.features.pooled, made.features.pooled)
    np.testing.assert_array_equal(kept.features.logits, made.features.logits)

    (entry,) = tmp_path.iterdir()
    good = entry.read_bytes()
    with np.load(entry) as data:
        changed = {**data, "pooled": data["pooled"] + 1}
    for damage in (
        lambda: entry.write_bytes(good[:-200]),
        lambda: entry.write_bytes(b""),
        lambda: np.savez(entry, **changed),
    ):
        damage()
        repaired = Pixels()
        fixed = build_reference(digits[:100], repaired, cache=tmp_path)
        assert repaired.seen == 100
        np.testing.assert_array_equal(fixed.features.pooled, made.features.pooled)
        assert len(list(tmp_path.iterdir())) == 1


def test_cache_is_keyed_by_content(digits, tmp_path):
    build_reference(digits[:100], Pixels(), cache=tmp_path)
    for images, changes in ((digits[1:101], {}), (digits[:100], {"sha256": "1" * 64})):
        other = Pixels()
        for name, value in changes.items():
            setattr(other, name, value)
        build_reference(images, other, cache=tmp_path)
        assert other.seen == 100
    assert len(list(tmp_path.iterdir())) == 3


def test_hash_sees_shape_and_pixels(digits):
    assert images_sha256(digits[:4]) != images_sha256(digits[:4].reshape(4, 4, 16, 1))
    assert images_sha256(digits[:4]) != images_sha256(digits[1:5])
    assert images_sha256(np.asfortranarray(digits[:600])) == images_sha256(digits[:600])


def test_built_in_suites_are_well_formed():
    assert [m.key for m in EMBEDDED.metrics] == KEYS == list(METRICS)[: len(KEYS)]
    for suite in BUILT_IN.values():
        assert suite.minimum == max(m.minimum for m in suite.metrics)
        assert all(m.direction in ("lower", "higher") and m.paper for m in suite.metrics)
