"""A backbone of two times and the objective that trains it, both of a package: checks, plan, runs, records, refusals."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from package_of_doors import harness, installed

from harness import registry
from harness.compute.trace_jax import trace as trace_in_jax
from harness.compute.trace_torch import trace
from harness.conformance.checks import ALL, QUICK, run_checks
from harness.conformance.parity import parity
from harness.conformance.suite import subject_of
from harness.diffusion.objectives import Objective, TwoTimes
from harness.runs.samples import read_samples
from harness.spec import BackboneSpec

STEPS = ("--backbone", "doors-steps", "--protocol", "doors-steps")
WORDS = ("--precision", "float32", "--micro-batch", "64", "--device", "cpu", "--no-report")
LEARN = (
    "--set",
    "batch=64",
    "--set",
    "ema_decay=0.99",
    "--steps",
    "600",
    "--samples",
    "200",
    "--sampling-steps",
    "1,8",
)
FORWARD = (64 + 16 + 2 * 256 + 64) * 256  # multiply-adds of the package's perceptron on 8x8x1


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The working folder, with the package installed."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "site").mkdir()
    with pytest.MonkeyPatch.context() as patch, installed(folder / "site"):
        patch.chdir(folder)
        yield folder


def records_of(folder):
    """(metric, sampler steps) -> record."""
    rows = map(json.loads, Path(folder, "records.jsonl").read_text().splitlines())
    return {(row["metric"], row["sampling"]["steps"]): row for row in rows}


def test_the_network_passes_the_checks_in_both_frameworks(home):
    spec = registry.backbones.get("doors-steps")
    ours, theirs = (subject_of(spec, framework, {"out_channels": 1}) for framework in ("torch", "jax"))
    for subject in (ours, theirs):
        checks = {name: check for name, check in ALL[subject.framework].items() if name != "other sizes"}
        found = list(run_checks(subject, checks))
        assert [each for each in found if each.status == "failed"] == []
    assert parity(ours, theirs).status == "ok"
    assert trace(spec, out_channels=1).flops == trace_in_jax(spec, out_channels=1).flops == FORWARD


def test_another_network_in_jax_is_named(home):
    from all_doors import jax_networks  # type: ignore[import-not-found]

    class Other(jax_networks.Steps):
        def __call__(self, x, t, y):
            return super().__call__(x.clip(-1, 1), t, y)

    class Renamed(jax_networks.Steps):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            self.inner = self.first
            del self.first

    jax_networks.Other, jax_networks.Renamed = Other, Renamed
    spec = registry.backbones.get("doors-steps")
    for name, message in (
        ("Other", "expected outputs within 1e-05 of their standard deviation, came a difference of"),
        ("Renamed", "the weights cannot be mapped by their names: "),
    ):
        builders = {**spec.builders, "jax": f"all_doors.jax_networks:{name}"}
        other = BackboneSpec(**{**vars(spec), "builders": builders})
        ours, theirs = (subject_of(other, framework, {"out_channels": 1}) for framework in ("torch", "jax"))
        found = parity(ours, theirs)
        assert found.status == "failed" and message in found.message, found


@pytest.mark.parametrize(("column", "what"), [(0, "the time t[:, 0]"), (1, "the end of the step t[:, 1]")])
def test_a_network_that_ignores_one_of_its_times_is_named(column, what, home):
    from all_doors import networks  # type: ignore[import-not-found]

    class Ignores(networks.Steps):
        def forward(self, x, t, y):
            return super().forward(x, t[:, [1 - column, 1 - column]], y)

    networks.Ignores = Ignores
    spec = registry.backbones.get("doors-steps")
    spec = BackboneSpec(**{**vars(spec), "builders": {"torch": "all_doors.networks:Ignores"}})
    found = {each.check: each for each in run_checks(subject_of(spec, "torch", {"out_channels": 1}), QUICK)}
    assert f"expected an output that depends on {what}" in found["image, time and label matter"].message


def test_only_denoisers_have_two_times():
    builders = {"torch": "a:b"}
    for fields in ({"times": 3}, {"times": 2, "kind": "upsampler"}):
        with pytest.raises(ValueError, match=r"backbone 'x': times is \d; it is 1, or 2 for a denoiser"):
            BackboneSpec(name="x", builders=builders, **fields)


def test_what_does_not_fit_is_one_line(home):
    flow = ("--set", "schedule=flow")
    for words, message in (
        ((*STEPS, "--set", "objective=sit"), "'doors-steps' is given two times, .* the objective velocity trains"),
        (
            ("--backbone", "dit-3xs-4", *STEPS[2:]),
            "doors-shortcut trains networks of two times, .*'dit-3xs-4' is given one",
        ),
        ((*STEPS, "--set", "schedule=linear"), "predicts steps between any two times, and linear is a table"),
        ((*STEPS, "--sampler", "heun"), "heun does not state where its steps end"),
        (
            ("--backbone", "doors-sigma", "--protocol", "doors-unlabelled", *flow, "--match", "doors-steps@9"),
            "is given two times",
        ),
    ):
        _, said = harness("plan", *words, code=2)
        assert re.search(message, said), said


def test_the_evaluations_of_the_target_count_as_training_compute(home):
    plan = json.loads(harness("plan", *STEPS, "--json")[0])
    assert plan["gflops"] == FORWARD / 1e9 and plan["training"]["passes"] == 5
    assert plan["training"]["gflops"] == pytest.approx(5 * FORWARD * 6 * 16 / 1e9)
    assert "6 steps x 16 images x 5 x 0.0001679 Gflops" in harness("plan", *STEPS)[0]
    # a network of one time trains for 3 passes
    other = registry.backbones.get("dit-3xs-4").count(input_size=8, in_channels=1, num_classes=10, out_channels=1)
    matched = json.loads(harness("plan", *STEPS, "--match", "dit-3xs-4@10", "--json")[0])
    assert matched["training"]["steps"] == round(3 * other.flops * 10 / (5 * FORWARD))
    table = json.loads(harness("plan", "--protocol", "doors-steps", "--budget", "10", "--json")[0])
    assert [row["name"] for row in table["rows"]] == ["doors-steps"]
    assert table["rows"][0]["steps"] == round(10e9 / (5 * FORWARD * 16))


@pytest.mark.parametrize("framework", ["torch", pytest.param("jax", marks=pytest.mark.slow)])
def test_digits_in_one_step(framework, home):
    """Trained for whole steps, one evaluation makes digits; the same network trained for the direction alone does not."""

    def no_step(net, x, t, r, u, xp):
        return u

    if "direction-alone" not in registry.objectives:
        target = registry.objectives.get("doors-shortcut").target
        two_times = TwoTimes(end_time=lambda t, draw, xp: t, target=no_step, evaluations=0)
        registry.objectives.register(Objective(name="direction-alone", target=target, two_times=two_times))
    found = {}
    for objective in ("doors-shortcut", "direction-alone"):
        out = f"{framework}-{objective}"
        words = (*STEPS, "--set", f"objective={objective}", "--framework", framework, "--out", out)
        harness("run", *words, *WORDS, *LEARN)
        found[objective] = records_of(out)
    ours, theirs = found["doors-shortcut"], found["direction-alone"]
    record = ours["fd", 1]
    assert (record["sampling"]["sampler"], record["sampling"]["evaluations"]) == ("euler", 1)
    assert record["sampling"]["clip_denoised"] is False and record["training"]["objective"] == "doors-shortcut"
    assert record["training"]["gflops"] == pytest.approx(5 * FORWARD * 600 * 64 / 1e9)
    assert theirs["fd", 1]["training"]["gflops"] == pytest.approx(3 * FORWARD * 600 * 64 / 1e9)
    assert (
        ours["fd", 1]["value"] < 2 * ours["fd", 8]["value"] and 1.5 * ours["fd", 1]["value"] < theirs["fd", 1]["value"]
    )
    (path,) = Path(f"{framework}-doors-shortcut").glob("samples/*euler1-*/samples.npz")
    assert np.asarray(read_samples(path).images).std() > 40
    harness("report", "--results", f"{framework}-doors-shortcut", "--out", f"report-{framework}")
    assert "doors-steps" in Path(f"report-{framework}/table-doors-steps.md").read_text()
