"""The Inception network of ADM's evaluator in JAX compared with torch, on the same random weights: stage by stage and
metric by metric. Its resize is tested with the others, in test_tf1_resize.py.
"""

import subprocess
import sys

import inception_graph_maker as maker
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from evaluators import adm
from evaluators.features import INCEPTION_2015, INCEPTION_2015_JAX, INCEPTION_2015_TF, Features, inception_v3
from evaluators.features import inception_jax as ours
from evaluators.features.inception_graph import read_weights
from evaluators.frechet import frechet_distance
from evaluators.statistics import statistics
from evaluators.suites import ADM
from harness.errors import UserError

STAGES = ("pooled", "spatial", "logits")
BATCH = 4
# 8 samples and 8 reference images; some of each are like none of the other.
IMAGES = maker.pictures(16, 64, seed=21)
IMAGES[:3] //= 8
IMAGES[13:, ::2] = 255


@pytest.fixture(scope="module")
def by_jax(made_inception):
    """Compiled once, by the first test that uses it."""
    return ours.InceptionFeatures(INCEPTION_2015_JAX, read_weights(made_inception.graph), batch_size=BATCH)


@pytest.fixture(scope="module")
def by_torch(made_inception):
    return INCEPTION_2015.load(weights=made_inception.graph)


@pytest.fixture(scope="module")
def both(by_jax, by_torch):
    """IMAGES through both."""
    return by_jax(IMAGES), by_torch(IMAGES)


def error(mine, theirs):
    """Largest difference over the root mean square."""
    theirs = theirs.astype(np.float64)
    return np.abs(mine - theirs).max() / np.sqrt((theirs**2).mean())


def assert_close(mine: Features, theirs: Features, at: object = None) -> None:
    found = {stage: error(getattr(mine, stage), getattr(theirs, stage)) for stage in STAGES}
    print(at, found)
    assert all(found[stage] < ours.TOLERANCES[stage] for stage in STAGES), found


# The same as torch's --------------------------------------------------------------------------------------------------


def test_every_stage_equals_torchs(both):
    mine, theirs = both
    assert_close(mine, theirs)
    for stage in STAGES:
        array = getattr(mine, stage)
        assert array.dtype == np.float32 and array.shape == getattr(theirs, stage).shape
    assert mine.spatial.std() > 0.1 and mine.pooled.std(axis=0).mean() > 0.01


@pytest.mark.parametrize(("size", "channels"), [(32, 1), (299, 3), (512, 3)])
def test_of_other_sizes_and_grey_too(size, channels, by_jax, by_torch):
    images = maker.pictures(1, size, seed=size)[..., :channels]
    assert_close(by_jax(images), by_torch(images), size)


def test_normalised_pixels_are_bit_equal():
    for channels in (1, 3):
        images = maker.pictures(2, 80, seed=3)[..., :channels]
        theirs = inception_v3.preprocess(torch.from_numpy(images)).permute(0, 2, 3, 1).numpy()
        np.testing.assert_array_equal(ours.preprocess(jnp.asarray(images)), theirs)


def metrics(features: Features) -> dict[str, float]:
    """Suite adm's metrics of the first half of the images, with the second half as the reference.

    Frechet distances are the same in any orthonormal basis, so these are taken in one of the space that so few images
    span: eigenvalues of 16 dimensions in place of 2048.
    """
    half = len(features.pooled) // 2

    def distance(rows):
        basis, _ = np.linalg.qr(rows.T.astype(np.float64))
        turned = rows @ basis
        return frechet_distance(statistics(turned[:half]), statistics(turned[half:]))

    precision, recall = adm.precision_and_recall(features.pooled[half:], features.pooled[:half])
    return {
        "fid": distance(features.pooled),
        "sfid": distance(features.spatial),
        "is": adm.score(features.logits[:half]),
        "precision": precision,
        "recall": recall,
    }


def assert_metrics_close(mine: dict[str, float], theirs: dict[str, float]) -> None:
    print(mine, theirs)
    assert mine.keys() == theirs.keys() == ours.METRIC_TOLERANCES.keys() == {each.key for each in ADM.metrics}
    for key, tolerance in ours.METRIC_TOLERANCES.items():
        assert mine[key] == pytest.approx(theirs[key], **tolerance), key


