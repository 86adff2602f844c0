"""`harness check`: the conformance suite of backbones."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from harness import registry
from harness.cli.flags_from_settings import PATH, TEXT, json_option, plugin_option
from harness.errors import UserError
from harness.io.progress import Bar
from harness.spec import FRAMEWORKS, BackboneSpec


@click.command("check")
@click.argument("name", metavar="BACKBONE|FILE.py|RUN")
@click.option(
    "--framework", type=click.Choice(FRAMEWORKS), help="[default: all that the backbone has and are installed]"
)
@click.option(
    "--protocol",
    type=TEXT,
    metavar="NAME|FILE.toml",
    help="Check at the input of this protocol. [default: the backbone's own input]",
)
@plugin_option
@click.option(
    "--convergence", is_flag=True,
    help="Check a RUN: whether loss and distances go as those of healthy seeds, by a two-sided test.",
)  # fmt: skip
@click.option(
    "--reference-point", type=PATH, metavar="FILE",
    help="For --convergence: a point of several seeds. [default: the packaged one of backbone and protocol]",
)  # fmt: skip
@json_option
def command(
    name: str,
    framework: str | None,
    protocol: str | None,
    convergence: bool,
    reference_point: Path | None,
    as_json: bool,
) -> None:
    """Check that a backbone does what training, sampling and counting rely on. Exit code 1 if a check fails.

    Among others: shapes over sizes, channels and classes; no image depends on its batch; label and time matter; every
    parameter gets a gradient; saving and loading; the closed form of its compute against the traced count; torch against
    JAX. Built-in backbones pass the same checks. FILE.py: all backbones of a plug-in file (--plugin); --json is then a
    list.

    With --convergence, check that a RUN is neither worse nor suspiciously better than other seeds of its experiment.
    """
    if convergence:
        _check_convergence(Path(name), reference_point, as_json)
        return
    if reference_point is not None:
        raise UserError("--reference-point belongs to --convergence")
    of_file = name.endswith(".py")
    specs = _backbones_of(Path(name)) if of_file else [registry.backbones.get(name)]
    documents = [_check(spec, framework, protocol, as_json) for spec in specs]
    if as_json:
        click.echo(json.dumps(documents if of_file else documents[0], indent=2))
    if any(found["status"] == "failed" for document in documents for found in document["findings"]):
        raise SystemExit(1)


def _backbones_of(path: Path) -> list[BackboneSpec]:
    """The backbones of a plug-in file, which is loaded."""
    from harness.plugins.files import load_plugin

    code = load_plugin(path)
    specs = [spec for spec in registry.backbones if registry.backbones.code_file(spec.name) == code.file]
    if not specs:
        raise UserError(f"{path} has no backbone, and `harness check` checks backbones; assign its specs to BACKBONES")
    return specs


def _check(spec: BackboneSpec, framework: str | None, protocol: str | None, as_json: bool) -> dict[str, Any]:
    """Check one backbone, and print the findings unless they go to JSON; returns its document."""
    from harness.conformance.suite import check_backbone, count_checks
    from harness.frameworks.installed import check_installed
    from harness.protocols import get_protocol
    from harness.runs.run import build_arguments

    name = spec.name
    frameworks = [framework] if framework else [each for each in FRAMEWORKS if each in spec.builders and _has(each)]
    if not frameworks:
        raise UserError(f"backbone {name!r} is for {', '.join(spec.builders)}, which is not installed here")
    for each in frameworks:
        check_installed(each)
        spec.builder(each)  # refuses a framework that the backbone lacks
    arguments = {}
    if protocol:
        loaded = get_protocol(protocol)
        arguments = build_arguments(spec, loaded, 2 * loaded.in_channels)
    findings = []
    with Bar(f"check {name}", count_checks(frameworks), "checks") as bar:
        for finding in check_backbone(spec, frameworks, arguments):
            findings.append(finding)
            bar.advance(1, finding.check)
    if not as_json:
        for found in findings:
            label = {"ok": "  ok  ", "note": " note ", "failed": "FAILED"}[found.status]
            details = f"\n        {found.message}" if found.message else ""
            click.echo(f"{label} {found.framework}: {found.check}{details}")
        failed = sum(found.status == "failed" for found in findings)
        click.echo(f"{name}: {len(findings)} checks, {failed} failed")
    return {"backbone": name, "from": registry.backbones.owner(name), "findings": [f._asdict() for f in findings]}


def _check_convergence(folder: Path, reference_point: Path | None, as_json: bool) -> None:
    """Print the verdict on a run; exit code 1 unless it is as expected and of the point's recipe and data."""
    from harness.diagnose.convergence import check_convergence

    found = check_convergence(folder, reference_point)
    if as_json:
        rows = [
            {**dataclasses.asdict(each), "quantity": each.quantity.name, "step": each.quantity.step,
             "sampling": each.quantity.sampling}
            for each in found.deviations
        ]  # fmt: skip
        document = {
            "run": str(folder), "point": found.point, "seeds": found.seeds, "verdict": found.verdict, "rows": rows,
            "recipe": {name: list(values) for name, values in found.recipe_differences.items()},
        }  # fmt: skip
        click.echo(json.dumps(document, indent=2))
    else:
        for each in found.deviations:
            click.echo(
                f"{each.quantity}: {each.value:.4g}, {each.side}; expected {each.low:.4g} to {each.high:.4g}, mean "
                f"{each.mean:.4g}"
            )
        for item, (mine, theirs) in found.recipe_differences.items():
            click.echo(f"warning: {item} is {mine}, of the reference point {theirs}")
        recipe = ", of another recipe" if found.recipe_differences else ""
        click.echo(
            f"{folder}: {found.verdict}{recipe}, against {found.point} ({found.seeds} seeds; two-sided, 5 % of healthy runs are "
            "called worse or better by chance)"
        )
    if not found.passed:
        raise SystemExit(1)


def _has(framework: str) -> bool:
    """Whether the framework is installed."""
    from harness.frameworks.installed import check_installed

    try:
        check_installed(framework)
    except UserError:
        return False
    return True
