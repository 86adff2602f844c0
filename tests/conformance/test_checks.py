"""The conformance suite: a good network passes, and each broken one fails at the check that names its fault."""

import dataclasses
import json

import broken_networks as networks
import pytest
from click.testing import CliRunner

from harness import registry
from harness.cli import group
from harness.conformance.checks import ALL, run_checks
from harness.conformance.suite import check_backbone, check_quickly, subject_of
from harness.errors import UserError


def findings(spec, checks=None):
    return list(
        run_checks(
            subject_of(spec, "torch", {}), checks or {k: v for k, v in ALL["torch"].items() if k != "torch.compile"}
        )
    )


def test_a_good_network_passes():
    found = findings(networks.spec_of(networks.Good), ALL["torch"])
    assert [each for each in found if each.status == "failed"] == []
    assert {each.check for each in found} == set(ALL["torch"])
    assert {each.check for each in found if each.status == "note"} == {"compute"}  # traced


@pytest.mark.parametrize(
    ("network", "check", "message"),
    [
        (networks.WrongChannels, "output", "shape (3, 4, 8, 8), came (3, 3, 8, 8)"),
        (networks.IgnoresOutChannels, "other sizes", "shape (3, 4, 8, 8), came (3, 6, 8, 8) with in_channels 3"),
        (networks.IgnoresTime, "image, time and label matter", "depends on t"),
        (networks.IgnoresLabel, "image, time and label matter", "depends on y"),
        (networks.WritesIntoImage, "inputs stay as they are", "a changed x"),
        (networks.WritesIntoLabel, "inputs stay as they are", "a changed y"),
        (networks.Random, "the same output twice", "random"),
        (networks.IdleParameter, "gradients", "came none for 1, such as idle"),
        (networks.Complex, "gradients", "expected real parameters, came complex64 of twist: keep it as a float32"),
        (networks.HalfFrozen, "gradients", "such as into.weight: make what is fixed a buffer"),
        (networks.Float64, "output", "expected float32 from float32 inputs, came float64"),
        (networks.BatchNorm, "images do not depend on each other", "batch norm"),
        (networks.BatchMean, "images do not depend on each other", "over the batch"),
        (networks.NoRowForNull, "null label", "null label 5 to be known"),
        (networks.Tuple, "output", "expected one tensor from forward, came a tuple"),
        (networks.WithoutArguments, "builder", "unexpected keyword argument 'input_size'"),
        (networks.OneSize, "other sizes", "RuntimeError"),
        (networks.HiddenState, "save and load", "neither parameter nor buffer"),
        (networks.NotFinite, "output", "NaN or infinity"),
        (networks.DropoutAlways, "the same output twice", "something random works outside training"),
        (networks.TimeOfTheFirst, "images do not depend on each other", "taken from one of its images"),
        (networks.SumOverBatch, "images do not depend on each other", "summed or normalised over the batch"),
        (networks.NullIsClassZero, "null label", "than for class 0"),
        (networks.KeepsAside, "memory", "keep tensors with ctx.save_for_backward"),
        (networks.Detached, "images do not depend on each other", "is it detached?"),
    ],
)
def test_a_fault_is_named(network, check, message):
    found = findings(networks.spec_of(network))
    failed = {each.check: each.message for each in found if each.status == "failed"}
    assert message in failed[check], failed
    assert all("\n" not in each.message for each in found)


@pytest.mark.parametrize(
    ("network", "check", "message"),
    [
        (networks.OtherInTraining, "training and sampling mode", "something else in training"),
        (networks.LogOfTime, "fractional times", "for negative t"),
        (networks.IntegerTimes, "fractional times", "takes timesteps only"),
        (networks.KnowsNoBfloat16, "bfloat16", "my_kernel is not implemented for BFloat16"),
    ],
)
def test_a_limitation_is_a_remark(network, check, message):
    (found,) = [each for each in findings(networks.spec_of(network)) if each.check == check]
    assert found.status == "note" and message in found.message


def test_a_network_that_chooses_by_label_passes():
    assert [each for each in findings(networks.spec_of(networks.TwoExperts)) if each.status == "failed"] == []


def test_training_compute_of_masked_training_is_counted_apart():
    tokens, width = 64, 8
    spec = networks.spec_of(networks.Masked, masked_training=True)
    compute, around = spec.count(), 2 * width + tokens * width * (2 + 4)
    assert compute.flops == around + tokens * width * width
    assert compute.in_training.flops == around + tokens // 2 * width * width
    found = findings(spec)
    assert [each for each in found if each.status == "failed"] == []
    (remark,) = [each.message for each in found if each.check == "compute"]
    assert "masked training: " in remark and "in sampling" in remark
    assert not any(each.message for each in found if each.check == "training and sampling mode")

    def failed(**fields):
        found = findings(networks.spec_of(networks.Masked, **fields))
        return [each.message for each in found if each.check == "compute" and each.status == "failed"]

    (message,) = failed()
    assert "give the spec masked_training=True" in message
    stated = lambda **arguments: dataclasses.replace(compute, training=compute)  # noqa: E731
    (message,) = failed(closed_form=stated, masked_training=True)
    assert "in Compute.training of the closed form" in message


