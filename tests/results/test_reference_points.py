"""Reference convergence points: how often a healthy seed is called worse or better, and what is caught."""

import dataclasses
import json
import math
import random
from pathlib import Path

import pytest
from click.testing import CliRunner

from harness import registry
from harness.cli import group
from harness.data.digits import load
from harness.errors import UserError
from harness.planning.request import make_request
from harness.runs.run import recipe_identity
from results.reference_points import Quantity, check, find, loss_at, losses_at, make, matching, packaged, read

LOSSES = [Quantity(step=step, name="loss") for step in (50, 100, 200)]
DISTANCES = [
    Quantity(step=step, name="fd", sampling="ddpm-10", key=("digits", 8, 1000, "embedded", "1", "f", "r"))
    for step in (100, 200)
]
RECIPE = {"batch": 32, "learning_rate": 1e-3, "weight_decay": 0.0}


def seed_values(rng, worse=1.0, spread=0.03):
    """A healthy seed: losses that move together, distances with a spread of their own."""
    common = rng.gauss(0, spread)
    values = {quantity: 0.2 * math.exp(common + rng.gauss(0, spread / 2)) * worse for quantity in LOSSES}
    return {**values, **{quantity: 80 * math.exp(rng.gauss(0, 2 * spread)) * worse for quantity in DISTANCES}}


def point_of(rng, seeds=5):
    return make(
        [(seed, seed_values(rng)) for seed in range(seeds)], backbone="dit-xs-4", protocol="digits", framework="torch",
        dataset_sha256="d", recipe=RECIPE, made={"torch": "2.13"},
    )  # fmt: skip


def test_at_most_one_healthy_seed_of_twenty_is_an_alarm():
    rng = random.Random(0)
    alarms = sum(check(point_of(rng), seed_values(rng), RECIPE).verdict != "as expected" for _ in range(400))
    assert (
        alarms <= 0.06 * 400 and alarms > 0
    )  # of 20 seeds one; Bonferroni over values that move together asks for less


def test_both_sides_are_named():
    point = point_of(random.Random(1))
    middle = {quantity: math.exp(sum(map(math.log, values)) / 5) for quantity, values in point.values.items()}
    assert check(point, middle, RECIPE).verdict == "as expected"
    assert check(point, {q: 1.5 * value for q, value in middle.items()}, RECIPE).verdict == "worse"
    assert check(point, {q: value / 1.5 for q, value in middle.items()}, RECIPE).verdict == "suspiciously better"
    mixed = {q: value * (1.5 if q.name == "loss" else 0.5) for q, value in middle.items()}
    assert check(point, mixed, RECIPE).verdict == "worse and suspiciously better"
    memorised = {**middle, DISTANCES[0]: -1e-9}  # the distance of training images to themselves
    found = check(point, memorised, RECIPE)
    assert found.verdict == "suspiciously better" and [d.side for d in found.deviations].count("better") == 1


def test_a_recipe_that_differs_is_named_and_tested_all_the_same():
    point = point_of(random.Random(2))
    found = check(point, seed_values(random.Random(3), worse=2.0), {**RECIPE, "weight_decay": 0.3})
    assert found.verdict == "worse" and found.recipe_differences == {"weight_decay": (0.3, 0.0)}
    other = make(
        [(seed, seed_values(random.Random(seed))) for seed in range(5)], backbone="dit-xs-4", protocol="digits",
        framework="torch", dataset_sha256="d", recipe={**RECIPE, "weight_decay": 0.3}, made={},
    )  # fmt: skip
    near = matching([point, other], backbone="dit-xs-4", protocol="digits", recipe={**RECIPE, "weight_decay": 0.3})
    assert near is other


def test_files_keep_every_value(tmp_path):
    point = point_of(random.Random(4))
    point.write(tmp_path / "point.json")
    again = read(tmp_path / "point.json")
    assert again.values == point.values and again.recipe == point.recipe and again.seeds == (0, 1, 2, 3, 4)
    row = json.loads((tmp_path / "point.json").read_text())["rows"][0]
    assert row["mean"] == pytest.approx(sum(row["values"]) / 5) and row["standard_deviation"] > 0


