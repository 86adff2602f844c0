"""How often verdicts are wrong, and how often they find what is there, where the truth is known.

Larger simulations of the same rules (1,000 comparisons or more each) gave, with the rules of before in brackets:
equal systems, one training seed, training noise 3.2 times that of one sampling, the verdict "if trained again" wins or
loses with 1, 3, 5, 10, 20 sampling seeds in 4, 5, 5, 5, 5 % (5, 8, 25, 48, 66 %); a difference of 4 standard errors of one
sampling is found with 1, 2, 3 sampling seeds in 77, 97, 99 % (77, 11, 69 %); of 12 and 30 equal systems one is set behind
the best in 2 and 5 % of tables (65 and 97 %), over 2, 3, 5 training seeds of 12 systems in 5, 3, 2 % (22, 39, 55 %).
"""

import dataclasses
import json
import math
import random

import pytest
from click.testing import CliRunner
from scipy.stats import studentized_range as scipy_range

from harness.cli import group
from results.compare import RETRAINING, RETRAINING_CV, compare
from results.experiments import student_t
from results.matched import matchups
from results.records import Evaluation, Record, Sampling, Training
from results.simultaneous import studentized_range, widening
from results.store import append

SAMPLING_SD = 0.1


def at_most(share, trials):
    """The largest observed share of `trials` draws whose true share is `share`: 4 standard errors above it."""
    return share + 4 * math.sqrt(share * (1 - share) / trials)


def record(value, half=0.5, *, system="a", seed=0, drawn=0, metric="fid", dataset="imagenet", interval="jackknife-20"):
    return Record(
        provenance="measured",
        metric=metric,
        value=value,
        low=None if half is None else value - half,
        high=None if half is None else value + half,
        interval=interval,
        n=1000,
        protocol="p",
        resolution=256,
        dataset=dataset,
        system=system,
        training=Training(steps=800, gflops=100.0, seed=seed, checkpoint_sha256=f"{system}{seed}"),
        sampling=Sampling(sampler="ddpm", steps=50, seed=drawn, samples_sha256=f"{system}{seed}-{drawn}"),
        evaluation=Evaluation(suite="s", features_sha256="f", reference_sha256="r"),
    )


