"""The modern metrics: values of the public packages on stored features, closed forms, and intervals that cover.

The numbers come from clovaai's prdc 0.2, layer6ai-labs/dgm-eval, toshas/torch-fidelity 5e211a9 (given our directions)
and google-research's cmmd/distance.py under jax in float64, run on the features of `features`.
"""

import numpy as np
import pytest
from PIL import Image

from evaluators import authenticity, cmmd, density_coverage, distances, extrapolation, frechet, neighbours_picture
from evaluators import sliced_wasserstein as sliced
from evaluators.features import Features
from evaluators.intervals import assign_blocks, interval
from evaluators.metric_inputs import MetricInputs
from evaluators.reference import Reference
from evaluators.statistics import statistics
from harness.errors import UserError
from reports.neighbours import write_neighbours


@pytest.fixture(scope="module")
def features():
    r = np.random.RandomState(7)
    a = (np.abs(r.randn(4000, 64)) * 0.45).astype(np.float32)
    b = (np.abs(r.randn(3000, 64)) * 0.5 + 0.02).astype(np.float32)
    return a, b


def unit(x):
    x = x.astype(np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def without(estimator, x, block, b):
    """The estimator's value on the rows outside block b."""
    kept = x[block != b]
    return estimator(kept, assign_blocks(len(kept)))


# --- density and coverage


def test_density_and_coverage_are_prdcs(features):
    a, b = features
    density, coverage = density_coverage.estimate(b, a, assign_blocks(3000))
    assert (density.value, coverage.value) == (pytest.approx(0.26953333333333335, abs=1e-12), 0.54725)
    density, coverage = density_coverage.estimate(b[:600], a[:800], assign_blocks(600), k=3)
    assert (density.value, coverage.value) == (pytest.approx(0.30222222222222217, abs=1e-12), 0.42625)


def test_density_and_coverage_without_a_block(features, monkeypatch):
    a, b = features[0][:500], features[1][:430]
    block = assign_blocks(430)
    both = density_coverage.estimate(b, a, block)
    monkeypatch.setattr(distances, "ROWS_PER_BLOCK", 37)
    for i, estimate in enumerate(both):
        assert density_coverage.estimate(b, a, block)[i].value == estimate.value
        for gone in (0, 13):
            direct = without(lambda x, u, i=i: density_coverage.estimate(x, a, u)[i].value, b, block, gone)
            assert estimate.left_out[gone] == pytest.approx(direct, abs=1e-12)


def test_density_and_coverage_of_equal_distributions_have_the_papers_expectation():
    # Naeem et al. derive 1 for density, and 1 - (1 / 2)^5 = 0.969 for the coverage of large sets with N = M
    assert density_coverage.expected_coverage(10**6, 10**6) == pytest.approx(1 - 2**-5, abs=1e-5)
    assert density_coverage.expected_coverage(1, 2, k=1) == 0.5  # the other of two points is as likely ours as theirs
    r = np.random.RandomState(0)
    values = [
        [e.value for e in density_coverage.estimate(r.randn(300, 3), r.randn(200, 3), assign_blocks(300))]
        for _ in range(40)
    ]
    density, coverage = np.mean(values, axis=0)
    assert density == pytest.approx(1.0, abs=0.03)
    assert coverage == pytest.approx(density_coverage.expected_coverage(300, 200), abs=0.005)


def test_copies_of_the_reference_are_inside_by_arithmetic_and_not_by_rounding():
    y = np.random.RandomState(0).randn(300, 40) + 1000.0
    density, coverage = density_coverage.estimate(y[::-1], y, assign_blocks(300))
    # every ball holds its own centre and the k - 1 images inside it, and not the k-th, which is on its surface
    assert (density.value, coverage.value) == (1.0, 1.0)


# --- CMMD


def test_cmmd_is_the_published_codes(features):
    a, b = features
    block = assign_blocks(600)
    assert cmmd.estimate(unit(b[:600]), unit(a[:800]), block).value == pytest.approx(0.014815393643086412, rel=1e-9)
    assert cmmd.estimate(4.0 * b[:600], 4.0 * a[:800], block).value == pytest.approx(21.331073359823748, rel=1e-9)


@pytest.mark.parametrize("unbiased", [False, True])
def test_cmmd_by_pairs_and_without_a_block(unbiased, monkeypatch):
    monkeypatch.setattr(distances, "ROWS_PER_BLOCK", 16)
    r = np.random.RandomState(0)
    x, y, block = 5 * r.randn(40, 7), 5 * r.randn(50, 7) + 1, assign_blocks(40)

    def direct(x):
        k = lambda u, v: np.exp(-np.square(u[:, None] - v[None]).sum(axis=2) / 200.0)  # noqa: E731
        xx, yy, less = k(x, x), k(y, y), int(unbiased)
        within = [(m.sum() - less * np.trace(m)) / (len(m) * (len(m) - less)) for m in (xx, yy)]
        return 1000.0 * (sum(within) - 2.0 * k(x, y).mean())

    estimate = cmmd.estimate(x, y, block, unbiased=unbiased)
    assert estimate.value == pytest.approx(direct(x), rel=1e-10)
    assert estimate.left_out[3] == pytest.approx(direct(x[block != 3]), rel=1e-10)


def test_cmmd_and_mind_do_not_know_where_the_origin_is(features):
    a, b, block, u = features[0][:300], features[1][:200], assign_blocks(200), sliced.directions(64, 50)
    for estimator in (lambda x, y: cmmd.estimate(x, y, block), lambda x, y: sliced.estimate(x, y, block, u)):
        here, there = estimator(b, a), estimator(b + np.float64(2**20), a + np.float64(2**20))
        assert there.value == pytest.approx(here.value, rel=1e-7)


def test_cmmd_of_two_points_is_arithmetic():
    estimate = cmmd.estimate(np.array([[0.0], [0.0]]), np.array([[10.0], [10.0]]), np.array([0, 1]))
    assert estimate.value == pytest.approx(2000.0 * (1.0 - np.exp(-0.5)), rel=1e-14)


# --- MIND


def test_mind_is_torch_fidelitys(features):
    a, b = features
    value = sliced.estimate(b[:1000], a[:1000], assign_blocks(1000), sliced.directions(64)).value
    assert value == pytest.approx(1.076655238866806, rel=1e-6)  # theirs is float32


@pytest.mark.parametrize("mu", [1.0, 3.0])
def test_mind_of_a_shift_is_its_closed_form(mu):
    r = np.random.RandomState(11)  # toshas/torch-fidelity, tests/.../test_mind.py: 3 d mu^2 within 10 %
    x, y = r.randn(4000, 64), r.randn(4000, 64) + mu
    u = sliced.directions(64, 300)
    assert sliced.estimate(x, y, assign_blocks(4000), u).value == pytest.approx(3 * 64 * mu**2, rel=0.1)
    moved = sliced.estimate(x, x[::-1] + mu, assign_blocks(4000), u).value  # the directions' error alone is left
    assert moved == pytest.approx(3 * 64 * np.square(u.sum(axis=1)).mean() * mu**2, rel=1e-9)
    assert sliced.estimate(x, x[::-1], assign_blocks(4000), u).value == pytest.approx(0.0, abs=1e-20)


def test_mind_of_sets_of_unequal_size_is_that_of_repeated_rows():
    r = np.random.RandomState(0)
    x, y, u = r.randn(12, 3), r.randn(18, 3), sliced.directions(3, 20)
    repeated = sliced.estimate(x.repeat(3, axis=0), y.repeat(2, axis=0), assign_blocks(36), u).value
    assert sliced.estimate(x, y, assign_blocks(12), u).value == pytest.approx(repeated, rel=1e-12)


def test_mind_without_a_block(monkeypatch):
    r = np.random.RandomState(0)
    x, y, block, u = r.randn(101, 5), r.randn(90, 5) + 0.2, assign_blocks(101), sliced.directions(5, 30)
    estimate = sliced.estimate(x, y, block, u)
    monkeypatch.setattr(sliced, "DIRECTIONS_AT_ONCE", 7)
    direct = without(lambda x, b: sliced.estimate(x, y, b, u).value, x, block, 4)
    assert estimate.left_out[4] == pytest.approx(direct, rel=1e-12)


def test_minds_directions_and_choice_are_everybodys():
    u = sliced.directions(3)
    assert u.shape == (1000, 3) and np.allclose(np.linalg.norm(u, axis=1), 1.0, rtol=1e-15)
    raw = np.array([1.764052345967664, 0.4001572083672233, 0.9787379841057392])  # RandomState(0), as numpy documents
    np.testing.assert_allclose(u[0], raw / np.sqrt(raw @ raw), rtol=1e-14)
    chosen = sliced.choose(100, 40)
    assert len(set(chosen)) == 40 and (np.diff(chosen) > 0).all() and chosen.max() < 100
    np.testing.assert_array_equal(sliced.choose(7, 7), np.arange(7))


# --- FD-infinity


def test_fd_infinity_is_dgm_evals_on_the_same_subsets(features):
    a, b = features
    estimate = extrapolation.estimate(b, statistics(a), assign_blocks(3000))
    assert estimate.value == pytest.approx(0.32579132686327417, rel=1e-7)
    bar = interval(estimate)
    assert bar.low < estimate.value < bar.high


def test_fd_infinity_sizes_and_line():
    # dgm_eval/metrics/fd.py: linspace(min(5000, max(N // 10, 2)), N, 15), truncated
    np.testing.assert_array_equal(extrapolation.sizes(50000)[[0, 1, -1]], [5000, 8214, 50000])
    np.testing.assert_array_equal(extrapolation.sizes(3000)[[0, 1, -1]], [300, 492, 3000])
    n = extrapolation.sizes(20000)
    weights = extrapolation.intercept_weights(n)
    assert weights.sum() == pytest.approx(1.0, rel=1e-12)
    assert weights @ (2.5 + 700.0 / n) == pytest.approx(2.5, rel=1e-12)
    noisy = 2.5 + 700.0 / n + np.random.RandomState(0).randn(len(n))
    assert weights @ noisy == pytest.approx(np.polyfit(1.0 / n, noisy, 1)[1], rel=1e-10)
    assert [len(rows) for rows in extrapolation.subsets(3000)] == list(extrapolation.sizes(3000))
    assert len(set(extrapolation.subsets(3000)[-1])) == 3000


def test_fd_infinity_has_less_of_the_bias():
    r = np.random.RandomState(0)
    reference = statistics(r.randn(100_000, 20))
    x = r.randn(2000, 20)  # of the same distribution: the distance of infinitely many is about 0
    plain = frechet.frechet_distance(statistics(x), reference)
    extrapolated = extrapolation.estimate(x, reference, assign_blocks(2000)).value
    assert plain > 0.05 and abs(extrapolated) < plain / 4


# --- authenticity


def test_authenticity_is_dgm_evals(features):
    a, b = features
    generated = np.concatenate([b[:400], a[:100] + np.float32(0.1) * b[400:500]])
    assert authenticity.estimate(generated, a[:800], assign_blocks(500)).value == 0.72  # AuthPct 72.0


def test_authenticity_by_hand():
    training = np.array([[0.0], [2.0], [5.0], [5.0]])
    samples = np.array([[0.5], [-2.5], [3.4], [5.0], [5.1]])
    found = authenticity.find_neighbours(samples, training, 2)
    np.testing.assert_array_equal(found.authentic, [False, True, False, False, True])
    np.testing.assert_array_equal(found.index[:3], [[0, 1], [0, 1], [1, 2]])
    np.testing.assert_allclose(found.distance[0], [0.5, 1.5], atol=1e-12)
    assert found.distance[3, 0] == 0.0 and found.training_distance[3] == 0.0
    np.testing.assert_array_equal(found.most_suspicious, [3, 0, 2, 1, 4])
    estimate = authenticity.estimate(samples, training, np.arange(5))
    assert estimate.value == 0.4 and estimate.trials == 5
    np.testing.assert_allclose(estimate.left_out, [0.5, 0.25, 0.5, 0.5, 0.25])


def test_copies_are_not_authentic_however_far_from_the_origin(monkeypatch):
    monkeypatch.setattr(distances, "ROWS_PER_BLOCK", 64)
    training = np.random.RandomState(0).randn(200, 30).astype(np.float32) + np.float32(3000)
    found = authenticity.find_neighbours(training[50:150], training, 3)
    np.testing.assert_array_equal(found.index[:, 0], np.arange(50, 150))
    assert (found.distance[:, 0] == 0.0).all() and not found.authentic.any()
    assert authenticity.estimate(training, training, assign_blocks(200)).value == 0.0


# --- distances


def test_distances_are_within_their_rounding_and_exact_ones_are_exact(monkeypatch):
    monkeypatch.setattr(distances, "ROWS_PER_BLOCK", 7)
    monkeypatch.setattr(distances, "PAIRS_AT_ONCE", 5)
    r = np.random.RandomState(0)
    x, y = r.randn(20, 6) * 100, r.randn(30, 6)
    direct = np.square(x[:, None] - y[None]).sum(axis=2)
    found = np.concatenate([d.copy() for _, d in distances.squared_distances(x, y)])
    assert np.abs(found - direct).max() <= distances.rounding_bound(x, y)
    i, j = np.nonzero(direct > 0)
    np.testing.assert_array_equal(distances.exact_squared_distances(x, y, i, j), direct[i, j])
    own = np.square(y[:, None] - y[None]).sum(axis=2)
    for k in (1, 4):
        np.testing.assert_array_equal(distances.squared_radii(y, k), np.sort(own, axis=1)[:, k])


# --- intervals

N, SETS = 160, 200
REFERENCE = np.random.RandomState(1).randn(240, 8)
STATISTICS = statistics(REFERENCE)
FEW = sliced.directions(8, 30)
CASES = {
    # name: (scale, shift, sets, estimator); the truth is the estimator's mean over all sets
    "density": (1.2, 0.3, 400, lambda x, b: density_coverage.estimate(x, REFERENCE, b)[0]),
    "coverage": (1.2, 0.3, 400, lambda x, b: density_coverage.estimate(x, REFERENCE, b)[1]),
    "coverage-narrow": (0.7, 0.0, 400, lambda x, b: density_coverage.estimate(x, REFERENCE, b)[1]),
    "authenticity": (1.2, 0.3, 400, lambda x, b: authenticity.estimate(x, REFERENCE, b)),
    "cmmd": (1.2, 0.3, 600, lambda x, b: cmmd.estimate(x, REFERENCE, b)),
    "cmmd-equal": (1.0, 0.0, 600, lambda x, b: cmmd.estimate(x, REFERENCE, b)),
    "mind": (1.2, 0.3, 400, lambda x, b: sliced.estimate(x, REFERENCE[:160], b, FEW)),
    "mind-equal": (1.0, 0.0, 400, lambda x, b: sliced.estimate(x, REFERENCE[:160], b, FEW)),
    "fd_infinity": (1.2, 0.3, 200, lambda x, b: extrapolation.estimate(x, STATISTICS, b)),
}


@pytest.mark.parametrize("case", CASES)
def test_interval_covers_the_expectation_in_90_to_99_percent(case):
    scale, shift, sets, estimator = CASES[case]
    r = np.random.RandomState(5)
    block = assign_blocks(N)
    draws = [estimator(scale * r.randn(N, 8) + shift, block) for _ in range(sets)]
    truth = np.mean([e.value for e in draws])
    bars = [interval(e) for e in draws[:SETS]]
    covered = np.mean([bar.low <= truth <= bar.high for bar in bars])
    assert 0.90 <= covered <= 0.99, covered


# --- From inputs to numbers and a picture


@pytest.fixture(scope="module")
def inputs():
    r = np.random.RandomState(0)
    training = r.randint(0, 256, (60, 8, 8, 3)).astype(np.uint8)
    images = np.concatenate([training[10:20], r.randint(0, 256, (90, 8, 8, 3)).astype(np.uint8)])

    class Pixels:
        name, sha256, dim, description = "pixels", "0" * 64, 192, "for tests"

        def __call__(self, images):
            return Features(pooled=images.reshape(len(images), -1).astype(np.float32) / 255)

    pooled = Pixels()(training)
    reference = Reference(
        images=training, features=pooled, statistics=statistics(pooled.pooled), sha256="0" * 64, extractor=Pixels()
    )
    return MetricInputs(
        images=images, features=Pixels()(images), reference=reference, training=training, block=assign_blocks(100)
    )


@pytest.mark.parametrize(
    ("module", "keys"),
    [
        (density_coverage, ["density", "coverage"]),
        (cmmd, ["cmmd"]),
        (sliced, ["mind"]),
        (extrapolation, ["fd_infinity"]),
        (authenticity, ["authenticity"]),
    ],
)
def test_every_metric_computes_from_evidence(inputs, module, keys):
    computed = module.compute(inputs)
    assert list(computed) == keys
    for estimate in computed.values():
        assert isinstance(estimate.value, float) and np.isfinite(estimate.value)
        assert estimate.left_out.dtype == np.float64 and np.isfinite(estimate.left_out).all()


def test_mind_takes_equal_numbers_of_a_larger_set(inputs):
    images = inputs.features.pooled
    chosen = sliced.choose(100, 60)
    direct = sliced.estimate(
        images[chosen], inputs.reference.features.pooled, assign_blocks(60), sliced.directions(192)
    )
    assert sliced.compute(inputs)["mind"].value == pytest.approx(direct.value, rel=1e-12)


def test_other_training_images_go_through_the_extractor(inputs):
    other = MetricInputs(**{**inputs.__dict__, "training": inputs.training[30:]})
    assert authenticity.compute(inputs)["authenticity"].value <= 0.9
    copies = authenticity.find_neighbours(inputs.features.pooled, authenticity.training_features(other))
    assert (copies.distance[:, 0] > 0).all()


def test_picture_shows_the_copies_first(inputs, tmp_path):
    path = neighbours_picture.write_picture(inputs, tmp_path / "n.png", rows=10, neighbours=3)
    with Image.open(path) as picture:
        canvas = np.asarray(picture)
    tile, step = 64, 64 + 14 + 4
    assert canvas.shape == (10 * step + 4, 4 + 64 + 16 + 3 * 68, 3)
    for row in range(10):
        top = 4 + row * step
        sample = canvas[top : top + tile : 8, 4 : 4 + tile : 8]
        np.testing.assert_array_equal(sample, inputs.training[10 + row])
        np.testing.assert_array_equal(canvas[top : top + tile : 8, 84 : 84 + tile : 8], sample)  # its nearest
        assert (canvas[top + tile : top + tile + 14, 4 : 4 + tile] < 128).any()  # a caption
    assert [path.name] == [p.name for p in tmp_path.iterdir()]


def test_picture_of_a_small_training_set_shows_all_of_it(inputs, tmp_path):
    few = MetricInputs(**{**inputs.__dict__, "training": inputs.training[:3]})
    with Image.open(neighbours_picture.write_picture(few, tmp_path / "n.png", rows=2)) as picture:
        assert picture.width == 4 + 64 + 16 + 3 * 68


def test_pictures_that_do_not_fit_are_refused(tmp_path):
    images = np.zeros((2, 8, 8, 1), np.uint8)
    near = np.zeros((2, 3, 8, 8, 1), np.uint8)
    captions = {"sample_captions": ["a", "b"], "neighbour_captions": [["x"] * 3] * 2}
    write_neighbours(images, near, tmp_path / "grey.png", **captions)
    for bad, match in (((images / 2, near), "uint8"), ((images, near[:1]), "do not fit")):
        with pytest.raises(UserError, match=match):
            write_neighbours(*bad, tmp_path / "x.png", **captions)
    with pytest.raises(UserError, match="caption"):
        write_neighbours(images, near, tmp_path / "x.png", **{**captions, "sample_captions": []})
