"""ADM's numbers from stored features, and the exact metrics under them. The goldens are TensorFlow's and scipy's, on the
features of `golden`; elsewhere the reference is whole-number or plain arithmetic in this file."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluators import adm, frechet, inception_score, precision_recall
from evaluators.intervals import assign_blocks
from evaluators.statistics import Moments, Statistics, statistics
from harness.errors import RunError, UserError


@pytest.fixture(scope="module")
def golden():
    r = np.random.RandomState(7)
    # where float32 begins differs between the two: this is what the goldens' last digits were made with
    a = np.abs(r.randn(4000, 64)).astype(np.float32) * np.float32(0.45)
    b = (np.abs(r.randn(3000, 64)) * 0.5 + 0.02).astype(np.float32)
    w = (r.randn(64, 1008) * 0.3).astype(np.float32)
    return a, b, w


# --- FID


def test_fid_golden(golden):
    a, b, _ = golden
    assert adm.fid(b, adm.statistics(a)) == pytest.approx(0.35750550994971775, rel=1e-11)
    ddof_0 = [replace(adm.statistics(x), covariance=Moments.from_features(x).finish(ddof=0).covariance) for x in (b, a)]
    assert adm.fid(*ddof_0) == pytest.approx(0.35742626468508654, rel=1e-11)
    # sqrtm takes roots of the null eigenvalues' rounding, which are left out here
    assert adm.fid(a[:40], adm.statistics(a)) == pytest.approx(2.717761439119206, rel=3e-8)


def test_adm_means_are_numpys_float32_means_whatever_the_batches(golden):
    a = golden[0] + 3  # far from 0, where float32 sums lose bits
    whole, plain = adm.statistics(a), statistics(a)
    assert whole.mean.dtype == np.float32
    np.testing.assert_array_equal(whole.mean, np.mean(a, axis=0))
    assert np.abs(whole.mean - plain.mean).max() > 1e-7  # the quirk is there
    np.testing.assert_array_equal(whole.covariance, plain.covariance)
    np.testing.assert_allclose(whole.covariance, np.cov(a, rowvar=False), rtol=0, atol=1e-13)
    stream = adm.StreamedStatistics(64)
    for part in np.split(a, [1, 64, 700, 701]):
        stream.update(part)
    np.testing.assert_array_equal(stream.finish().mean, whole.mean)


def test_statistics_of_three_constant_images():
    # mseitzer/pytorch-fid, tests/test_fid_score.py: a mean "model" on images of 0, 0.5 and 1
    made = adm.statistics(np.repeat(np.array([[0.0], [0.5], [1.0]], np.float32), 5, axis=1))
    assert (made.mean == 0.5).all() and (made.covariance == 0.25).all()


def test_fid_of_equal_covariances_is_exactly_2048():
    eye = np.eye(2048)
    zero, one = (Statistics(n=None, mean=np.full(2048, m, np.float32), covariance=eye) for m in (0, 1))
    assert adm.fid(zero, one) == 2048.0


def test_fid_with_eps_is_the_root_of_the_moved_covariances(golden):
    a, b = (statistics(x[:500]) for x in golden[:2])
    eps, eye = 1e-3, np.eye(64)
    roots = np.sqrt(np.linalg.eigvals((a.covariance + eps * eye) @ (b.covariance + eps * eye)).real).sum()
    delta = a.mean - b.mean
    expected = delta @ delta + np.trace(a.covariance) + np.trace(b.covariance) - 2 * roots
    assert adm.fid(a, b, eps=eps) == pytest.approx(expected, rel=1e-10)
    assert abs(adm.fid(a, b) - expected) > 1e-4


@pytest.mark.parametrize(("rows", "dim"), [(2, 4), (16, 256), (256, 256), (512, 256), (4096, 32)])
def test_frechet_equals_plain_eigenvalues(rows, dim):
    # toshas/torch-fidelity, tests/torch_pure/misc/test_fid_stats_fn.py: to 5 places
    r = np.random.RandomState(2023)
    a, b = statistics(r.randn(rows, dim)), statistics(r.randn(rows, dim))
    roots = np.sqrt(np.linalg.eigvals(a.covariance @ b.covariance).astype(np.complex128)).real.sum()
    delta = a.mean - b.mean
    expected = delta @ delta + np.trace(a.covariance) + np.trace(b.covariance) - 2 * roots
    assert frechet.frechet_distance(a, b) == pytest.approx(expected, rel=5e-6, abs=5e-6)


def full_rank_pair(dim=40):
    r = np.random.RandomState(0)
    return statistics(r.randn(500, dim)), statistics(r.randn(400, dim) * 1.3 + 0.2)


def test_the_quick_path_is_taken_and_agrees_with_both_orders(monkeypatch):
    a, b = full_rank_pair()
    quick = frechet.frechet_distance(a, b)
    assert frechet._one_order(a, b, 40) is not None
    monkeypatch.setattr(frechet, "_one_order", lambda *_: None)
    assert quick == pytest.approx(frechet.frechet_distance(a, b), rel=1e-12)


def test_the_quick_path_does_not_vouch_for_small_eigenvalues():
    a, b = full_rank_pair()
    tilt = np.geomspace(1, 1e-8, 40)
    sharp = [replace(s, covariance=s.covariance * np.outer(tilt, tilt)) for s in (a, b)]
    tiny = [replace(s, covariance=s.covariance * 1e-16) for s in sharp]
    assert frechet._one_order(*sharp, 40) is None or frechet._one_order(*tiny, 40) is None
    assert np.isfinite(frechet.frechet_distance(*sharp))


def test_eigenvalues_that_are_all_wrong_alike_are_noticed(monkeypatch):
    real = np.linalg.eigvalsh
    monkeypatch.setattr(np.linalg, "eigvalsh", lambda matrix: real(matrix) * (1 + 1e-6))
    with pytest.raises(RunError, match="LAPACK"):
        frechet.frechet_distance(*full_rank_pair())


# --- Statistics: the same bits


def same_bits(one: Statistics, other: Statistics) -> bool:
    return one.n == other.n and all(
        getattr(one, part).tobytes() == getattr(other, part).tobytes() for part in ("mean", "covariance")
    )


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), cuts=st.lists(st.integers(1, 299), max_size=6), wide=st.booleans())
def test_order_batches_and_merges_do_not_change_a_bit(seed, cuts, wide):
    r = np.random.RandomState(seed)
    scale = 10.0 ** r.randint(-3, 4, 9)  # some columns need one slice, some three
    x = ((r.randn(300, 9) + 1) * scale).astype(np.float64 if wide else np.float32)
    whole = statistics(x)
    parts = np.split(x[r.permutation(300)], sorted(set(cuts)))
    stream = Moments(9)
    for part in parts:
        stream.update(part)
        stream = Moments.from_state(stream.state())  # as a file keeps it between two processes
    merged = [Moments.from_features(part) for part in parts]
    while len(merged) > 1:
        merged.append(merged.pop(r.randint(len(merged))).merge(merged.pop(r.randint(len(merged)))))
    assert same_bits(stream.finish(), whole) and same_bits(merged[0].finish(), whole)
    plain = np.cov(x.astype(np.float64), rowvar=False)
    spread = np.sqrt(np.diag(plain))  # of 1e-3 and more: the grid of 2^-32 is float32's own rounding there
    assert (np.abs(whole.covariance - plain) <= (1e-11 if wide else 1e-7) * np.outer(spread, spread)).all()


def test_one_two_and_four_processes_agree_in_every_bit():
    x = np.abs(np.random.RandomState(1).randn(5000, 48)).astype(np.float32)
    whole = statistics(x)
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("spawn")) as pool:
        for workers in (1, 2, 4):
            shards = [x[w::workers] for w in range(workers)]
            moments = list(pool.map(Moments.from_features, shards))
            total = moments[0]
            for other in moments[1:]:
                total = total.merge(other)
            assert same_bits(total.finish(), whole)


def test_statistics_are_the_exact_ones_rounded():
    x = (np.random.RandomState(3).randn(30, 2) + 1000).astype(np.float32)  # multiples of 2^-14
    rows = [[Fraction(float(v)) for v in row] for row in x]
    mean = [sum(column) / 30 for column in zip(*rows, strict=True)]
    made = statistics(x)
    for i in range(2):
        assert made.mean[i] == float(mean[i])
        for j in range(2):
            exact = float(sum((row[i] - mean[i]) * (row[j] - mean[j]) for row in rows) / 29)
            assert made.covariance[i, j] == pytest.approx(exact, rel=5e-16)


def test_statistics_refuse_what_they_cannot_hold():
    with pytest.raises(RunError, match="limited to 1e20"):
        statistics(np.full((3, 2), 1e25))
    with pytest.raises(RunError, match="rows"):
        Moments(1).update(np.broadcast_to(np.float32(0), (2**22 + 1, 1)))
    with pytest.raises(RunError, match="not finite"):
        Moments(1).update(np.array([[np.inf]], np.float32))


# --- Inception Score


def test_inception_score_golden(golden):
    a, _, w = golden
    logits = a @ w
    assert adm.score(logits, 4000) == pytest.approx(1.2325526475906372, rel=3e-7)  # float32: 1e-7 is its last digit
    assert adm.score(logits, 1000) == pytest.approx(1.2323126792907715, rel=3e-7)
    assert adm.score(logits, 1500) == pytest.approx(1.2324200868606567, rel=3e-7)
    assert adm.score(logits) == adm.score(logits, 4000)  # splits of 5,000
    assert adm.softmax(logits).dtype == np.float32
    assert inception_score.estimate(logits, assign_blocks(4000)).value == pytest.approx(1.23255278, abs=2e-8)


def test_inception_score_depends_on_file_order_and_survives_underflow(golden):
    logits = (golden[0] @ golden[2])[:2000]
    ordered = logits[np.argsort(logits[:, 0])]
    assert abs(adm.score(ordered, 500) - adm.score(logits, 500)) > 1e-4
    assert np.isfinite(adm.score(np.array([[0.0, -500.0], [0.0, -400.0]])))


# --- Precision and recall


def test_precision_recall_golden(golden):
    a, b, _ = golden
    precision, recall = adm.precision_and_recall(a, b, "exact")
    assert (precision, recall) == (pytest.approx(0.302667, abs=5e-7), 0.84375)
    # TensorFlow's own float16 sums differ in the last bit in one row of five
    assert adm.precision_and_recall(a, b) == (pytest.approx(0.305, abs=2e-3), pytest.approx(0.84475, abs=2e-3))
    with pytest.raises(UserError, match="adm, exact"):
        adm.precision_and_recall(a, b, "fp16")


def test_half_distances_are_those_of_half_arithmetic():
    r = np.random.RandomState(0)
    u, v = (np.abs(r.randn(5, 3)).astype(np.float32) for _ in range(2))
    half = np.float16

    def one(a, b):
        a, b = a.astype(half), b.astype(half)
        norm = lambda x: half(sum(np.float32(half(y * y)) for y in x))  # noqa: E731
        dot = half(sum(np.float32(p) * np.float32(q) for p, q in zip(a, b, strict=True)))
        return max(half(half(norm(a) - half(half(2) * dot)) + norm(b)), half(0))

    expected = np.array([[one(a, b) for b in v] for a in u], np.float32)
    np.testing.assert_array_equal(adm.squared_distances_float16(u, v), expected)


def test_half_mode_keeps_its_quirks_and_falls_back_by_the_block():
    r = np.random.RandomState(0)
    x = (np.abs(r.randn(60, 512)) * r.uniform(0.3, 1.5, (60, 1))).astype(np.float32)
    d = adm.squared_distances_float16(x, x)
    assert d.diagonal().max() > 0 and (d != d.T).any() and d.max() > 100
    assert adm.squared_radii_float16(x).dtype == np.float32
    np.testing.assert_array_equal(adm.squared_radii_float16(x), np.sort(d, axis=1)[:, 3])
    large = x * 100  # squared norms beyond 65,504: the block is taken in float32
    np.testing.assert_array_equal(
        adm.squared_radii_float16(large), np.sort(adm.squared_distances_float32(large, large), axis=1)[:, 3]
    )


def test_half_mode_does_not_depend_on_tiles(golden, monkeypatch):
    a, b = golden[0][:700], golden[1][:600]
    whole = adm.precision_and_recall(a, b)
    monkeypatch.setattr(adm, "TILE_ROWS", 128)
    monkeypatch.setattr(adm, "BLOCK_ROWS", 256)
    assert adm.precision_and_recall(a, b) == pytest.approx(whole, abs=2e-3)


def whole_number_precision_recall(y, x, k):
    """The definition, in int64."""

    def squared(u, v):
        return ((u[:, None].astype(np.int64) - v[None].astype(np.int64)) ** 2).sum(axis=2)

    radius = [np.sort(squared(z, z), axis=1)[:, k] for z in (y, x)]  # self is entry 0
    d = squared(y, x)
    return (d <= radius[0][:, None]).any(axis=0).mean(), (d <= radius[1]).any(axis=1).mean()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(5, 90),
    m=st.integers(5, 90),
    top=st.sampled_from([1, 3, 50]),
    offset=st.sampled_from([0, 3000]),  # clusters far apart: float32 sees no distances inside them
    rows=st.sampled_from([7, 32, 2048]),
)
def test_ties_duplicates_and_clusters_are_decided_exactly(seed, n, m, top, offset, rows):
    r = np.random.RandomState(seed)
    x, y = (r.randint(0, top + 1, (c, 5)) + offset * r.randint(0, 3, (c, 1)) for c in (n, m))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision_recall, "ROWS_PER_BLOCK", rows)
        found = precision_recall.precision_recall(y.astype(np.float32), x.astype(np.float32))
    assert found == whole_number_precision_recall(y, x, 3)


def test_a_collapsed_set_is_cheap_and_right(monkeypatch):
    calls = []
    real = precision_recall.pair_distances
    monkeypatch.setattr(precision_recall, "pair_distances", lambda *a: calls.append(len(a[2])) or real(*a))
    r = np.random.RandomState(0)
    y = r.randint(0, 9, (800, 16)) + 5000 * r.randint(0, 2, (800, 1))
    x = np.repeat(y[:2], 300, axis=0)
    found = precision_recall.precision_recall(y.astype(np.float32), x.astype(np.float32))
    assert found == whole_number_precision_recall(y, x, 3)
    assert sum(calls) < 0.15 * (800 * 800 + 600 * 600 + 800 * 600)


@pytest.mark.parametrize("collapsed", [False, True])
def test_workers_do_not_show(monkeypatch, collapsed):
    """Radii in every bit; collapsed: in clusters so far apart that tiles fall to float64, which workers divide."""
    r = np.random.RandomState(0)
    y = r.randint(0, 9, (300, 16)) + 5000 * collapsed * r.randint(0, 2, (300, 1))
    x = np.repeat(y[:2], 100, axis=0) if collapsed else r.randint(0, 9, (200, 16))
    monkeypatch.setattr(precision_recall, "ROWS_PER_BLOCK", 37)
    found, tiles = [], []
    real = precision_recall.DistanceBounds._tile
    monkeypatch.setattr(
        precision_recall.DistanceBounds,
        "_tile",
        lambda self, *a: tiles.append((self._workers, a[-1])) or real(self, *a),
    )
    for workers in (1, 3):
        monkeypatch.setattr(precision_recall, "_workers", lambda workers=workers: workers)
        found.append(precision_recall.precision_recall(y.astype(np.float32), x.astype(np.float32)))
        found.append(precision_recall.squared_radii(x.astype(np.float32)).tolist())
    assert found[:2] == found[2:]
    assert found[0] == whole_number_precision_recall(y, x, 3)
    wanted = {(workers, dtype) for workers in (1, 3) for dtype in (np.float32, np.float64)[: 1 + collapsed]}
    assert wanted <= set(tiles)


def test_order_does_not_change_precision_and_recall(golden):
    a, b, _ = golden
    a, b = a[:900], b[:1100]
    r = np.random.RandomState(0)
    whole = precision_recall.squared_radii(a)
    order = r.permutation(900)
    assert (precision_recall.squared_radii(a[order]) == whole[order]).all()  # in every bit
    shuffled = precision_recall.precision_recall(a[order], b[r.permutation(1100)])
    assert shuffled == precision_recall.precision_recall(a, b)


def test_error_bars_do_not_depend_on_how_many_neighbours_are_kept(monkeypatch):
    r = np.random.RandomState(0)
    x, y, block = r.randn(150, 6), r.randn(130, 6) + 0.5, assign_blocks(150)
    kept = precision_recall.estimate(x, y, block)
    monkeypatch.setattr(precision_recall, "NEIGHBOURS", 3)  # nearly every row of a half must be looked up
    for one, other in zip(kept, precision_recall.estimate(x, y, block), strict=True):
        assert (one.value, one.half_variance) == (other.value, other.half_variance)
        np.testing.assert_array_equal(one.left_out, other.left_out)


def test_all_five_with_what_their_intervals_need(golden):
    a, b, w = golden
    a, b = a[:800], b[:600]
    found = adm.estimates(
        b, b[:, :40], b @ w, reference_pooled=a, reference_statistics=adm.statistics(a),
        reference_spatial_statistics=adm.statistics(a[:, :40]), block=assign_blocks(600),
    )  # fmt: skip
    assert list(found) == ["fid", "sfid", "is", "precision", "recall"]
    assert found["fid"].value == adm.fid(b, adm.statistics(a))
    assert found["sfid"].value == adm.fid(b[:, :40], adm.statistics(a[:, :40]))
    assert found["is"].value == adm.score(b @ w)
    assert (found["precision"].value, found["recall"].value) == adm.precision_and_recall(a, b)
    for each in found.values():
        assert each.left_out.shape == (20,)
        assert abs(each.left_out.mean() - each.value) < 0.1 * max(abs(each.value), 0.1)