class Draws:
    """Random sides: training moves a value by `training_sd`, sampling by SAMPLING_SD, which a jackknife estimates."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def half(self):
        squares = sum(self.random.gauss(0, 1) ** 2 for _ in range(19))
        return student_t(19) * SAMPLING_SD * math.sqrt(squares / 19)

    def side(self, mean, system, *, seeds=1, draws=1, training_sd=0.0, **changes):
        records = []
        for seed in range(seeds):
            trained = self.random.gauss(mean, training_sd)
            records += [
                record(
                    self.random.gauss(trained, SAMPLING_SD),
                    self.half(),
                    system=system,
                    seed=seed,
                    drawn=drawn,
                    **changes,
                )
                for drawn in range(draws)
            ]
        return records


def share(trials, event):
    return sum(event() for _ in range(trials)) / trials


@pytest.mark.parametrize("draws", [1, 5])
def test_sampling_again_does_not_make_training_again_more_certain(draws):
    """The noise of training does not shrink with the number of sampling seeds; 48 % at 10 of them when it did."""
    made, trials = Draws(draws), 300

    def decided():
        sides = [made.side(10, name, draws=draws, training_sd=RETRAINING * SAMPLING_SD) for name in "ab"]
        return compare(*sides)[0].if_trained_again in ("win", "loss")

    assert share(trials, decided) <= at_most(0.05, trials)


def test_of_small_sampling_noise_the_published_variation_is_left():
    (found,) = compare([record(2.00, 0.001)], [record(2.06, 0.001, system="b")])
    assert (found.verdict, found.if_trained_again) == ("win", "tie")
    (found,) = compare([record(2.00, 0.001)], [record(2.10, 0.001, system="b")])
    assert found.if_trained_again == "win"  # 2.8 standard deviations of 1.3 % on both sides
    assert 1.96 * RETRAINING_CV * math.hypot(2, 2.06) > 0.06 and 1.97 * RETRAINING_CV * math.hypot(2, 2.1) < 0.1


@pytest.mark.parametrize(("metric", "dataset"), [("fd", "imagenet"), ("fid", "digits"), ("precision", "imagenet")])
def test_a_noise_of_training_that_nobody_measured_is_unknown(metric, dataset):
    def again(a, b):
        sides = [[record(value, system=name, metric=metric, dataset=dataset)] for name, value in (("a", a), ("b", b))]
        return compare(*sides)[0].if_trained_again

    assert again(10.0, 90.0) == "unknown" and again(10.0, 10.1) == "tie"  # more noise leaves a tie a tie


def test_a_verdict_says_where_the_noise_of_training_is_from(tmp_path):
    def source(a, b):
        return compare(a, b)[0].training_noise

    one, other, seeds = (
        [record(10.0)],
        [record(11.0, system="b")],
        [record(10 + i, seed=i, system="b") for i in range(3)],
    )
    assert source(one, other) == "published"
    assert (
        source(one, seeds) == source(seeds, one) == source([record(9 + i, seed=i) for i in range(2)], seeds) == "seeds"
    )
    assert source([record(10.0, metric="is")], [record(11.0, system="b", metric="is")]) is None
    assert source([record(10.0, half=None)], other) is None
    for name, side in (("a", one), ("b", seeds)):
        append(tmp_path / f"{name}.jsonl", side)
    words = ["compare", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), "--json"]
    rows = json.loads(CliRunner().invoke(group, words).stdout)["rows"]
    assert [row["training_noise"] for row in rows] == ["seeds"]


@pytest.mark.parametrize(("seeds", "draws"), [(2, (1, 1)), (4, (1, 3)), (4, (3, 1))])
def test_the_noise_of_training_is_measured_where_one_side_has_seeds(seeds, draws):
    """Of equals 5 % are decided; 20 and 40 % when the noise was 3.2 times that of sampling and truly 5 times."""
    made, trials = Draws(seeds), 300

    def decided(gap=0.0):
        sides = [
            made.side(10 + shift, name, seeds=count, draws=drawn, training_sd=0.5, metric="fd")
            for name, count, drawn, shift in (("a", seeds, draws[0], 0), ("b", 1, draws[1], gap))
        ]
        return compare(*sides)[0].if_trained_again in ("win", "loss")

    assert share(trials, decided) <= at_most(0.05, trials)
    if seeds > 2:
        assert share(50, lambda: decided(5.0)) > 0.9


def test_two_sampling_seeds_are_worth_more_than_one():
    """Of differences of 4 standard errors of one sampling 9 % were found with two seeds, and 76 % with one."""
    made, trials = Draws(1), 300

    def decided(draws, gap):
        sides = [made.side(10 + shift, name, draws=draws) for name, shift in (("a", 0), ("b", gap))]
        return compare(*sides)[0].verdict != "tie"

    found = [share(trials, lambda: decided(draws, 4 * SAMPLING_SD)) for draws in (1, 2, 3)]  # noqa: B023
    assert found[0] < found[1] <= found[2] + 0.02 and found[0] > 0.65 and found[1] > 0.93
    assert share(trials, lambda: decided(2, 0.0)) <= at_most(0.05, trials)


def test_seeds_that_contradict_the_intervals_count_alone():
    """Intervals seven times too wide, as of balanced labels before blocks followed the labels."""
    values = [10.0, 10.1, 9.9, 10.05, 9.95, 10.1, 9.9, 10.0]
    sides = [[record(v + s, 1.5, system=n, drawn=i) for i, v in enumerate(values)] for n, s in (("a", 0), ("b", 0.2))]
    assert compare(*sides)[0].verdict == "win"
    assert compare(*(side[:1] for side in sides))[0].verdict == "tie"


@pytest.mark.parametrize("seeds", [1, 3])
def test_among_many_equals_a_list_shows_a_winner_in_five_percent(seeds):
    made, trials = Draws(seeds), 60 // seeds

    def decided():
        records = [
            each
            for index in range(12)
            for each in made.side(10, f"s{index:02}", seeds=seeds, training_sd=0.3 if seeds > 1 else 0.0, metric="fd")
        ]
        (found,) = matchups(records)
        assert {matchup.systems for matchup in found.matchups} == {12}
        return any(matchup.verdict().verdict != "tie" for matchup in found.matchups)

    assert share(trials, decided) <= at_most(0.05, trials)


def test_a_real_winner_among_many_is_found():
    values = {f"s{index:02}": 10.0 for index in range(12)} | {"s05": 9.4}
    (found,) = matchups([record(value, 0.2, system=name, metric="fd") for name, value in values.items()])
    verdicts = {each.group.records[0].system: each.verdict().verdict for each in found.matchups}
    assert verdicts["s05"] == "win" and sum(verdict == "loss" for verdict in verdicts.values()) == 10


def test_two_systems_are_a_pair_and_more_are_wider():
    assert widening(1, 19) == widening(2, 5) == 1.0
    factors = [widening(count, 19) for count in (2, 3, 12, 200)]
    assert factors == sorted(factors) and factors[2] == pytest.approx(5.2308 / 2.9600, rel=1e-4)
    for count, degrees in ((2, 1.0), (3, 2.0), (12, 19.0), (30, 38.0)):
        assert studentized_range(count, degrees) == pytest.approx(scipy_range.ppf(0.95, count, degrees), rel=1e-4)
    assert studentized_range(12, math.inf) == pytest.approx(scipy_range.ppf(0.95, 12, 1e6), rel=1e-4)


def test_equal_shares_tie_with_the_noise_of_their_intervals():
    """Two shares of exactly 0 tie by the upper halves of their intervals; the noise is not 0."""
    none = dataclasses.replace(record(0.0, None, metric="copies", interval="clopper-pearson"), low=0.0, high=0.004)
    (found,) = compare([none], [dataclasses.replace(none, system="b")])
    assert found.verdict == "tie" and found.largest_tie == pytest.approx(0.004 * math.sqrt(2))


def test_seeds_without_spread_keep_the_noise_of_sampling():
    """Seeds that all have a share of 0 do not make any difference certain."""
    none = [
        dataclasses.replace(
            record(0.0, None, seed=seed, metric="copies", interval="clopper-pearson"), low=0.0, high=0.004
        )
        for seed in range(3)
    ]
    few = [dataclasses.replace(each, system="b", value=0.001, low=0.0, high=0.005) for each in none]
    (found,) = compare(none, few)
    assert (found.scope, found.verdict) == ("training seeds", "tie") and 0.001 < found.largest_tie < 0.004
    unknown = [dataclasses.replace(each, low=None, high=None) for each in none]
    assert compare(unknown, few)[0].verdict == "unknown"