def test_every_metric_of_the_suite_equals_torchs(both):
    mine, theirs = map(metrics, both)
    assert_metrics_close(mine, theirs)
    assert 0 < theirs["precision"] < 1 and 0 < theirs["recall"] < 1


# An image by itself ---------------------------------------------------------------------------------------------------


def test_an_image_does_not_know_its_batch(both, by_jax):
    """Other neighbours, another place in the batch, a last batch that is not full."""
    mine, _ = both
    order = [7, 0, 13, 5, 2]
    again = by_jax(IMAGES[order])
    for stage in STAGES:
        assert error(getattr(again, stage), getattr(mine, stage)[order]) < 1e-6, stage


def test_one_compilation_serves_all_sizes_and_numbers_of_images(both, by_jax, monkeypatch):
    def traced_again(*_):
        raise AssertionError("the network was traced again")

    monkeypatch.setattr(ours, "_run", traced_again)
    for count, size, channels in ((1, 40, 3), (5, 48, 1)):
        images = maker.pictures(count, size)[..., :channels]
        assert by_jax(images).logits.shape == (count, 1008)


def products(jaxpr):
    """The convolutions and matrix products of a jaxpr and of all that it calls."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("conv_general_dilated", "dot_general"):
            yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", None)
            if inner is not None:
                yield from products(inner)


def test_every_product_asks_for_full_float32(by_jax):
    x = jax.ShapeDtypeStruct((1, 299, 299, 3), jnp.float32)
    found = list(products(jax.make_jaxpr(ours.network)(x, by_jax.parameters, by_jax.classifier).jaxpr))
    assert len(found) == 94 + 1
    for equation in found:
        assert set(equation.params["precision"]) == {jax.lax.Precision.HIGHEST}
        assert {each.aval.dtype for each in (*equation.invars, *equation.outvars)} == {np.dtype(np.float32)}


# Identity, files, refusals --------------------------------------------------------------------------------------------


def test_the_hash_is_the_networks_whatever_computes_it(by_jax, by_torch):
    assert by_jax.sha256 == by_torch.sha256
    assert by_jax.dim == by_torch.dim == INCEPTION_2015_JAX.dim and f"JAX {jax.__version__}" in by_jax.description


def test_neither_torch_nor_tensorflow_nor_flax_is_loaded(made_inception):
    code = (
        "import sys, pathlib; from evaluators.features import INCEPTION_2015_JAX as spec\n"
        "for path in sys.argv[1:]: spec.load(weights=pathlib.Path(path))\n"
        "print([m for m in ('torch', 'tensorflow', 'flax', 'jax') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, made_inception.graph, made_inception.port]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['jax']"


def test_a_jax_that_is_missing_is_a_refusal_with_the_remedy(made_inception, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)
    monkeypatch.delitem(sys.modules, "evaluators.features.inception_jax")
    with pytest.raises(UserError, match=r"inception-2015-12-05-jax cannot be loaded .*: pip install jax$"):
        INCEPTION_2015_JAX.load(weights=made_inception.graph)


@pytest.mark.parametrize("name", ["tpu", "cuda:1", "cpu:99", "cpu:x", "abacus"])
def test_a_device_that_is_absent_is_refused(name):
    with pytest.raises(UserError, match=rf"no device '{name}' here: give --device .*cpu") as caught:
        ours.pick_device(name)
    assert "\n" not in str(caught.value)
    assert ours.pick_device("cpu").platform == "cpu"


# Against TensorFlow ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_jax_equals_tensorflow_stage_by_stage(made_inception):
    pytest.importorskip("tensorflow")
    tensorflow = INCEPTION_2015_TF.load(weights=made_inception.graph)
    by_jax = INCEPTION_2015_JAX.load(weights=made_inception.graph)
    for count, size in ((2, 32), (2, 299), (2, 512), (32, 256)):
        images = maker.pictures(count, size, seed=size)
        resized, scaled = tensorflow.stages(images, "ResizeBilinear:0", "Mul:0")
        np.testing.assert_array_equal(ours.resize(jnp.asarray(images)), resized)
        np.testing.assert_array_equal(ours.preprocess(jnp.asarray(images)), scaled)
        mine, theirs = by_jax(images), tensorflow(images)
        assert_close(mine, theirs, size)
    assert_metrics_close(metrics(mine), metrics(theirs))
    tensorflow.close()
