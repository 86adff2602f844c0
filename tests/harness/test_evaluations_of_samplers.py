"""A sampler that asks its network more than once a step: what it costs is what its plan says, wherever that is told."""

import json
import math

import pytest
import tiny_suite
import torch
from click.testing import CliRunner

from harness import registry
from harness.cli import group
from harness.data.digits import load
from harness.diffusion.guidance_rules import GuidanceRule
from harness.diffusion.samplers import SamplerSpec
from harness.runs.samples import write_samples
from reports.deviations import has_other_guidance
from reports.texts import guidance_text
from results.store import load as load_records

PROTOCOL = """
name = "few-digits"
dataset = "npz"
resolution = 8
image_channels = 1
num_classes = 10
input_size = 8
in_channels = 1
samples = 100
suite = "tiny"
[recipe]
batch = 8
flip = false
[sampling]
steps = [4]
sampler = "two-a-step"
clip_denoised = true
guidance_channels = "all"
"""
FIXED = ("--data", "digits.npz", "--precision", "float32", "--micro-batch", "8", "--device", "cpu")


def evaluations(steps):
    """Of Heun's rule, whose last step asks once."""
    return 2 * steps - 1


def make(task):
    """Heun's table."""
    return registry.samplers.get("heun").make(task)


# a rule that does not ask the network without a label
RULE = GuidanceRule(name="labelled", combine=lambda image, _, scale, sigma, xp: image / scale, evaluations=1)


@pytest.fixture(scope="module", autouse=True)
def plugins():
    """The sampler, as an entry point of `harness.samplers` would bring it, and a suite that takes no time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    spec = SamplerSpec(name="two-a-step", summary="two evaluations a step, but one in the last", make=make)
    registry.samplers.register(spec, "the tests")
    registry.guidance_rules.register(RULE, "the tests")
    with tiny_suite.registered():
        yield
    del registry.samplers._items[spec.name], registry.samplers._owners[spec.name]
    del registry.guidance_rules._items[RULE.name], registry.guidance_rules._owners[RULE.name]
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Some digits and a protocol of them, in the working directory."""
    monkeypatch.chdir(tmp_path)
    digits = load()
    write_samples(tmp_path / "digits.npz", [digits.images[:150]], digits.labels[:150], {})
    (tmp_path / "few-digits.toml").write_text(PROTOCOL)
    return tmp_path


def harness(*words):
    result = CliRunner().invoke(group, [str(each) for each in words])
    assert result.exit_code == 0, (result.exception, result.output)
    return result.stdout


def planned(*words, backbone="dit-xs-4"):
    task = ("--backbone", backbone, "--protocol", "few-digits.toml", *FIXED)
    return json.loads(harness("plan", *task, *words, "--json"))


@pytest.mark.parametrize(("guidance", "factor"), [((), 1), (("--cfg", "1.5"), 2)])
def test_a_plan_counts_what_the_sampler_says(guidance, factor):
    found = planned("--sampling-steps", "1,4,10", *guidance)
    counted = {each["steps"]: each["gflops_per_image"] for each in found["sampling"]}
    expected = {steps: found["gflops"] * calls * factor for steps, calls in ((1, 1), (4, 7), (10, 19))}
    assert counted == pytest.approx(expected)
    assert [each["gflops"] for each in found["sampling"]] == pytest.approx(
        [100 * expected[steps] for steps in (1, 4, 10)]
    )


def test_samplers_of_one_evaluation_a_step_cost_what_they_did():
    for sampler in ("ddpm", "ddim"):
        found = planned("--sampler", sampler, "--sampling-steps", "10")
        assert found["sampling"][0]["gflops_per_image"] == pytest.approx(10 * found["gflops"])


def test_steps_are_solved_for_what_both_sides_ask(home):
    """The other backbone is taken to be sampled with the sampler of this one, as it is trained with its recipe."""
    own, other = planned(), planned(backbone="dit-xs-2")
    asked = {4: 7, 25: 49}  # steps of dit-xs-2 and its evaluations
    found = planned("--match-sampling", "dit-xs-2@4,25")
    assert len(found["match_sampling"]) == len(found["sampling"]) == 2
    for match, drawn, (steps, calls) in zip(found["match_sampling"], found["sampling"], asked.items(), strict=True):
        target = other["gflops"] * calls
        nearest = min(range(1, 400), key=lambda each: abs(own["gflops"] * (2 * each - 1) - target))
        assert match["to"] == f"dit-xs-2@{steps}" and match["steps"] == drawn["steps"] == nearest
        assert match["gflops_target"] == pytest.approx(target)
        spent = own["gflops"] * (2 * nearest - 1)
        assert match["gflops"] == pytest.approx(spent) and drawn["gflops_per_image"] == pytest.approx(spent)
        assert match["relative_error"] == pytest.approx(spent / target - 1)


