"""Comparison over seeds: what belongs together, the rule, and how often it is wrong where the truth is known."""

import dataclasses
import math
import random

import pytest
from scipy.special import stdtrit
from scipy.stats import ttest_ind

from harness.errors import UserError
from results.compare import RETRAINING, compare, differing
from results.experiments import experiment_key
from results.records import Evaluation, Record, Sampling, Training


def seeded(value, seed, drawn=0, system="a", half=0.5, steps=50):
    """A record of the checkpoint of a training seed, sampled with another."""
    return Record(
        provenance="measured",
        metric="fd",
        value=value,
        low=value - half,
        high=value + half,
        n=1000,
        protocol="digits",
        resolution=8,
        dataset="digits",
        system=system,
        training=Training(steps=800, seed=seed, checkpoint_sha256=f"{system}{seed}"),
        sampling=Sampling(sampler="ddpm", steps=steps, seed=drawn, samples_sha256=f"{system}{seed}-{drawn}"),
        evaluation=Evaluation(suite="embedded", features_sha256="f", reference_sha256="r"),
    )


@pytest.mark.parametrize("counts", [(2, 2), (2, 5), (3, 40), (30, 30)])
def test_the_interval_over_seeds_is_welchs(counts):
    rng = random.Random(1)
    values = [[rng.gauss(10.0, scale) for _ in range(count)] for scale, count in zip((1.0, 3.0), counts, strict=True)]
    sides = [
        [seeded(value, seed, system=name) for seed, value in enumerate(own)]
        for name, own in zip("ab", values, strict=True)
    ]
    (found,) = compare(*sides)
    expected = ttest_ind(*values, equal_var=False)
    interval = expected.confidence_interval(0.95)
    assert found.degrees_of_freedom == pytest.approx(expected.df)
    assert (found.difference - found.largest_tie, found.difference + found.largest_tie) == pytest.approx(
        tuple(interval)
    )


def test_training_seeds_are_welchs_test():
    a = [seeded(value, seed) for seed, value in enumerate((10.0, 11.0, 12.5))]
    b = [seeded(value, seed, system="b") for seed, value in enumerate((13.0, 13.4))]
    (found,) = compare(a, b)
    variances = (1.5833333 / 3, 0.08 / 2)
    degrees = sum(variances) ** 2 / (variances[0] ** 2 / 2 + variances[1] ** 2 / 1)
    assert found.scope == "training seeds" and found.if_trained_again is None
    assert found.degrees_of_freedom == pytest.approx(degrees, rel=1e-6)
    assert found.largest_tie == pytest.approx(stdtrit(degrees, 0.975) * math.sqrt(sum(variances)), rel=1e-6)
    assert found.difference == pytest.approx(33.5 / 3 - 13.2) and found.verdict == "tie"
    assert [len(each) for each in found.a.checkpoints] == [1, 1, 1]


def test_sampling_seeds_of_one_checkpoint_are_averaged_and_pooled_with_their_intervals():
    a = [seeded(value, 0, drawn) for drawn, value in enumerate((10.0, 10.2, 10.4))]
    (found,) = compare(a, [seeded(12.0, 0, system="b", half=0.3)])
    # variance of one sampling: 0.04 over the seeds (2 degrees of freedom), and of each of the 3 intervals (19)
    pooled = (2 * 0.04 + 57 * (0.5 / stdtrit(19, 0.975)) ** 2) / 59
    half = stdtrit(59, 0.975) * math.sqrt(pooled / 3)
    assert found.scope == "these checkpoints" and found.a.value == pytest.approx(10.2)
    assert found.largest_tie == pytest.approx(math.hypot(half, 0.3), rel=1e-6)
    assert found.verdict == "win" and found.if_trained_again == "unknown"
    bare = [dataclasses.replace(each, low=None, high=None) for each in a]
    (found,) = compare(bare, [seeded(12.0, 0, system="b", half=0.3)])
    assert found.largest_tie == pytest.approx(math.hypot(stdtrit(2, 0.975) * 0.2 / math.sqrt(3), 0.3), rel=1e-6)


