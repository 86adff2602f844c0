"""The packages in examples/: each registers its backbones, passes the conformance suite, and is in the study beside DiT."""

import importlib
import tomllib
from pathlib import Path

import pytest

from harness import registry
from harness.conformance.checks import ALL, run_checks
from harness.conformance.suite import check_backbone, subject_of
from harness.studies import load
from harness.studies.expand import expand

ROOT = Path(__file__).parents[2]
PACKAGES = sorted(path.parent for path in ROOT.glob("examples/*/pyproject.toml"))
SMALL = {"input_size": 8, "in_channels": 1, "num_classes": 10}


def specs_of(package, monkeypatch):
    """The specs that the package's entry point leads to."""
    monkeypatch.syspath_prepend(package / "src")
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    assert project["name"] == package.name
    ((_, target),) = project["entry-points"]["harness.backbones"].items()
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def smallest(specs):
    return next(spec for spec in specs if "-2xs-" in spec.name)


def test_there_are_packages():
    assert {"u-vit", "gated-conv", "jit-like", "sit"} <= {package.name for package in PACKAGES}


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_a_small_network_of_the_package_does_what_the_harness_relies_on(package, monkeypatch):
    spec = smallest(specs_of(package, monkeypatch))
    checks = {name: check for name, check in ALL["torch"].items() if name != "torch.compile"}
    found = list(run_checks(subject_of(spec, "torch", SMALL), checks))
    assert len(found) == len(checks) and [each for each in found if each.status == "failed"] == []


@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_all_networks_of_the_package_in_all_frameworks(package, monkeypatch):
    for spec in specs_of(package, monkeypatch):
        sizes = {**SMALL, "input_size": max(8, spec.defaults["patch"])}
        found = list(check_backbone(spec, list(spec.builders), sizes))
        assert [each for each in found if each.status == "failed"] == [], spec.name


def test_the_study_gives_all_of_them_the_compute_of_a_dit(monkeypatch):
    for package in PACKAGES:
        for spec in specs_of(package, monkeypatch):
            if spec.name not in registry.backbones:
                monkeypatch.setitem(registry.backbones._items, spec.name, spec)
    study = expand(load(ROOT / "studies" / "examples.toml"))
    gflops = {run.spec.backbone: run.steps * run.gflops_step for run in study.runs}
    assert set(gflops) > {"dit-2xs-2", "adm-2xs", "ldm-2xs"} and len(gflops) == 3 + len(PACKAGES)
    assert max(gflops.values()) < 1.02 * min(gflops.values())