def test_stochastic_depth_is_of_each_image():
    found = findings(networks.spec_of(networks.SkipsForTheBatch))
    (message,) = [each.message for each in found if each.check == "compute" and each.status == "failed"]
    assert (
        "expected the same flops at each call in training mode, came 27,664 to 64,528: for stochastic depth" in message
    )
    assert "masked_training" not in message
    found = findings(networks.spec_of(networks.SkipsImages))
    assert [each for each in found if each.status == "failed"] == []
    (remark,) = [each.message for each in found if each.check == "training and sampling mode"]
    assert "right for dropout and stochastic depth" in remark


def test_a_network_states_the_form_of_its_time():
    for form in ("unit", "log-sigma"):
        found = findings(networks.spec_of(networks.FloatTime, time=form))
        assert [each for each in found if each.status == "failed"] == []
        assert not any(each.message for each in found if each.check == "fractional times")
    failures = {each.check for each in findings(networks.spec_of(networks.FloatTime)) if each.status == "failed"}
    assert "output" in failures


def test_specs_that_do_not_fit_their_network():
    def failed(**fields):
        found = findings(networks.spec_of(networks.Good, **fields))
        return {each.check: each.message for each in found if each.status == "failed"}

    assert "from closed_form of the spec" in failed(closed_form=networks.half_of_the_flops)["compute"]
    assert "null label 7 to be known" in failed(null_label=7)["null label"]
    assert "is one of the 5 classes" in failed(null_label=2)["null label"]
    assert "KeyError: 'input_size'" in failed(defaults={})["builder"] or "missing" in failed(defaults={})["builder"]
    none = findings(networks.spec_of(networks.Good, null_label=None))
    assert ["no null label" in each.message for each in none if each.check == "null label"] == [True]


def test_the_quick_checks_refuse_in_one_line():
    check_quickly(networks.spec_of(networks.Good), "torch", {})
    with pytest.raises(
        UserError, match=r"'on-trial' fails the check 'images do not .*: harness check on-trial"
    ) as error:
        check_quickly(networks.spec_of(networks.BatchMean), "torch", {})
    assert "\n" not in str(error.value)


def test_the_command(monkeypatch):
    registry.backbones.names()  # loads it, so that what is restored is whole
    monkeypatch.setattr(registry.backbones, "_items", {**registry.backbones._items})
    monkeypatch.setattr(registry.backbones, "_owners", {**registry.backbones._owners})
    registry.backbones.register(networks.spec_of(networks.Good, "good"))
    registry.backbones.register(networks.spec_of(networks.Random, "random"))
    done = CliRunner().invoke(group, ["check", "good", "--json"])
    assert done.exit_code == 0
    document = json.loads(done.stdout)
    assert document["from"] == "this process" and len(document["findings"]) == len(ALL["torch"])
    done = CliRunner().invoke(group, ["check", "random"])
    assert done.exit_code == 1 and "FAILED torch: the same output twice" in done.stdout
    done = CliRunner().invoke(group, ["check", "good", "--framework", "jax"])
    assert isinstance(done.exception, UserError) and "not implemented for 'jax'" in str(done.exception)


SMALL = {"input_size": 8, "in_channels": 1, "num_classes": 10, "low_res_size": 4}
BUILT_IN = {  # few and narrow blocks: what the classes do does not depend on their size
    "dit-xs-2": {"depth": 2, "width": 48, "heads": 4},
    "dit-xs-2-in-context": {"depth": 2, "width": 48, "heads": 4},
    "dit-xs-2-cross-attention": {"depth": 2, "width": 48, "heads": 4},
    "dit-xs-2-adaln": {"depth": 2, "width": 48, "heads": 4},
    "adm-xs": {"width": 32, "multipliers": (1, 2), "res_blocks": 1, "head_channels": 16, "attention_resolutions": (8, 4)},
    "ldm-xs": {"width": 32, "multipliers": (1, 2), "res_blocks": 1, "head_channels": 16, "attention_rates": (2,), "context_width": 24},
    "adm-u-xs": {"width": 32, "multipliers": (1, 2), "res_blocks": 1, "head_channels": 16, "attention_resolutions": (4,)},
    "adm-classifier-xs": {"width": 32, "multipliers": (1, 2), "res_blocks": 1, "head_channels": 16, "attention_resolutions": (4,)},
}  # fmt: skip


@pytest.mark.parametrize("frameworks", [("torch",), pytest.param(("torch", "jax"), marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name",
    [
        "dit-xs-2",
        "ldm-xs",
        *(pytest.param(n, marks=pytest.mark.slow) for n in BUILT_IN if n not in ("dit-xs-2", "ldm-xs")),
    ],
)
def test_built_in_networks_pass(name, frameworks):
    spec = registry.backbones.get(name)
    small = {name: value for name, value in {**SMALL, **BUILT_IN[name]}.items() if name in spec.defaults}
    found = list(check_backbone(spec, frameworks, small))
    assert [each for each in found if each.status == "failed"] == []
    assert len(frameworks) == 1 or found[-1].check == "the same network"
