"""Metrics against the numbers of other implementations on the same features, and against closed forms."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluators import copies, frechet, inception_score, kernel_distance, precision_recall
from evaluators.intervals import assign_blocks
from evaluators.statistics import Moments, Statistics, statistics
from harness.errors import RunError


@pytest.fixture(scope="module")
def golden():
    """The features for which scipy's sqrtm and ADM's TensorFlow evaluator gave the numbers below."""
    r = np.random.RandomState(7)
    a = (np.abs(r.randn(4000, 64)) * 0.45).astype(np.float32)
    b = (np.abs(r.randn(3000, 64)) * 0.5 + 0.02).astype(np.float32)
    w = (r.randn(64, 1008) * 0.3).astype(np.float32)
    return a, b, w


def with_ddof_0(features):
    return Moments.from_features(features).finish(ddof=0)


def test_frechet_equals_sqrtm(golden):
    a, b, _ = golden
    assert frechet.frechet_distance(statistics(b), statistics(a)) == pytest.approx(0.35750550994971775, rel=2e-6)
    assert frechet.frechet_distance(with_ddof_0(b), with_ddof_0(a)) == pytest.approx(0.35742626468508654, rel=2e-6)
    estimate = frechet.estimate(b, statistics(a), assign_blocks(len(b)))
    assert estimate.value == pytest.approx(frechet.frechet_distance(statistics(b), statistics(a)), rel=1e-9)


def test_frechet_of_a_singular_covariance(golden):
    a, _, _ = golden
    few, all_of_them = statistics(a[:40]), statistics(a)
    expected = pytest.approx(2.717761439119206, rel=1e-6)
    assert frechet.frechet_distance(few, all_of_them) == expected
    assert frechet.frechet_distance(all_of_them, few) == expected
    assert frechet.estimate(a[:40], all_of_them, assign_blocks(40)).value == expected


@pytest.mark.parametrize(("n", "dim"), [(60, 10), (30, 40)])
def test_frechet_without_a_block_is_the_distance_of_the_other_rows(n, dim):
    r = np.random.RandomState(0)
    x, reference = r.randn(n, dim) * 2 + 1, statistics(r.randn(200, dim))
    block = assign_blocks(n)
    left_out = frechet.estimate(x, reference, block).left_out
    direct = [frechet.frechet_distance(statistics(x[block != b]), reference) for b in range(20)]
    assert left_out.dtype == np.float64 and left_out.shape == (20,)
    np.testing.assert_allclose(left_out, direct, rtol=1e-7)


def test_frechet_of_equal_covariances_is_the_distance_of_the_means():
    # as mseitzer/pytorch-fid, tests/test_fid_score.py; with its 2048 dimensions: tests/evaluators/test_adm_metrics.py
    eye = np.eye(256)
    zero = Statistics(n=None, mean=np.zeros(256), covariance=eye)
    one = Statistics(n=None, mean=np.ones(256), covariance=eye)
    assert frechet.frechet_distance(zero, one) == pytest.approx(256, rel=1e-12)


@pytest.mark.parametrize("rows", [2, 4, 32, 512])
@pytest.mark.parametrize("dim", [2, 16, 128])
def test_frechet_equals_the_eigenvalues_of_the_plain_product(rows, dim):
    # toshas/torch-fidelity, tests/torch_pure/misc/test_fid_stats_fn.py: random sets of many shapes
    r = np.random.RandomState(2023)
    a, b = statistics(r.randn(rows, dim)), statistics(r.randn(rows, dim))
    roots = np.sqrt(np.linalg.eigvals(a.covariance @ b.covariance).astype(np.complex128)).real.sum()
    delta = a.mean - b.mean
    expected = delta @ delta + np.trace(a.covariance) + np.trace(b.covariance) - 2 * roots
    # the plain product's null eigenvalues are rounding (1e-16 of the largest) and their roots 1e-8 each
    assert frechet.frechet_distance(a, b) == pytest.approx(expected, abs=1e-5 * max(1.0, expected))


def test_frechet_where_plain_eigenvalues_are_complex():
    r = np.random.RandomState(1)  # the case of the same file in which np.linalg.eigvals without a cast gives nan
    a, b = statistics(r.randn(4, 4)), statistics(r.randn(4, 4))
    assert np.isfinite(frechet.frechet_distance(a, b))


def test_frechet_of_a_collapsed_generator_is_still_a_number():
    r = np.random.RandomState(0)
    x = np.repeat(r.randn(5, 60) * np.geomspace(1, 1e-4, 60), 20, axis=0)
    reference = statistics(r.randn(40, 60))
    estimate = frechet.estimate(x, reference, assign_blocks(100))
    assert np.isfinite(estimate.left_out).all()
    assert estimate.value == pytest.approx(frechet.frechet_distance(statistics(x), reference), rel=1e-7)


def test_frechet_fails_loudly_on_what_is_no_covariance():
    bad = Statistics(n=None, mean=np.zeros(3), covariance=np.diag([1.0, 1.0, -1e-3]))
    good = Statistics(n=None, mean=np.zeros(3), covariance=np.eye(3))
    for pair in ((bad, good), (good, bad)):
        with pytest.raises(RunError, match="eigenvalue"):
            frechet.frechet_distance(*pair)
    nan = Statistics(n=None, mean=np.zeros(3), covariance=np.full((3, 3), np.nan))
    with pytest.raises(RunError, match="not finite"):
        frechet.frechet_distance(good, nan)


def test_frechet_fails_loudly_when_lapack_lies(monkeypatch):
    real, calls = np.linalg.eigvalsh, []

    def sloppy(matrix):
        calls.append(1)
        return real(matrix) * (1 + 1e-6 * len(calls))

    monkeypatch.setattr(np.linalg, "eigvalsh", sloppy)
    r = np.random.RandomState(0)
    with pytest.raises(RunError, match="eigenvalues do not add up to the trace"):
        frechet.frechet_distance(statistics(r.randn(50, 5)), statistics(r.randn(50, 5)))


def test_inception_score(golden):
    _, _, w = golden
    for logits in (golden[0] @ w,):
        z = logits.astype(np.float64)
        p = np.exp(z - z.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        estimate = inception_score.estimate(logits, assign_blocks(len(logits)))
        assert estimate.value == pytest.approx(1.23255278, abs=5e-8)
        assert inception_score.inception_score_by_splits(p, 4000) == pytest.approx(estimate.value, rel=1e-12)
        assert inception_score.inception_score_by_splits(p, 1000) == pytest.approx(1.23231266, abs=5e-8)
        assert inception_score.inception_score_by_splits(p, 1500) == pytest.approx(1.23242010, abs=5e-8)
        # ADM's own arithmetic is float32
        p32 = p.astype(np.float32)
        assert inception_score.inception_score_by_splits(p32, 1000) == pytest.approx(1.2323126792907715, rel=1e-6)


def test_inception_score_survives_classes_that_nobody_chose():
    logits = np.full((40, 5), -2000.0)
    logits[np.arange(40), np.arange(40) % 4] = 2000.0  # the fifth class has probability exactly 0
    estimate = inception_score.estimate(logits, assign_blocks(40))
    assert estimate.value == pytest.approx(4.0, rel=1e-12)
    assert np.isfinite(estimate.left_out).all()


def test_precision_and_recall(golden):
    a, b, _ = golden
    block = assign_blocks(len(b))
    precision, recall = precision_recall.estimate(b, a, block)
    assert precision.value == pytest.approx(0.302667, abs=5e-7)
    assert recall.value == 0.84375
    keep = block != 7
    fewer = [e.value for e in precision_recall.estimate(b[keep], a, np.arange(keep.sum()) % 2)]
    assert precision.left_out[7] == pytest.approx(fewer[0], abs=1e-12)
    assert recall.left_out[7] == pytest.approx(fewer[1], abs=1e-12)


def test_precision_is_the_samples_side():
    # the convention of toshas/torch-fidelity's test_prc_convention.py: narrow samples in a wide reference
    r = np.random.RandomState(42)
    samples, real = 0.1 * r.randn(200, 16), 3 * r.randn(200, 16)
    block = assign_blocks(200)
    precision, recall = precision_recall.estimate(samples, real, block)
    assert precision.value > 0.8 and recall.value < 0.3
    turned = precision_recall.estimate(real, samples, block)
    assert (turned[0].value, turned[1].value) == (recall.value, precision.value)


def test_precision_recall_do_not_depend_on_the_row_blocks(monkeypatch):
    r = np.random.RandomState(0)
    x, y, block = r.randn(150, 6), r.randn(130, 6) + 0.5, assign_blocks(150)
    whole = precision_recall.estimate(x, y, block)
    monkeypatch.setattr(precision_recall, "ROWS_PER_BLOCK", 37)
    for one, other in zip(precision_recall.estimate(x, y, block), whole, strict=True):
        assert (one.value, one.half_variance) == (other.value, other.half_variance)
        np.testing.assert_array_equal(one.left_out, other.left_out)


def test_kernel_distance_is_the_sum_over_pairs(monkeypatch):
    monkeypatch.setattr(kernel_distance, "ROWS_PER_BLOCK", 16)
    r = np.random.RandomState(0)
    x, y = r.randn(40, 7), r.randn(50, 7) + 0.5
    block = assign_blocks(40)

    def direct(x):
        k = lambda u, v: (u @ v / 7 + 1) ** 3  # noqa: E731
        n, m = len(x), len(y)
        xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
        yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
        return xx + yy - 2 * np.mean([[k(u, v) for v in y] for u in x])

    estimate = kernel_distance.estimate(x, y, block)
    assert estimate.value == pytest.approx(direct(x), rel=1e-12)
    assert estimate.left_out[3] == pytest.approx(direct(x[block != 3]), rel=1e-12)


def test_copies_are_found_with_their_originals():
    r = np.random.RandomState(0)
    training = r.randint(0, 256, (300, 8, 8, 1)).astype(np.uint8)
    fresh = r.randint(0, 256, (90, 8, 8, 1)).astype(np.uint8)
    near = np.clip(training[:5].astype(int) + 1, 0, 255).astype(np.uint8)
    found = copies.find_copies(np.concatenate([training[200:210], near, fresh]), training)
    np.testing.assert_array_equal(found.nearest[:15], [*range(200, 210), *range(5)])
    assert found.is_copy[:15].all() and found.distance[:10].max() == 0.0
    assert found.distance[10:15].max() <= 1.0
    assert found.is_copy[15:].mean() < 0.05
    assert found.share == found.is_copy.mean()


def test_copies_of_a_training_set_with_duplicates_still_count():
    r = np.random.RandomState(0)
    training = np.repeat(r.randint(0, 256, (50, 8, 8, 3)).astype(np.uint8), 2, axis=0)  # threshold 0
    assert copies.find_copies(training[:20], training).share == 1.0
    assert copies.find_copies(255 - training[:20], training).share == 0.0


def test_copies_of_large_images_and_of_many(monkeypatch):
    monkeypatch.setattr(copies, "ROWS_PER_BLOCK", 17)
    r = np.random.RandomState(0)
    training = r.randint(0, 256, (50, 70, 64, 3)).astype(np.uint8)
    found = copies.find_copies(training[10:30], training)
    np.testing.assert_array_equal(found.nearest, np.arange(10, 30))
    assert found.share == 1.0 and found.distance.max() == 0.0


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(1, 99), max_size=5), order=st.permutations(range(4)))
def test_statistics_do_not_depend_on_blocks_or_their_order(cuts, order):
    x = np.random.RandomState(0).randn(100, 5) + 1000  # far from 0: naive sums of squares would lose 6 digits
    x = np.concatenate([np.split(x, 4)[i] for i in order])
    total = None
    for part in np.split(x, sorted(set(cuts))):
        moments = Moments.from_features(part)
        total = moments if total is None else total.merge(moments)
    done = total.finish()
    assert done.n == 100 and done.mean.dtype == done.covariance.dtype == np.float64
    np.testing.assert_allclose(done.mean, x.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(done.covariance, np.cov(x, rowvar=False), rtol=1e-10, atol=1e-10)
    blocked = statistics(x, rows_per_block=13)
    np.testing.assert_allclose(blocked.covariance, done.covariance, rtol=1e-10, atol=1e-10)


def test_statistics_refuse_what_is_not_finite():
    with pytest.raises(RunError, match="not finite"):
        statistics(np.array([[1.0], [np.nan]]))
