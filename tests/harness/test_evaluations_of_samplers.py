"""A sampler that asks its network more than once a step: what it costs is what its plan says, wherever that is told."""

import json

import pytest
import tiny_suite
import torch
from click.testing import CliRunner

from harness import registry
from harness.cli import group
from harness.data.digits import load
from harness.diffusion.samplers import SamplerSpec
from harness.runs.samples import write_samples

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


@pytest.fixture(scope="module", autouse=True)
def plugins():
    """The sampler, as an entry point of `harness.samplers` would bring it, and a suite that takes no time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    spec = SamplerSpec(name="two-a-step", summary="two evaluations a step, but one in the last", make=make)
    registry.samplers.register(spec, "the tests")
    with tiny_suite.registered():
        yield
    del registry.samplers._items[spec.name], registry.samplers._owners[spec.name]
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
