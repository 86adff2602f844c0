"""Matched compute: steps solved for, held against arithmetic done here from the counted flops and the paper's table."""

import dataclasses
import json
from fractions import Fraction
from pathlib import Path

import pytest
from click.testing import CliRunner

from harness import registry
from harness.cli import group, plan, train
from harness.diffusion.samplers import SamplerSpec
from harness.errors import UserError
from harness.planning.matching import evaluation_counts, matched, nearest_count, nearest_steps
from harness.planning.reference import Reference, parse_budget, parse_reference, parse_sampling_reference
from harness.planning.request import make_request
from harness.protocols import get_protocol
from harness.spec import BackboneSpec, Compute, ComputeRow

DIGITS = {"input_size": 8, "in_channels": 1, "num_classes": 10, "out_channels": 2}
BATCH, DIFFUSION = 128, 1000  # of protocol digits


def flops(name, **arguments):
    return registry.backbones.get(name).count(**(arguments or DIGITS)).flops


def best(target, each, around=3):
    """The whole number of `each` nearest to `target`, by trying those about it; the smaller of two equals."""
    middle = target // each
    return min(range(max(0, middle - around), middle + around + 1), key=lambda n: (abs(n * each - target), n))


@pytest.fixture
def planned(monkeypatch):
    """`harness plan --json` without its measurement."""
    monkeypatch.setattr("harness.pipeline.plan.with_measurement", lambda plan, request, options: plan)

    def call(*words):
        done = CliRunner().invoke(plan.command, [*words, "--json"], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return json.loads(done.output)

    return call


@pytest.fixture
def guests(monkeypatch):
    """The registry with the third-party example, a backbone without null label and a classifier, for one test."""
    registry.backbones.names()  # load first, so that the copies below are whole
    for name in ("_items", "_owners"):
        monkeypatch.setattr(registry.backbones, name, dict(getattr(registry.backbones, name)))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "plugin_example" / "src"))
    from convmixer_example.spec import SPECS

    def count(**arguments):
        return Compute(params=5, rows=(ComputeRow("all", "linear", 1_000_000),))

    plain = BackboneSpec(
        name="plain", defaults=DIGITS, builders={"torch": "nowhere:Nothing"}, closed_form=count
    )  # no null label
    registry.backbones.register(SPECS)
    registry.backbones.register((plain, dataclasses.replace(plain, name="judge", kind="classifier")))


def test_nearest_is_nearest_and_a_tie_goes_down():
    for each in (1, 2, 3, 4, 7, 10):
        for target in range(60):
            tried = min(range(70), key=lambda n: (abs(n * each - target), n))
            assert nearest_count(Fraction(target), each) == tried, (target, each)


@pytest.mark.parametrize(("name", "other", "steps"), [("dit-xs-4", "dit-xs-2", 800), ("dit-xs-2", "dit-xs-4", 3)])
def test_training_is_matched_to_another_backbone(planned, name, other, steps):
    costs = planned("--backbone", name, "--match", f"{other}@{steps}")
    own, target = flops(name) * BATCH * 3, flops(other) * BATCH * steps * 3
    expected = best(target, own)
    assert costs["training"]["steps"] == costs["recipe"]["steps"] == costs["match"]["steps"] == expected
    assert costs["match"]["to"] == f"{other}@{steps}"
    assert costs["match"]["gflops_target"] == pytest.approx(target / 1e9, rel=1e-12)
    assert costs["match"]["gflops"] == pytest.approx(expected * own / 1e9, rel=1e-12)
    assert costs["match"]["gflops"] == pytest.approx(costs["training"]["gflops"], rel=1e-12)
    assert costs["match"]["relative_error"] == pytest.approx(expected * own / target - 1, rel=1e-6)
    assert abs(costs["match"]["relative_error"]) <= 0.5 * own / target + 1e-12 and costs["match"]["relative_error"]
    assert costs["match_sampling"] == []