def test_what_is_no_point_is_refused(tmp_path):
    with pytest.raises(UserError, match="5 runs or more with different seeds"):
        point_of(random.Random(0), seeds=4)
    with pytest.raises(UserError, match="no reference point of dit-s-8 on digits"):
        matching([point_of(random.Random(0))], backbone="dit-s-8", protocol="digits", recipe=RECIPE)
    with pytest.raises(UserError, match="train it to step 50"):
        check(point_of(random.Random(0)), {}, RECIPE)
    (tmp_path / "point.json").write_text('{"schema": 1, "rows": [{}], "seeds": [], "backbone": ""}')
    with pytest.raises(UserError, match="is not a reference point"):
        read(tmp_path / "point.json")
    for words in (["check", str(tmp_path), "--convergence"], ["check", "dit-xs-2", "--reference-point", "x.json"]):
        done = CliRunner().invoke(group, words)
        assert isinstance(done.exception, UserError) and "\n" not in str(done.exception)


def test_the_loss_is_the_mean_of_the_last_fifth():
    losses = [float(step) for step in range(1, 101)]
    assert loss_at(losses, 100) == pytest.approx(sum(range(81, 101)) / 20) and loss_at(losses, 1) == 1.0
    assert [quantity.step for quantity in losses_at(losses, (50, 100, 200))] == [50, 100]


# What is shipped: point -> settings of the recipe other than the protocol's.
SHIPPED = {
    "digits-dit-2xs-4": {"objective": "sit"},
    "digits-dit-2xs-8": {"objective": "sit"},
    "digits-dit-3xs-8": {"objective": "sit"},
    "fashion-mnist-16-dit-2xs-4": {},
    "fashion-mnist-16-dit-3xs-8": {},
}


def test_these_points_are_packaged():
    assert {point.name for point in packaged()} == SHIPPED.keys()


@pytest.mark.parametrize("name", SHIPPED)
def test_a_packaged_point_is_of_its_protocol(name):
    point = find(Path(name))
    assert point.name == name == f"{point.protocol}-{point.backbone}" and point.backbone in registry.backbones
    request = make_request(backbone=point.backbone, protocol=point.protocol, settings=SHIPPED[name])
    assert not point.recipe_differences(recipe_identity(request.recipe))
    assert len(point.seeds) >= 5 and {"git_commits", "device", "versions", "threads"} <= point.made.keys()
    if point.protocol == "digits":
        assert point.dataset_sha256 == load().sha256
    end = request.recipe.steps
    assert {quantity.step for quantity in point.values if quantity.name == "loss"} == {100, end // 2, end}
    (distance,) = [quantity for quantity in point.values if quantity.key and quantity.key[3] == request.protocol.suite]
    steps = max(request.protocol.sampling.steps)  # of which `harness run` makes a sample set
    assert (distance.step, distance.sampling) == (end, f"dpm++-2m-{steps}")
    assert distance.key[:3] == (request.protocol.dataset, request.protocol.resolution, request.protocol.samples)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_seeds_of_a_packaged_point_are_as_expected_of_the_others(name):
    point = find(Path(name))
    alarms = 0
    for left_out in range(len(point.seeds)):
        others = {quantity: values[:left_out] + values[left_out + 1 :] for quantity, values in point.values.items()}
        seeds = point.seeds[:left_out] + point.seeds[left_out + 1 :]
        values = {quantity: values[left_out] for quantity, values in point.values.items()}
        found = check(dataclasses.replace(point, seeds=seeds, values=others), values, point.recipe)
        alarms += not found.passed
    assert alarms <= 1
    halved = {quantity: values[0] / 2 for quantity, values in point.values.items()}
    assert check(point, halved, point.recipe).verdict == "suspiciously better"
