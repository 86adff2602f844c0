"""The shipped classifier of Fashion-MNIST: its accuracy is the one stated, and its features do not depend on the batch."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from evaluators.features import FASHION_MNIST_CNN
from evaluators.features import fashion_mnist_cnn as cnn
from harness.data import fashion_mnist
from harness.errors import UserError


@pytest.fixture(scope="module")
def extractor():
    return FASHION_MNIST_CNN.load()


def test_weights_are_small_and_their_accuracy_is_the_one_stated(extractor):
    if reason := fashion_mnist.missing(None):
        pytest.skip(reason)
    assert cnn.WEIGHTS_FILE.stat().st_size < 1_000_000
    data = fashion_mnist.load()
    images, labels = data.images[60_000:62_000], data.labels[60_000:62_000]  # the first of the test part
    features = extractor(images)
    assert features.pooled.shape == (2000, 128) and features.logits.shape == (2000, 10)
    with safe_open(cnn.WEIGHTS_FILE, "pt") as file:
        stated = json.loads(file.metadata()["test_accuracy"])
    assert stated > 0.9
    assert abs((features.logits.argmax(1) == labels).mean() - stated) < 3 * np.sqrt(stated * (1 - stated) / 2000)
    # 32 pixels are averaged to the 16 of the network; colours to grey
    small = data.downsampled(16).images[60_000:60_050]
    np.testing.assert_allclose(extractor(small).pooled, features.pooled[:50], atol=0.05)  # rounded to whole levels
    coloured = np.repeat(images[:50], 3, axis=3)
    np.testing.assert_allclose(extractor(coloured).pooled, features.pooled[:50], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(extractor(images[7:8]).pooled, features.pooled[7:8], rtol=1e-4, atol=1e-5)


def test_folded_norms_compute_the_same():
    torch.manual_seed(0)
    net = cnn.FashionMNISTCNN(norms=True)
    x = torch.randn(64, 1, 16, 16)
    net(2 * x + 1)  # moves the running averages
    net.eval()
    with torch.no_grad():
        torch.testing.assert_close(cnn.folded(net)(x)[1], net(x)[1], rtol=1e-5, atol=1e-5)


def test_another_file_is_refused(tmp_path):
    other = tmp_path / "other.safetensors"
    other.write_bytes(cnn.WEIGHTS_FILE.read_bytes()[:-1] + b"\0")
    with pytest.raises(UserError, match="has sha256"):
        cnn.read_weights(other)


def test_images_of_another_form_are_refused(extractor):
    with pytest.raises(UserError, match="uint8 images"):
        extractor(np.zeros((1, 16, 16, 2), np.uint8))