@pytest.fixture
def flow(home):
    """The protocol with networks of flow, whose noise levels are t / (1 - t) for t = 1, 1 - 1 / steps, ..., 1 / steps."""
    text = PROTOCOL.replace("[recipe]", '[recipe]\nobjective = "velocity"\nschedule = "flow"')
    (home / "few-digits.toml").write_text(text)


def test_an_interval_counts_its_rows_twice_wherever_it_is_told(flow, home):
    """Steps at t = 1, 3/4, 1/2, 1/4; Heun asks at all but the first twice: sigma inf, 3, 3, 1, 1, 1/3, 1/3."""
    plain = planned("--sampling-steps", "4", "--steps", "1")
    found = planned("--sampling-steps", "4", "--steps", "1", "--cfg", "1.5@0.5-5")
    assert found["sampling"][0]["gflops_per_image"] == pytest.approx(11 * found["gflops"])
    assert found["sampling"][0]["guidance_interval"] == "0.5-5" and "guidance_interval" not in plain["sampling"][0]
    matched = planned("--cfg", "1.5@0.5-5", "--match-sampling", "dit-xs-4@4@cfg1.5")
    (match,) = matched["match_sampling"]
    assert match["gflops_target"] == pytest.approx(14 * found["gflops"])
    counts = {steps: asked_within(steps, 0.5, 5) for steps in range(1, 20)}
    assert match["steps"] == min(counts, key=lambda steps: (abs(counts[steps] - 14), steps))
    same = planned("--cfg", "1.5@0.5-5", "--match-sampling", "dit-xs-4@4@cfg1.5@0.5-5")
    assert same["match_sampling"][0]["relative_error"] == 0 and same["sampling"] == found["sampling"]

    (home / "one.toml").write_text(
        'protocol = "few-digits.toml"\nbackbones = ["dit-xs-4"]\nbudgets = { steps = [1] }\ndata = "digits.npz"\n'
        'precision = "float32"\nmicro_batch = 8\ndevice = "cpu"\n[sampling]\nsteps = [4]\n'
        'guidance_scales = ["1.5@0.50-5", 1.5]\n'
    )
    (run,) = json.loads(harness("study", "one.toml", "--status", "--json"))["runs"]
    (_, *words), (_, *without) = run["commands"]
    assert words[words.index("--cfg") + 1] == "1.5@0.5-5" and without[without.index("--cfg") + 1] == "1.5"
    for each in (words, without):
        harness(*each)
    (path,) = home.glob("runs/*/records.jsonl")
    parts = [json.loads(line)["sampling"] for line in path.read_text().splitlines()]
    stated = {part.get("guidance_interval"): part for part in parts}
    assert stated.keys() == {None, "0.5-5"}
    assert [stated[each]["evaluations"] for each in (None, "0.5-5")] == [14, 11]
    assert stated["0.5-5"]["gflops_per_image"] == found["sampling"][0]["gflops_per_image"]
    folders = {each.name.rpartition("-")[0] for each in path.parent.glob("samples/*")}
    assert folders == {"step1-two-a-step4-cfg1.5-n100", "step1-two-a-step4-cfg1.5@0.5-5-n100"}
    identity = json.loads(next(path.parent.glob("samples/*@*/samples.json")).read_text())["identity"]
    assert identity["sampling"]["guidance_interval"] == "0.5-5"
    (before,) = path.parent.glob("samples/*cfg1.5-n*/samples.json")
    assert "guidance_interval" not in json.loads(before.read_text())["identity"]["sampling"]


