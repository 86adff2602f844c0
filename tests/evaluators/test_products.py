"""Products of matrices by torch in place of numpy: the metrics have the same bits, and a GPU is taken only where there is one."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from evaluators import precision_recall, products
from evaluators.intervals import assign_blocks
from evaluators.products import product, products_on
from evaluators.statistics import statistics

RNG = np.random.default_rng(0)
ROWS, DIM = 2100, 96  # three blocks of rows


@pytest.fixture
def torch_multiplies(monkeypatch):
    """Products are torch's, on the CPU, with their terms in another order; a list of their dtypes."""
    dtypes = []

    class Shuffled:
        """A matrix whose product with another is summed from two halves of its terms, the second one first."""

        def __init__(self, tensor):
            self.tensor = tensor

        def __matmul__(self, other):
            a, b = self.tensor, other.tensor
            dtypes.append(str(a.dtype).removeprefix("torch."))
            half = a.shape[1] // 2
            return a[:, half:] @ b[half:] + a[:, :half] @ b[:half]

    from_numpy = torch.from_numpy
    monkeypatch.setattr(
        torch, "from_numpy", lambda array: SimpleNamespace(to=lambda device: Shuffled(from_numpy(array)))
    )
    with products._multiplied_by(torch.device("cpu")):
        yield dtypes


@pytest.fixture(scope="module")
def features():
    """Samples and a reference float32 (N, D): some rows are equal, and a cluster is closer than float32 resolves."""
    samples, reference = (RNG.normal(size=(ROWS, DIM)).astype(np.float32) for _ in range(2))
    samples[:60] = reference[:60]
    samples[100:400] = 1000 + 1e-4 * samples[100:400]
    return samples, reference


@pytest.fixture(scope="module")
def by_numpy(features):
    samples, reference = features
    both = precision_recall.estimate(samples, reference, assign_blocks(ROWS, 10))
    return statistics(samples), statistics(samples.astype(np.float64)), both


def test_the_metrics_have_the_same_bits(features, by_numpy, torch_multiplies):
    samples, reference = features
    for rows, expected in ((samples, by_numpy[0]), (samples.astype(np.float64), by_numpy[1])):
        found = statistics(rows)
        assert np.array_equal(found.mean, expected.mean) and np.array_equal(found.covariance, expected.covariance)
    assert set(torch_multiplies) == {"float64"}
    torch_multiplies.clear()
    both = precision_recall.estimate(samples, reference, assign_blocks(ROWS, 10))
    for one, other in zip(both, by_numpy[2], strict=True):
        assert one.value == other.value and np.array_equal(one.left_out, other.left_out)
    assert set(torch_multiplies) == {"float32", "float64"}  # the cluster needs the latter


def test_a_gpu_is_taken_only_where_torch_has_one(monkeypatch):
    for device in ("cpu", "cuda"):
        with products_on(device):
            assert not products.on_device()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    for device, index in (("cuda", 3), ("cuda:1", 1)):
        with products_on(device):
            assert products._device == torch.device("cuda", index)
            assert torch.get_float32_matmul_precision() == "highest"
        assert not products.on_device()
    with products_on("cpu"):
        assert not products.on_device()
    monkeypatch.setitem(products.sys.modules, "torch", None)  # not loaded, such as with features of another framework
    with products_on("cuda"):
        assert not products.on_device()


def test_without_memory_on_the_device_numpy_multiplies(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "from_numpy", full)
    a, b = RNG.normal(size=(3, 4)), RNG.normal(size=(4, 5))
    with products._multiplied_by(torch.device("cpu")):
        assert np.array_equal(product(a, b), a @ b)


@pytest.mark.parametrize("scale", [1e-37, 1e-22, 1.0, 1e19, 1e37])
def test_precision_and_recall_do_not_depend_on_the_unit_of_the_features(scale, torch_multiplies):
    """Squares of features vanish in float32, or overflow, where the features themselves are far within its range."""
    rng = np.random.default_rng(0)
    samples, reference = ((rng.normal(size=(n, 17)) * scale).astype(np.float32) for n in (300, 301))
    samples[:9] = samples[-9:]

    def squared(a, b):
        return np.square(a[:, None].astype(np.float64) - b).sum(axis=2)

    def radii(a):
        return np.sort(squared(a, a), axis=1)[:, 3]  # column 0 is the row itself

    between = squared(samples, reference)
    expected = (
        (between <= radii(reference)).any(axis=1).mean(),
        (radii(samples) >= between.T).any(axis=1).mean(),
    )
    assert min(expected) > 0.2 and max(expected) < 1
    assert precision_recall.precision_recall(reference, samples) == expected
    products._device = None  # numpy multiplies
    assert precision_recall.precision_recall(reference, samples) == expected