def test_the_papers_own_gflops_give_the_same_steps(planned):
    """Table 4 prints 118.64 and 23.01 Gflops for XL/2 and B/2, 524.60 for XL/2 at 512."""
    costs = planned("--backbone", "dit-b-2", "--protocol", "imagenet-256", "--match", "dit-xl-2@400k")
    assert costs["match"]["to"] == "dit-xl-2@400000"
    assert costs["match"]["steps"] == pytest.approx(400_000 * 118.64 / 23.01, rel=3e-4)
    budget = 524.60 * 256 * 3e6 * 3
    costs = planned("--backbone", "dit-xl-2", "--protocol", "imagenet-512", "--budget", str(budget))
    assert costs["match"]["steps"] == pytest.approx(3_000_000, rel=3e-4)


def test_a_backbone_matched_to_itself_gets_its_own_steps(planned):
    costs = planned(
        "--backbone", "dit-xl-2", "--protocol", "imagenet-256", "--match", "dit-xl-2@7M",
        "--match-sampling", "dit-xl-2@250",
    )  # fmt: skip
    assert (costs["match"]["steps"], costs["match"]["relative_error"]) == (7_000_000, 0)
    assert [(each["steps"], each["relative_error"]) for each in costs["match_sampling"]] == [(250, 0)]


def test_the_batch_set_here_is_that_of_the_other_backbone_too(planned):
    words = ("--backbone", "dit-xs-4", "--set", "batch=32")
    small = planned(*words, "--match", "dit-xs-2@800")
    assert small["training"]["batch"] == 32
    assert small["match"]["steps"] == planned("--backbone", "dit-xs-4", "--match", "dit-xs-2@800")["match"]["steps"]
    assert small["match"]["gflops_target"] == pytest.approx(flops("dit-xs-2") * 32 * 800 * 3 / 1e9, rel=1e-12)
    budget = flops("dit-xs-4") * 32 * 3 * 500 / 1e9
    assert planned(*words, "--budget", repr(budget))["match"]["steps"] == 500


def test_a_budget_is_spent_to_the_nearest_step(planned):
    costs = planned("--backbone", "dit-xs-4", "--budget", "1k")
    own = flops("dit-xs-4") * BATCH * 3
    assert costs["match"]["to"] is None and costs["match"]["gflops_target"] == 1000
    assert costs["training"]["steps"] == best(1000 * 10**9, own)
    assert costs["match"]["relative_error"] == pytest.approx(costs["training"]["steps"] * own / 1e12 - 1)
    poor = planned("--backbone", "dit-xs-2", "--budget", "0.5")  # one step is 17.1 Gflops
    assert poor["training"]["steps"] == 1
    assert poor["match"]["relative_error"] == pytest.approx(flops("dit-xs-2") * BATCH * 3 / 0.5e9 - 1)


def test_an_unmatched_plan_says_so(planned):
    costs = planned("--backbone", "dit-xs-4")
    assert costs["match"] is None and costs["match_sampling"] == [] and costs["training"]["steps"] == 800


@pytest.mark.parametrize("own_guidance", [1, 2])
@pytest.mark.parametrize("other_guidance", [1, 2])
def test_sampling_is_matched_an_image_and_guidance_counts_twice(planned, own_guidance, other_guidance):
    words = ["--cfg", "1.5"] if own_guidance == 2 else []
    tail = "@cfg4" if other_guidance == 2 else ""
    costs = planned("--backbone", "dit-xs-4", *words, "--match-sampling", f"dit-xs-2@64,16,32{tail}")
    own, other = flops("dit-xs-4") * own_guidance, flops("dit-xs-2") * other_guidance
    expected = [best(other * steps, own) for steps in (16, 32, 64)]
    assert [row["steps"] for row in costs["sampling"]] == expected
    assert [row["to"] for row in costs["match_sampling"]] == [f"dit-xs-2@{steps}{tail}" for steps in (16, 32, 64)]
    for row, had, steps in zip(costs["match_sampling"], costs["sampling"], (16, 32, 64), strict=True):
        assert row["gflops_target"] == pytest.approx(other * steps / 1e9, rel=1e-12)
        assert row["gflops"] == pytest.approx(had["gflops_per_image"], rel=1e-12)
        assert row["relative_error"] == pytest.approx(had["steps"] * own / (other * steps) - 1, rel=1e-6, abs=1e-15)
    assert costs["match"] is None and costs["training"]["steps"] == 800