def asked_within(steps, low, high):
    """Evaluations of Heun's rule on the uniform grid of flow, those with low <= sigma <= high counted twice."""
    times = [1 - (k + 1) // 2 / steps for k in range(2 * steps - 1)]
    return len(times) + sum(low <= (t / (1 - t) if t < 1 else math.inf) <= high for t in times)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--cfg", "1.5@20-30"), "guides none of the 4 two-a-step steps"),
        (("--cfg", "1.5@3"), "is not an interval of noise levels"),
        (("--cfg", "1@0.1-3"), "the scale 1 is no guidance"),
        (("--cfg", "0.5@0.1-3"), "below 1"),
        (("--cfg", "2@0.1-3", "--set", "label_dropout=0"), "label dropout"),
        (("--cfg", "2:labelled", "--match-sampling", "dit-xs-4@4@cfg1.5:labelled"), "is not of the form"),
        (("--cfg", "1.5:nothing"), "unknown guidance rule 'nothing'"),
        (("--cfg", "1:labelled"), "the scale 1 is no guidance, so it has no rule"),
    ],
)
def test_intervals_are_refused_before_training(words, message, flow, home):
    task = ("--backbone", "dit-xs-4", "--protocol", "few-digits.toml", *FIXED, "--steps", "1")
    done = CliRunner().invoke(group, ["run", *task, *words])
    said = f"{done.exception} {done.output}"
    assert done.exit_code != 0 and message in said and not (home / "runs").exists()


def test_a_rule_counts_the_evaluations_that_it_declares(flow, home):
    """One a guided row here, without label dropout; it is told in plans, studies, sample sets, records and tables."""
    words = ("--sampling-steps", "4", "--steps", "1", "--set", "label_dropout=0")
    found = planned(*words, "--cfg", "1.5:labelled@0.5-5")
    assert found["sampling"][0]["gflops_per_image"] == pytest.approx(7 * found["gflops"])
    assert found["sampling"][0]["guidance_rule"] == "labelled" and "guidance_rule" not in planned(*words)["sampling"][0]
    (home / "one.toml").write_text(
        'protocol = "few-digits.toml"\nbackbones = ["dit-xs-4"]\nbudgets = { steps = [1] }\ndata = "digits.npz"\n'
        'precision = "float32"\nmicro_batch = 8\ndevice = "cpu"\n[sampling]\nsteps = [4]\n'
        'guidance_scales = ["1.5:labelled", 1.5]\n'
    )
    (run,) = json.loads(harness("study", "one.toml", "--status", "--json"))["runs"]
    (_, *ruled), (_, *plain) = run["commands"]
    assert ruled[ruled.index("--cfg") + 1] == "1.5:labelled" and plain[plain.index("--cfg") + 1] == "1.5"
    harness(*ruled)
    (path,) = home.glob("runs/*/records.jsonl")
    record = load_records([path]).records[0]
    assert (record.sampling.guidance_rule, record.sampling.evaluations) == ("labelled", 7)
    assert guidance_text(record) == "1.5:labelled (all)" and has_other_guidance(record)
    (folder,) = path.parent.glob("samples/*")
    assert folder.name.startswith("step1-two-a-step4-cfg1.5_labelled-n100-")
    identity = json.loads((folder / "samples.json").read_text())["identity"]
    assert identity["sampling"]["guidance_rule"] == "labelled"


def test_records_studies_and_plans_tell_one_number(home):
    (home / "one.toml").write_text(
        'protocol = "few-digits.toml"\nbackbones = ["dit-xs-4"]\nbudgets = { steps = [1] }\ndata = "digits.npz"\n'
        'precision = "float32"\nmicro_batch = 8\ndevice = "cpu"\n[sampling]\nsteps = [4]\nguidance_scales = [1.5]\n'
    )
    (run,) = json.loads(harness("study", "one.toml", "--status", "--json"))["runs"]
    found = planned("--cfg", "1.5", "--steps", "1")
    ((_, *words),) = run["commands"]
    harness(*words)
    (path,) = home.glob("runs/*/records.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert {each["metric"] for each in records} == {"fd", "precision"}
    assert {each["sampling"]["evaluations"] for each in records} == {14}
    (cost,) = {each["sampling"]["gflops_per_image"] for each in records}
    assert cost == pytest.approx(14 * found["gflops"])
    assert found["sampling"][0]["gflops_per_image"] == pytest.approx(cost)
    assert run["gflops_left"] == pytest.approx(found["training"]["gflops"] + 100 * cost)
