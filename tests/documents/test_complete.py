"""What a user may rely on is documented: public names, entry points, and each field of the objects behind them."""

import dataclasses

import pytest
from blocks import ROOT

import harness
from evaluators.features import FeatureSpec
from evaluators.metrics import METRICS, Metric
from evaluators.suites import Suite
from harness import registry
from harness.autoencoders.tokenizer import Tokenizer
from harness.cli import COMMANDS
from harness.data import DatasetSpec
from harness.diffusion.auxiliary import AuxiliaryLoss
from harness.diffusion.guidance_rules import GuidanceRule
from harness.diffusion.objectives import Objective, TwoTimes
from harness.diffusion.samplers import SamplerSpec
from harness.plugins.hook import Hook
from harness.protocols import Protocol
from harness.spec import BackboneSpec
from harness.systems.spec import Component

DOCS = ROOT / "docs"
DOORS = {
    "backbones": BackboneSpec, "objectives": Objective, "samplers": SamplerSpec, "guidance": GuidanceRule, "metrics": Metric,
    "features": FeatureSpec, "suites": Suite, "datasets": DatasetSpec, "auxiliary-losses": AuxiliaryLoss,
    "autoencoders": Tokenizer, "services": Hook,
}  # fmt: skip
OTHERWISE = {"protocols": (Protocol, {"summary", "recipe", "sampling"}), "systems": (Component, {
    "diffusion_steps", "noise_scale", "truncation"})}  # fmt: skip


def text(name):
    return (DOCS / name).read_text(encoding="utf-8")


BESIDE = {"two-times": TwoTimes}  # a field of another door's object


@pytest.mark.parametrize("page", [*DOORS, *OTHERWISE, *BESIDE])
def test_each_field_is_in_the_contract_of_its_page(page):
    of, left_out = OTHERWISE.get(page, ((DOORS | BESIDE).get(page), set()))
    missing = {field.name for field in dataclasses.fields(of)} - left_out
    missing = {name for name in missing if f"`{name}`" not in text(f"doors/{page}.md")}
    assert not missing, f"docs/doors/{page}.md says nothing of {sorted(missing)}"


def test_each_group_of_entry_points_has_a_page():
    groups = {each.group for each in vars(registry).values() if isinstance(each, registry.Registry)}
    assert len(groups) == len(DOORS) + len(OTHERWISE) + 2  # loggers, launchers and figures have one page
    for group in groups:
        assert f"| `{group}` |" in text("doors/index.md"), group


def test_public_names_commands_and_metrics_are_documented():
    for name in set(harness.__all__) - {"__version__"}:
        assert f":: harness.{name}\n" in text("reference/api.md"), name
    for command in set(COMMANDS) - {"train", "sample", "evaluate"}:
        assert f"`harness {command}" in text("reference/commands.md"), command
    metrics = text("numbers/metrics.md").lower()
    for metric in METRICS.values():
        assert metric.key in metrics or metric.title.lower() in metrics, metric.key