def test_the_noise_of_training_again_is_that_of_one_sampling_times_the_published_factor():
    def fid(value, drawn=0, system="a", half=0.5):
        made = seeded(value, 0, drawn, system, half)
        return dataclasses.replace(made, metric="fid", dataset="imagenet", resolution=256)

    (found,) = compare([fid(10.0)], [fid(13.5, system="b")])
    assert found.largest_tie == pytest.approx(math.hypot(0.5, 0.5)) and found.verdict == "win"
    bound = math.hypot(0.5, 0.5) * math.hypot(1, RETRAINING)
    assert bound < 3.5 and found.if_trained_again == "win"
    assert compare([fid(10.0)], [fid(10.0 + 0.99 * bound, system="b")])[0].if_trained_again == "tie"


def test_what_differs_in_more_than_seeds_does_not_belong_together():
    with pytest.raises(UserError, match="a and c"):
        compare([seeded(1.0, 0), seeded(1.0, 1, system="c")], [seeded(2.0, 0, system="b")])
    other = dataclasses.replace(seeded(1.5, 1), training=Training(steps=800, seed=1, learning_rate=0.1))
    with pytest.raises(UserError, match="holds two results"):
        compare([seeded(1.0, 0), other], [seeded(2.0, 0, system="b")])
    again = dataclasses.replace(seeded(1.0, 0), value=1.2, low=None, high=None)
    with pytest.raises(UserError, match="with the same seeds"):
        compare([seeded(1.0, 0), again], [seeded(2.0, 0, system="b")])


def test_one_way_of_sampling_each_is_compared_and_said():
    guided = dataclasses.replace(
        seeded(8.0, 0, system="b"),
        sampling=Sampling(sampler="ddpm", steps=50, guidance_scale=1.5, guidance_channels="all"),
    )
    (found,) = compare([seeded(10.0, 0), seeded(12.0, 0, steps=10)], [guided])  # the 50 steps, not the 10
    assert found.sampling == "ddpm-50 against ddpm-50, guidance 1.5 (all)" and found.difference == 2.0
    unlike = dataclasses.replace(seeded(8.0, 0, system="b"), training=Training(steps=400, seed=3))
    assert differing(seeded(1.0, 0), unlike) == {"training steps": (800, 400)}


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_how_often_the_rule_is_wrong_and_right(seeds):
    """Training seeds spread by 1, sampling by 0.3 (known to the interval): 2,000 comparisons of equals, then of unequals."""
    draw = random.Random(seeds)

    def side(mean, system):
        return [
            seeded(draw.gauss(mean, 1) + draw.gauss(0, 0.3), seed, system=system, half=0.6) for seed in range(seeds)
        ]

    trials = 2000
    wrong = sum(compare(side(10, "a"), side(10, "b"))[0].verdict != "tie" for _ in range(trials)) / trials
    assert wrong < 0.05 + 4 * math.sqrt(0.05 * 0.95 / trials)  # Welch's test is cautious with two seeds
    assert wrong > 0.01
    right = [
        sum(compare(side(10, "a"), side(10 + gap, "b"))[0].verdict == "win" for _ in range(300)) / 300 for gap in (1, 4)
    ]
    assert right[1] > right[0] and right[1] > {2: 0.2, 3: 0.7, 5: 0.98}[seeds]


def test_a_micro_batch_makes_no_other_experiment():
    halved = seeded(11.0, 1)
    halved = dataclasses.replace(halved, training=dataclasses.replace(halved.training, micro_batch=16))
    (found,) = compare([seeded(10.0, 0), halved], [seeded(13.0, 0, system="b"), seeded(13.4, 1, system="b")])
    assert found.scope == "training seeds" and found.a.means == [10.0, 11.0]
    assert experiment_key(halved) == experiment_key(seeded(10.0, 0))


def test_a_seed_trained_twice_is_one_seed():
    again = seeded(12.0, 0)
    again = dataclasses.replace(again, training=dataclasses.replace(again.training, checkpoint_sha256="twice"))
    b = [seeded(13.0, 0, system="b"), seeded(13.4, 1, system="b")]
    (found,) = compare([seeded(10.0, 0), again], b)
    assert found.scope == "these checkpoints" and found.a.means == [11.0] and len(found.a.checkpoints) == 2
    assert found.largest_tie == pytest.approx(math.hypot(0.5 / math.sqrt(2), 0.5 / math.sqrt(2)))
    (found,) = compare([seeded(10.0, 0), again, seeded(14.0, 1)], b)
    assert found.scope == "training seeds" and found.a.means == [11.0, 14.0] and found.a.value == 12.5
