import dataclasses

import pytest

from harness import registry
from harness.errors import UserError
from results.compare import RULE, compare
from results.metrics import higher_is_better
from results.records import Evaluation, Record, Sampling, Training


def record(metric="fd", value=10.0, half=1.0, system="a", steps=50, training=800, n=1000, **other):
    return Record(
        provenance="measured",
        metric=metric,
        value=value,
        low=None if half is None else value - half,
        high=None if half is None else value + half,
        interval="jackknife-20",
        n=n,
        protocol="digits",
        resolution=8,
        dataset="digits",
        system=system,
        training=Training(steps=training),
        sampling=Sampling(sampler="ddpm", steps=steps),
        evaluation=Evaluation(suite="embedded", features_sha256="f", reference_sha256="r"),
        **other,
    )


@pytest.mark.parametrize(
    ("metric", "a", "b", "verdict"),
    [
        ("fd", 10.0, 12.0, "win"),
        ("fd", 12.0, 10.0, "loss"),
        ("fd", 10.0, 11.4, "tie"),  # sqrt(1 + 1) = 1.414...
        ("fd", 10.0, 11.42, "win"),
        ("recall", 10.0, 12.0, "loss"),
        ("recall", 12.0, 10.0, "win"),
    ],
)
def test_verdicts(metric, a, b, verdict):
    (found,) = compare([record(metric, a)], [record(metric, b, system="b")])
    assert found.verdict == verdict
    assert found.difference == pytest.approx(a - b)
    assert found.largest_tie == pytest.approx(2**0.5)


def test_the_side_of_an_asymmetric_interval_that_faces_the_other_counts():
    a = dataclasses.replace(record("recall", 0.5), low=0.1, high=0.6)
    b = dataclasses.replace(record("recall", 0.75, system="b"), low=0.7, high=0.9)
    (found,) = compare([a], [b])
    assert found.largest_tie == pytest.approx((0.1**2 + 0.05**2) ** 0.5)
    assert found.verdict == "loss"


def test_without_an_interval_there_is_no_verdict():
    (found,) = compare([record(half=None)], [record(value=20.0, system="b")])
    assert (found.verdict, found.largest_tie) == ("unknown", None)


def test_cells_are_matched_by_metric_and_sampling():
    a = [record(steps=10), record(steps=50), record("kid")]
    b = [record(steps=50, value=30.0, system="b"), record("precision", system="b")]
    found = compare(a, b)
    assert [(each.metric, each.sampling) for each in found] == [("fd", "ddpm-50")]


def test_what_is_not_stated_about_guidance_is_no_none():
    guided = dataclasses.replace(record(), sampling=Sampling(sampler="ddim", steps=5, guidance_channels="classifier"))
    (found,) = compare([guided], [dataclasses.replace(guided, system="b")])
    assert found.sampling == "ddim-5, guidance scale not stated (classifier)"
    guided = dataclasses.replace(record(), sampling=Sampling(sampler="ddim", steps=5, guidance_scale=1.5))
    (found,) = compare([guided], [dataclasses.replace(guided, system="b")])
    assert found.sampling == "ddim-5, guidance 1.5"


def test_a_sampler_without_steps_is_named_alone():
    (found,) = compare([record(steps=None)], [record(system="b", steps=None)])
    assert found.sampling == "ddpm"


def test_what_may_not_be_compared_is_refused():
    with pytest.raises(UserError, match="N is 1000 in A and 2000 in B"):
        compare([record()], [record(n=2000, system="b")])
    with pytest.raises(UserError, match="A holds two results for fd.*800 and 900"):
        compare([record(), record(training=900)], [record(system="b")])
    with pytest.raises(UserError, match="B holds no records"):
        compare([record()], [])


def test_the_direction_of_every_built_in_metric_is_known():
    for metric in (*registry.metrics, *(metric for suite in registry.suites for metric in suite.metrics)):
        assert higher_is_better(record(metric.key)) == (metric.direction == "higher"), metric.key
    assert not any(
        higher_is_better(record(key)) for key in ("fid", "sfid", "fd", "kid", "copies", "loss_mse", "loss_vb")
    )
    assert all(higher_is_better(record(key)) for key in ("is", "precision", "recall", "density", "authenticity"))
    assert higher_is_better(record("my_metric")) is None
    assert "Training again" in RULE and "training seeds" in RULE