def test_references_that_round_to_the_same_steps_are_one_sample_set(planned):
    costs = planned("--backbone", "dit-xs-2", "--match-sampling", "dit-xs-4@35,36,37")
    assert [row["steps"] for row in costs["match_sampling"]] == [10, 10, 10]
    assert [row["steps"] for row in costs["sampling"]] == [10]


def test_the_protocols_own_steps_need_not_fit_where_they_are_replaced(planned):
    costs = planned("--backbone", "dit-xs-4", "--set", "diffusion_steps=40", "--match-sampling", "dit-xs-2@10")
    assert [row["steps"] for row in costs["sampling"]] == [best(10 * flops("dit-xs-2"), flops("dit-xs-4"))]


def test_a_third_partys_traced_backbone_can_stand_on_either_side(planned, guests):
    traced = flops("convmixer-64-4")
    costs = planned("--backbone", "convmixer-64-4", "--match", "dit-xs-2@50", "--match-sampling", "dit-xs-2@2")
    assert costs["training"]["steps"] == best(50 * flops("dit-xs-2"), traced)
    assert [row["steps"] for row in costs["sampling"]] == [best(2 * flops("dit-xs-2"), traced)]
    costs = planned("--backbone", "dit-xs-4", "--match", "convmixer-64-4@9k")
    assert costs["training"]["steps"] == best(9000 * traced, flops("dit-xs-4"))


def test_from_python_a_tie_in_sampling_goes_down(guests):
    request = make_request(backbone="dit-xs-4", protocol="digits", sampling={"guidance_scale": 1.5})
    reference = parse_sampling_reference("dit-xs-4@25")  # guided here, not there: 12.5 steps
    solved = matched(request, sampling=reference)
    assert solved.sampling.steps == (12,)
    assert solved.match_sampling[0].relative_error == pytest.approx(-0.04)
    assert solved.recipe == request.recipe and solved.match is None


def test_with_one_evaluation_a_step_a_search_is_the_exact_division():
    for part in range(1, 400):
        target = Fraction(part, 8)
        assert nearest_steps(target, lambda steps: steps) == max(1, nearest_count(target, 1))
    huge = Fraction(3 * 10**17 + 1, 2)
    assert nearest_steps(huge, lambda steps: steps) == nearest_count(huge, 1)


