"""Suite torch-fidelity against the package, metric by metric on stored features, and its network stage by stage."""

import inception_graph_maker as maker
import numpy as np
import pytest
import torch

from evaluators import precision_recall
from evaluators import torch_fidelity_suite as suite
from evaluators.features import INCEPTION_2015, Features, inception_v3
from evaluators.features.tf1_resize import resize_torch
from evaluators.intervals import assign_blocks
from evaluators.metric_inputs import MetricInputs
from evaluators.reference import Reference
from evaluators.statistics import statistics
from evaluators.suites import BUILT_IN
from harness.errors import UserError

torch_fidelity = pytest.importorskip("torch_fidelity")
from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc  # noqa: E402, below what skips
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x  # noqa: E402

N, M, D, K = 1203, 1100, 48, 20  # 10 splits of two sizes


@pytest.fixture(scope="module")
def stored():
    """pooled samples and reference, and the samples' logits, sorted by class as files often are."""
    random = np.random.default_rng(5)
    label = np.arange(N) * 5 // N
    centre = random.normal(0, 0.5, (5, D))
    samples = (centre[label] + random.normal(0.1, 0.5, (N, D))).astype(np.float32)
    reference = (centre[random.integers(0, 5, M)] + random.normal(0, 0.5, (M, D))).astype(np.float32)
    logits = (random.normal(0, 0.5, (5, K))[label] * 4 + random.normal(0, 1, (N, K))).astype(np.float32)
    return samples, reference, logits


def theirs(function, *arrays, **settings):
    return function(*map(torch.from_numpy, arrays), verbose=False, **settings)


def test_fid(stored):
    samples, reference, _ = stored
    own = [metric_fid.fid_features_to_statistics(torch.from_numpy(each)) for each in (samples, reference)]
    expected = metric_fid.fid_statistics_to_metric(*own, verbose=False)["frechet_inception_distance"]
    assert suite.fid(samples, reference) == pytest.approx(expected, rel=1e-6)


def test_inception_score(stored):
    logits = stored[2]
    expected = metric_isc.isc_features_to_metric(torch.from_numpy(logits))["inception_score_mean"]
    assert suite.score(logits) == pytest.approx(expected, rel=1e-12)
    in_file_order = metric_isc.isc_features_to_metric(torch.from_numpy(logits), shuffle=False)["inception_score_mean"]
    assert in_file_order < 0.7 * expected  # so that the shuffle is seen


def test_kid_of_the_same_subsets(stored, computed):
    samples, reference, _ = stored
    scale = float(((samples @ reference.T / D + 1) ** 3).mean())  # the mean kernel
    expected = theirs(metric_kid.kid_features_to_metric, samples, reference)["kernel_inception_distance_mean"]
    assert abs(computed["kid"].value - expected) < 1e-6 * scale
    few = {"kid_subsets": 4, "kid_subset_size": 50}
    expected = theirs(metric_kid.kid_features_to_metric, samples, reference, **few)["kernel_inception_distance_mean"]
    assert abs(suite.kid(samples, reference, 4, 50) - expected) < 1e-6 * scale
    for other in (suite.kid(reference, samples, 4, 50), suite.kid(samples, reference, 4, 50, seed=0)):
        assert abs(other - expected) > 1e-3 * scale  # so that the order of the draws and the seed are seen
    with pytest.raises(UserError, match="subsets of 1000, but there are 1203 samples and 999 reference images"):
        suite.kid(samples, reference[:999])


@pytest.mark.parametrize("save_cpu_ram", [False, True])
def test_precision_and_recall(stored, computed, save_cpu_ram):
    samples, reference, _ = stored
    expected = theirs(metric_prc.prc_features_to_metric, samples, reference, save_cpu_ram=save_cpu_ram)
    assert computed["precision"].value == pytest.approx(expected["precision"], abs=1.5 / N)  # one image on an edge
    assert computed["recall"].value == pytest.approx(expected["recall"], abs=1.5 / M)
    assert abs(expected["precision"] - expected["recall"]) > 0.01  # so that a swap is seen


@pytest.fixture(scope="module")
def computed(stored):
    """All metrics, by the suite."""
    samples, reference, logits = stored
    images = np.zeros((M, 2, 2, 1), np.uint8)
    seen = Reference(
        images=images, features=Features(pooled=reference), statistics=statistics(reference), sha256="", extractor=None
    )
    return suite.compute(
        MetricInputs(
            images=np.zeros((N, 2, 2, 1), np.uint8), features=Features(pooled=samples, logits=logits), reference=seen,
            training=images, block=assign_blocks(N),
        )
    )  # fmt: skip


def test_the_suite_has_these_numbers(stored, computed):
    samples, reference, logits = stored
    assert set(computed) == {metric.key for metric in BUILT_IN["torch-fidelity"].metrics}
    assert computed["fid"].value == suite.fid(samples, reference)
    assert computed["is"].value == suite.score(logits)
    for each in computed.values():
        assert each.left_out.shape == (20,) and np.std(each.left_out) > 0
    ours = {"rng_seed": suite.SEED, "isc_splits": suite.SPLITS, "kid_subsets": suite.SUBSETS}
    ours |= {"kid_subset_size": suite.SUBSET_ROWS, "prc_neighborhood": precision_recall.K}
    assert {name: torch_fidelity.defaults.DEFAULTS[name] for name in ours} == ours


# The network ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 299, 512])
def test_the_resize_is_the_same_bit_for_bit(size):
    images = torch.from_numpy(maker.pictures(1, size, seed=size))
    expected = interpolate_bilinear_2d_like_tensorflow1x(
        images.permute(0, 3, 1, 2).float(), size=(299, 299), align_corners=False
    )
    assert torch.equal(resize_torch(images).permute(0, 3, 1, 2), expected)


def test_the_network_is_the_same_stage_by_stage(made_inception):
    stages = ["64", "192", "768", "2048", "logits_unbiased"]
    theirs = torch_fidelity.FeatureExtractorInceptionV3(
        "inception", stages, feature_extractor_weights_path=str(made_inception.port)
    )
    images = maker.pictures(2, 96, seed=8)
    with torch.inference_mode():
        expected = dict(zip(stages, theirs(torch.from_numpy(images).permute(0, 3, 1, 2)), strict=True))
    ours = INCEPTION_2015.load(weights=made_inception.port)
    found = {}
    with torch.inference_mode():
        x = inception_v3.preprocess(torch.from_numpy(images))
        for number, layer in enumerate(ours.net.stem):
            x = layer(x)
            if number in (3, 6):
                found["64" if number == 3 else "192"] = x.mean(dim=(2, 3))
        for scope in ("mixed", "mixed_1", "mixed_2", "mixed_3", "mixed_4", "mixed_5", "mixed_6", "mixed_7"):
            x = ours.net.blocks[scope](x)
        found["768"] = x.mean(dim=(2, 3))
    features = ours(images)
    found |= {"2048": torch.from_numpy(features.pooled), "logits_unbiased": torch.from_numpy(features.logits)}
    for stage in stages:
        scale = expected[stage].double().square().mean().sqrt()
        difference = float((found[stage] - expected[stage]).abs().max() / scale)
        assert difference < inception_v3.TOLERANCES["pooled"], (stage, difference)
