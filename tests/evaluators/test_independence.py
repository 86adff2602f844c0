"""No metric of a suite depends on the order of the images, on batches, or on the number of processes.

A metric is covered by being in a suite. It must be the same to the bit, unless TOLERANCES names it with what its
roundings may do; ORDER_DEPENDENT names what is defined on the order of the file.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pytest
from inception_graph_maker import pictures
from spread_extraction import Network, Sketch, see, sketch

from evaluators import adm, reference
from evaluators.features import Features
from evaluators.suites import BUILT_IN, evaluate_samples

N, M = 230, 150
SUITES = [name for name, suite in BUILT_IN.items() if suite.minimum <= N]
LARGE_SUITES = [name for name in BUILT_IN if name not in SUITES]
METRICS = [(suite, metric.key) for suite in BUILT_IN for metric in BUILT_IN[suite].metrics]

# Relative, of the value. Sums over pairs and over classes in float64; means in float32, as ADM's evaluator has them.
TOLERANCES = {
    ("adm", "fid"): 3e-6,
    ("adm", "sfid"): 3e-6,
    ("torch-fidelity", "fid"): 1e-5,  # thousands of rows
    **{(suite, "kid"): 1e-10 for suite in ("embedded", "fashion-mnist", "clean", "dinov2")},
    **{(suite, "is"): 1e-12 for suite in ("embedded", "fashion-mnist", "adm-exact")},
    ("clip", "cmmd"): 1e-10,
    ("dinov2", "mind"): 1e-10,
}
# Splits of 5,000 consecutive rows; and what seeded draws of rows take: which rows they are is a matter of order.
ORDER_DEPENDENT = {("adm", "is"), ("torch-fidelity", "is"), ("torch-fidelity", "kid"), ("dinov2", "fd_infinity")}
# With a real network, whose own sums depend on the batch: float32's rounding, and for shares one image more or less.
NETWORK_TOLERANCE, NETWORK_IMAGES = 1e-4, 1


@pytest.fixture(scope="module")
def pool():
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def shares(n, workers):
    """The images of each process."""
    return [np.arange(n)[w::workers] for w in range(workers)]


@dataclass
class Spread:
    """An extractor that distributes the images to processes; rows are in the order of the images."""

    inner: object
    load: object  # gives the network, in the process
    pool: ProcessPoolExecutor
    workers: int

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, images):
        dealt = shares(len(images), self.workers)
        parts = list(self.pool.map(see, [(self.load, images[rows]) for rows in dealt if len(rows)]))
        back = np.argsort(np.concatenate(dealt))
        fields = {name: np.concatenate([getattr(part, name) for part in parts])[back]
                  for name in ("pooled", "logits", "spatial") if getattr(parts[0], name) is not None}  # fmt: skip
        return Features(**fields)


def images_of(size, n=N, m=M):
    images = pictures(n + m, size, seed=3)
    images[:9] = images[n : n + 9]  # copies: ties, which order could break
    images[9:12] = images[12:15]
    bright = np.random.RandomState(1).randint(240, 249, images[-25:].shape)
    images[-25:] = bright  # real ones that no sample resembles
    return images[:n], images[n:]


def measured(suite, extractor, samples, real):
    """All measurements of the suite, with the extractor's features."""
    suite = BUILT_IN[suite]
    suite = replace(suite, features=replace(suite.features, name=extractor.name))
    return evaluate_samples(samples, reference.build_reference(real, extractor), suite)


@pytest.fixture(scope="module")
def plain():
    """The measurements of each suite, one process, files' order."""
    return {suite: measured(suite, Sketch(), *images_of(8)) for suite in SUITES}


def values(found):
    return {each.metric: each.value for each in found}


def assert_close(suite, found, expected, ordered):
    assert list(found) == list(expected)
    for metric, value in found.items():
        if ordered and (suite, metric) in ORDER_DEPENDENT:
            continue
        tolerance = TOLERANCES.get((suite, metric), 0.0)
        assert abs(value - expected[metric]) <= tolerance * abs(expected[metric]), (metric, value, expected[metric])


def test_every_exception_is_a_metric():
    assert set(TOLERANCES) | ORDER_DEPENDENT <= set(METRICS)


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("seed", range(3))
def test_order(suite, seed, plain):
    samples, real = images_of(8)
    random = np.random.RandomState(seed)
    found = measured(suite, Sketch(), samples[random.permutation(N)], real[random.permutation(M)])
    assert_close(suite, values(found), values(plain[suite]), ordered=True)


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("size", [1, 37, 512])
def test_batches(suite, size, plain, monkeypatch):
    monkeypatch.setattr(reference, "IMAGES_PER_CALL", size)
    assert measured(suite, Sketch(), *images_of(8)) == plain[suite]  # intervals too, in every bit


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_processes(suite, workers, plain, pool):
    samples, real = images_of(8)
    spread = Spread(Sketch(), sketch, pool, workers)
    assert measured(suite, spread, samples, real) == plain[suite]
    # one share after the other, as sets are when every process wrote its own file
    dealt = [np.concatenate(shares(n, workers)) for n in (N, M)]
    found = measured(suite, spread, samples[dealt[0]], real[dealt[1]])
    assert_close(suite, values(found), values(plain[suite]), ordered=workers > 1)


def test_what_depends_on_order_does():
    logits = Sketch()(images_of(8)[0]).logits * 4
    split = 50
    assert abs(adm.score(logits[::-1], split) - adm.score(logits, split)) > 1e-4
    assert adm.score(logits[::-1]) == pytest.approx(adm.score(logits), rel=1e-6)  # one split: no order


@pytest.mark.slow
@pytest.mark.parametrize("suite", LARGE_SUITES)
def test_suites_of_many_samples(suite, pool, monkeypatch):
    """The same for suites that need thousands of samples."""
    n = BUILT_IN[suite].minimum
    samples, real = images_of(8, n, 5000)
    whole = measured(suite, Sketch(), samples, real)
    random = np.random.RandomState(0)
    found = measured(suite, Sketch(), samples[random.permutation(n)], real[random.permutation(len(real))])
    assert_close(suite, values(found), values(whole), ordered=True)
    monkeypatch.setattr(reference, "IMAGES_PER_CALL", 37)
    assert measured(suite, Sketch(), samples, real) == whole
    monkeypatch.undo()
    for workers in (2, 4):
        assert measured(suite, Spread(Sketch(), sketch, pool, workers), samples, real) == whole


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["embedded", "embedded-modern", "adm"])
def test_networks_in_processes_and_batches(suite, pool, made_inception):
    """The real networks, with other batches, threads and processes, in another order."""
    spec = BUILT_IN[suite].features
    weights = made_inception.graph if spec.weights_option else None
    network = spec.load(weights=weights)
    samples, real = images_of(32)
    expected = values(measured(suite, network, samples, real))
    order = np.random.RandomState(0).permutation(N)
    for workers in (1, 2, 4):
        spread = Spread(network, Network(spec, weights), pool, workers)
        found = values(measured(suite, spread, samples[order], real))
        for metric, value in found.items():
            share = metric in ("precision", "recall", "coverage", "authenticity", "copies")
            reach = NETWORK_IMAGES / min(N, M) if share else NETWORK_TOLERANCE * abs(expected[metric])
            print(suite, workers, metric, value, value - expected[metric])
            assert abs(value - expected[metric]) <= reach, (workers, metric)