@pytest.mark.parametrize(
    "evaluations",
    [lambda steps: 2 * steps - 1, lambda steps: 3 * steps, lambda steps: steps + 5, lambda steps: 4 * (steps // 3) + 1],
)
def test_other_evaluations_are_searched_for_the_nearest(evaluations):
    for part in range(1, 300):
        target = Fraction(part, 4)
        nearest = min(range(1, 200), key=lambda steps: (abs(evaluations(steps) - target), steps))
        assert abs(evaluations(nearest_steps(target, evaluations)) - target) == abs(evaluations(nearest) - target)
    assert nearest_steps(Fraction(4), lambda steps: 2 * steps - 1) == 2  # 3 and 5 are as near: the fewer


def test_of_steps_with_as_many_evaluations_the_fewest_are_taken():
    evaluations = lambda steps: 4 * (steps // 3) + 1  # noqa: E731
    assert [nearest_steps(Fraction(part), evaluations) for part in (5, 6, 7, 8)] == [3, 3, 3, 6]


def test_steps_that_a_sampler_refuses_count_like_those_it_accepts(monkeypatch):
    """A sampler with two evaluations a step that takes whole strides only: matched to itself it takes the same steps."""

    def twice(task):
        registry.samplers.get("ddim-ldm").make(task)  # refuses what it refuses
        table = registry.samplers.get("dpm++-2s").make(task)
        assert len(table.times) == 2 * task.steps
        return table

    registry.samplers.names()
    for name, item in (("_items", SamplerSpec(name="twice", summary="", make=twice)), ("_owners", "the tests")):
        monkeypatch.setattr(registry.samplers, name, {**getattr(registry.samplers, name), "twice": item})
    request = make_request(backbone="dit-xs-4", protocol="digits", sampling={"sampler": "twice", "steps": (1,)})
    counts = evaluation_counts(request.recipe, request.sampling)
    assert [counts(steps) for steps in (1, 5, 7, 333, 500, 999, 1000, 1001)] == [2, 10, 14, 666, 1000, 1998, 2000, 2002]
    for steps in (1, 5, 10, 125, 500):
        solved = matched(request, sampling=parse_sampling_reference(f"dit-xs-4@{steps}"))
        assert solved.sampling.steps == (steps,) and solved.match_sampling[0].relative_error == 0


def test_evaluations_are_counted_for_every_number_of_steps(monkeypatch):
    """Those of the plan; in proportion where the sampler refuses; beyond the diffusion's steps as the last one's."""
    request = make_request(
        backbone="dit-xs-4", protocol="digits", settings={"diffusion_steps": "40"}, sampling={"steps": (8,)}
    )
    counts = evaluation_counts(request.recipe, request.sampling)
    assert [counts(steps) for steps in (1, 8, 40, 41, 400)] == [1, 8, 40, 41, 400]
    strides = dataclasses.replace(request.sampling, sampler="ddim-ldm")  # has no plan of 7 steps, nor of 40
    assert [evaluation_counts(request.recipe, strides)(steps) for steps in (7, 8, 40, 41)] == [7, 8, 40, 41]

    def twice(task):
        return registry.samplers.get("heun").make(task)

    registry.samplers.names()
    for name, item in (("_items", SamplerSpec(name="twice", summary="", make=twice)), ("_owners", "the tests")):
        monkeypatch.setattr(registry.samplers, name, {**getattr(registry.samplers, name), "twice": item})
    counts = evaluation_counts(request.recipe, dataclasses.replace(request.sampling, sampler="twice"))
    assert [counts(steps) for steps in (1, 8, 40, 41, 42)] == [1, 15, 79, 81, 83]


def test_the_table_of_a_budget_says_what_each_backbone_would_get(planned, guests, tmp_path):
    table = planned("--budget", "1e6")
    rows = {row["name"]: row for row in table["rows"]}
    denoisers = {spec.name for spec in registry.backbones if spec.kind == "denoiser"}
    assert {*rows, *(each["name"] for each in table["left_out"])} == denoisers and "judge" not in denoisers
    assert {"dit-xl-2", "dit-xs-2", "convmixer-64-4", "plain"} <= set(rows)
    assert (table["to"], table["gflops_target"], table["batch"], table["input"]) == (None, 1e6, BATCH, "8x8x1")
    assert rows["plain"]["steps"] == best(10**15, 10**6 * BATCH * 3) and rows["plain"]["params"] == 5
    assert rows["convmixer-64-4"]["gflops_source"] == "traced"
    for name in ("dit-xl-2", "dit-xs-4", "convmixer-64-4"):
        alone = planned("--backbone", name, "--budget", "1e6")
        row = rows[name]
        assert (row["steps"], row["images"]) == (alone["training"]["steps"], alone["training"]["images"])
        assert row["relative_error"] == alone["match"]["relative_error"]
        assert (row["params"], row["gflops"]) == (alone["params"], alone["gflops"])
        assert row["epochs"] == row["images"] / 1797
    again = planned("--match", "dit-xs-2@800", "--set", "batch=64")
    assert again["to"] == "dit-xs-2@800" and again["batch"] == 64
    assert {row["name"]: row["steps"] for row in again["rows"]}["dit-xs-2"] == 800


def test_the_table_names_what_does_not_fit_the_protocol(planned, tmp_path):
    (tmp_path / "six.toml").write_text(
        'name = "six"\ndataset = "npz"\nresolution = 6\nimage_channels = 1\nnum_classes = 2\ninput_size = 6\n'
        'in_channels = 1\nsamples = 100\nsuite = "embedded"\n'
    )
    table = planned("--budget", "1e6", "--protocol", str(tmp_path / "six.toml"))
    assert "dit-xl-2" in {row["name"] for row in table["rows"]}
    left_out = {each["name"]: each["reason"] for each in table["left_out"]}
    assert {"dit-xl-4", "dit-xl-8"} <= set(left_out) and "6" in left_out["dit-xl-4"]
    assert {row["epochs"] for row in table["rows"]} == {None}


def test_the_digits_have_as_many_images_as_the_table_counts():
    assert len(registry.datasets.get("digits").load().images) == registry.datasets.get("digits").images


def test_the_table_and_the_plan_in_words():
    done = CliRunner().invoke(plan.command, ["--budget", "1e5", "--protocol", "imagenet-256"], catch_exceptions=False)
    assert done.exit_code == 0
    line = next(line for line in done.output.splitlines() if line.startswith("dit-xl-2 "))
    assert line.split() == ["dit-xl-2", "674.83", "118.64", "1", "256", "0.0002", "-8.9", "%"]  # 91,114 of 100,000
    for budget, words in (("1e5", "1 step for the 100000 Gflops of --budget; rounding to whole steps: -8.9 %"),
                          ("6e4", "(one step costs more than that)")):  # fmt: skip
        arguments = ["--backbone", "dit-xl-2", "--protocol", "imagenet-256", "--budget", budget]
        assert words in CliRunner().invoke(group, ["run", *arguments]).output  # the group prints what is logged


def test_run_and_train_take_the_same_options(tmp_path):
    words = ["--backbone", "dit-b-2", "--protocol", "imagenet-256", "--match", "dit-xl-2@400k"]
    done = CliRunner().invoke(group, ["run", *words, "--match-sampling", "dit-xl-2@16,32@cfg1.5"])
    assert isinstance(done.exception, UserError) and "missing" in done.output  # no ImageNet here: the plan comes first
    steps = best(400_000 * flops("dit-xl-2", num_classes=1000), flops("dit-b-2", num_classes=1000))
    assert f"{steps:,} steps for the" in done.output and "dit-xl-2@32@cfg1.5" in done.output

    words = ["--backbone", "dit-xs-4", "--set", "batch=8", "--precision", "float32", "--micro-batch", "8"]
    folder = tmp_path / "run"
    done = CliRunner().invoke(
        train.command, [*words, "--match", "dit-xs-2@2", "--out", str(folder)], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    assert len((folder / "log.jsonl").read_text().splitlines()) == best(2 * flops("dit-xs-2"), flops("dit-xs-4")) == 7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name a --backbone, or give --budget"),
        (["--backbone", "dit-xs-4", "--match", "dit-xs-2@9", "--budget", "1e3"], "--match and --budget both set"),
        (["--backbone", "dit-xs-4", "--steps", "9", "--budget", "1e3"], "--steps and --budget both set"),
        (["--backbone", "dit-xs-4", "--steps", "9", "--match", "dit-xs-2@9"], "--steps and --match both set"),
        (["--backbone", "dit-xs-4", "--set", "steps=9", "--match", "dit-xs-2@9"], "--match and --set steps both set"),
        (["--backbone", "dit-xs-4", "--steps", "9", "--match", "dit-xs-2@9", "--budget", "1"], "all set the training"),
        (
            ["--backbone", "dit-xs-4", "--sampling-steps", "9", "--match-sampling", "dit-xs-2@9"],
            "--sampling-steps and --match-sampling both set the sampling steps",
        ),
        (["--backbone", "dit-xs-4", "--match", "dit-xs2@9"], "--match dit-xs2@9: unknown backbone 'dit-xs2'; did you"),
        (["--backbone", "dit-xs-4", "--match", "judge@9"], "--match judge@9: 'judge' is not a denoiser"),
        (["--backbone", "dit-xs-4", "--match-sampling", "plain@9@cfg2"], "no null label"),
        (["--backbone", "plain", "--cfg", "2", "--match-sampling", "dit-xs-2@9"], "no null label"),
        (["--backbone", "dit-xs-4", "--match-sampling", "dit-xs-2@1001"], "more sampling steps than the 1000"),
        (["--backbone", "dit-xs-4", "--budget", "1e300"], "give a smaller budget"),
        (["--budget", "1e6", "--cfg", "2"], "--cfg has no part in the table"),
        (["--budget", "1e6", "--steps", "5"], "--steps and --budget both set"),
        (["--budget", "1e6", "--match-sampling", "dit-xs-2@9"], "--match-sampling has no part in the table"),
    ],
)
def test_what_cannot_be_matched_is_refused_in_one_line(guests, words, message):
    with pytest.raises(UserError) as refusal:
        CliRunner().invoke(plan.command, words, catch_exceptions=False)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_sampling_steps_that_cannot_be_had_are_refused_with_the_bounds():
    few, many = flops("dit-xs-4"), flops("dit-xl-2")

    def solve(name, text):
        request = make_request(backbone=name, protocol="digits")
        return matched(request, sampling=parse_sampling_reference(text))

    most = next(n for n in range(DIFFUSION) if (n + 1) * many > DIFFUSION * few)
    with pytest.raises(UserError, match=f"has 1000, which cost at most dit-xl-2@{most}$"):
        solve("dit-xs-4", "dit-xl-2@250")
    assert solve("dit-xs-4", f"dit-xl-2@{most}").sampling.steps == (best(most * many, few),)
    least = next(n for n in range(1, DIFFUSION) if n * few >= many)
    with pytest.raises(UserError, match=f"less than half a sampling step of 'dit-xl-2'.*dit-xs-4@{least}$"):
        solve("dit-xl-2", "dit-xs-4@10")
    assert solve("dit-xl-2", f"dit-xs-4@{least}").sampling.steps == (1,)


@pytest.mark.parametrize(
    ("text", "gflops"), [("1e12", 1e12), ("3.2e9", 3.2e9), ("400k", 4e5), ("7M", 7e6), ("0.5", 0.5), ("12", 12)]
)
def test_budgets_are_read_as_numbers(text, gflops):
    assert parse_budget(text) == gflops


@pytest.mark.parametrize(
    ("flag", "text"),
    [("--budget", text) for text in ("", "0", "-1e9", "nan", "inf", "1e999", "lots", "k", "1e12G")]
    + [("--match", text) for text in ("dit-xl-2", "dit-xl-2@", "@400k", "dit-xl-2@0", "dit-xl-2@1.5", "a@b@3")]
    + [("--match", text) for text in ("dit-xl-2@inf", "dit-xl-2@-4", "dit-xl-2@250@cfg1.5", "")]
    + [("--match-sampling", f"dit-xl-2{text}") for text in ("", "@", "@0", "@16,", "@16@1.5", "@16@cfg", "@16@cfg0.5")]
    + [("--match-sampling", text) for text in ("dit-xl-2@16@cfgnan", "dit-xl-2@16@cfg2@3", "@16")],
)
def test_what_cannot_be_read_is_said(flag, text):
    done = CliRunner().invoke(plan.command, ["--backbone", "dit-xs-4", f"{flag}={text}"])
    assert done.exit_code == 2 and f"Invalid value for '{flag}'" in done.output, done.output
    assert done.exception is None or isinstance(done.exception, SystemExit)


def test_references_are_read():
    assert parse_reference("dit-xl-2@400k") == Reference(backbone="dit-xl-2", steps=(400_000,))
    several = parse_sampling_reference("dit-xl-2@64, 16,32@cfg1.5")
    assert several == Reference(backbone="dit-xl-2", steps=(16, 32, 64), guidance_scale=1.5)
    assert several.name(16) == "dit-xl-2@16@cfg1.5"


def test_protocol_digits_is_what_these_tests_take_it_for():
    task = get_protocol("digits")
    assert (task.recipe.batch, task.recipe.diffusion_steps, task.recipe.steps) == (BATCH, DIFFUSION, 800)
