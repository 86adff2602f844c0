"""Time to target: curves whose crossing is known, censoring that is never extended, and verdicts that need seeds."""

import dataclasses
import json
import math
import random

import pytest
from click.testing import CliRunner

import harness
from harness.cli import group
from harness.errors import UserError
from results.records import Environment, Evaluation, Record, Sampling, Training
from results.store import append
from results.time_to_target import compare_to_target, read_target

STEPS = (100, 200, 400, 800)


def mark(value, steps, seed, system="a", metric="fd", device="a GPU", gflops=1.0, higher=False, drawn=0):
    return Record(
        provenance="measured", metric=metric, value=value, higher_is_better=higher, n=1000, protocol="digits",
        resolution=8, dataset="digits", system=system,
        training=Training(steps=steps, gflops=gflops * steps, seed=seed, checkpoint_sha256=f"{system}{seed}-{steps}"),
        sampling=Sampling(sampler="ddpm", steps=10, seed=drawn, samples_sha256=f"{system}{seed}-{steps}-{drawn}"),
        evaluation=Evaluation(suite="embedded", features_sha256="f", reference_sha256="r"),
        environment=Environment(training_seconds=3.6 * steps, training_device=device),
    )  # fmt: skip


def curve(scale, seed, system="a", power=-0.5, steps=STEPS, **options):
    """A power law in compute: its time to a target is known."""
    return [mark(scale * each**power, each, seed, system, **options) for each in steps]


def test_a_power_law_is_interpolated_exactly():
    a = [record for seed in range(3) for record in curve(1000.0, seed)]
    b = [record for seed in range(3) for record in curve(800.0, seed, "b")]
    (found,) = compare_to_target(a, b, read_target("fd=50"))
    assert found.a.gflops == pytest.approx((1000 / 50) ** 2) and found.b.gflops == pytest.approx((800 / 50) ** 2)
    assert found.a.hours == pytest.approx(found.a.gflops * 3.6 / 3600) and found.a.device == "a GPU"
    assert found.ratio == pytest.approx(25 / 16) and found.verdict == "loss" and found.log_scale


def test_compute_of_an_auxiliary_loss_grows_along_the_training():
    """Marks of one training, although each has other Gflops of its auxiliary loss."""
    sides = []
    for name in "ab":
        records = [record for seed in range(2) for record in curve(1000.0, seed, name)]
        trainings = [
            dataclasses.replace(each.training, auxiliary_gflops=0.5 * each.training.gflops) for each in records
        ]
        sides.append([dataclasses.replace(r, training=t) for r, t in zip(records, trainings, strict=True)])
    (found,) = compare_to_target(*sides, read_target("fd=50"))
    assert found.a.gflops == pytest.approx(400)


def test_the_interval_is_over_training_seeds_and_covers():
    rng, inside, wins = random.Random(3), 0, 0
    for _ in range(200):
        sides = [
            [record for seed in range(4) for record in curve(1000 * math.exp(rng.gauss(0, 0.05)), seed, name)]
            for name in "ab"
        ]
        (found,) = compare_to_target(*sides, read_target("fd=50"))
        inside += found.ratio_low <= 1 <= found.ratio_high
        wins += found.verdict != "tie"
    assert 0.9 <= inside / 200 <= 0.99 and wins == 200 - inside


def test_not_reached_is_never_extended():
    a = [record for seed in range(2) for record in curve(1000.0, seed)]
    b = [record for seed in range(2) for record in curve(2000.0, seed, "b")]  # 70.7 at 800 steps, 50 at 1600
    (found,) = compare_to_target(a, b, read_target("fd=50"))
    assert found.b.gflops is None and found.ratio is None and found.verdict == "unknown"
    assert found.b.text == "not reached (best 70.71)" and all(math.isinf(each.high) for each in found.b.seeds)
    assert "at least 0.33" in found.reason
    with_more = [
        [record for seed in range(4) for record in curve(scale, seed, name)]
        for scale, name in ((1000.0, "a"), (2000.0, "b"))
    ]
    assert compare_to_target(*with_more, read_target("fd=50"))[0].verdict == "win"
    some = [*curve(1000.0, 0), *curve(2000.0, 1)]
    (found,) = compare_to_target(some, b, read_target("fd=50"))
    assert found.a.gflops is None and found.a.text == "not reached by 1 of 2 seeds (best 35.36)"


def test_reached_at_the_first_mark_is_only_a_bound():
    a, b = ([record for seed in range(2) for record in curve(300.0, seed, name)] for name in "ab")
    (found,) = compare_to_target(a, b, read_target("fd=50"))
    assert found.a.gflops is None and "before the first mark" in found.a.text and found.verdict != "win"


def test_one_training_seed_has_no_verdict():
    (found,) = compare_to_target(curve(1000.0, 0), curve(100.0, 0, "b", steps=(1, 2, 4, 8)), read_target("fd=50"))
    assert found.ratio == pytest.approx(100.0) and found.ratio_low is None
    assert found.verdict == "unknown" and "A and B: one training seed" in found.reason


def test_higher_is_better_and_values_at_0_have_a_linear_scale():
    a, b = (
        [mark(0.1 + 0.1 * index, steps, seed, name, metric="recall", higher=True) for seed in range(2) for index, steps in enumerate(STEPS)]
        for name in "ab"
    )  # fmt: skip
    (found,) = compare_to_target(a, b, read_target("recall=0.25"))
    assert found.a.gflops == pytest.approx(200 * math.sqrt(2)) and not found.log_scale and found.verdict == "tie"
    kid = [mark(value, steps, seed, metric="kid") for seed in range(2) for value, steps in ((0.01, 100), (-0.01, 400))]
    assert compare_to_target(kid, kid, read_target("kid=0"))[0].a.gflops == pytest.approx(200)


def test_hours_of_other_devices_are_no_hours():
    a = [*curve(1000.0, 0), *curve(1000.0, 1, device="another GPU")]
    (found,) = compare_to_target(a, a, read_target("fd=50"))
    assert found.a.gflops and found.a.hours is None and found.hours_ratio is None


def test_sides_that_are_ambiguous_or_empty():
    with pytest.raises(UserError, match="A holds a and b at ddpm-10"):
        compare_to_target(curve(1.0, 0) + curve(1.0, 0, "b"), curve(1.0, 0), read_target("fd=50"))
    with pytest.raises(UserError, match="A has no record of kid"):
        compare_to_target(curve(1.0, 0), curve(1.0, 0), read_target("kid=50"))


def test_the_command(tmp_path):
    for name, scale in (("a", 1000.0), ("b", 800.0)):
        append(tmp_path / name / "records.jsonl", [r for seed in range(3) for r in curve(scale, seed, name)])
    words = ["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--target", "fd=50"]
    done = CliRunner().invoke(group, words)
    assert done.exit_code == 0, done.output
    assert "A needs 1.56 times the training compute of B" in done.output and "hours of A on a GPU" in done.output
    document = json.loads(CliRunner().invoke(group, [*words, "--json"]).stdout)
    assert document["rows"][0]["a"]["gflops"] == pytest.approx(400) and document["rows"][0]["verdict"] == "loss"
    assert harness.compare(tmp_path / "a", tmp_path / "b", target="fd=50").to_target[0].verdict == "loss"
    for wrong in ("fd", "fd=nan", "fdd=3"):
        assert CliRunner().invoke(group, [*words[:-1], wrong]).exit_code == 2
