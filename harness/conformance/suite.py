"""All checks of one backbone, in the frameworks that it has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from harness.conformance.checks import ALL, QUICK, Check, run_checks
from harness.conformance.compute_checks import closed_form
from harness.conformance.network import Network
from harness.conformance.subject import Finding, Subject
from harness.errors import UserError
from harness.io.progress import Bar
from harness.spec import BackboneSpec


def subject_of(spec: BackboneSpec, framework: str, arguments: dict[str, Any]) -> Subject:
    """The backbone in one framework. arguments: replace the spec's defaults."""
    arguments = spec.arguments(**arguments)
    if spec.kind in ("denoiser", "upsampler") and arguments.get("out_channels") is None and "in_channels" in arguments:
        arguments["out_channels"] = 2 * arguments["in_channels"]  # what the paper's objective gives it
    return Subject(spec=spec, framework=framework, arguments=arguments, make=_maker(framework))


def check_backbone(spec: BackboneSpec, frameworks: Sequence[str], arguments: dict[str, Any]) -> Iterator[Finding]:
    """The findings, as they come: all checks in each framework, and the frameworks against each other if there are two.

    arguments: of the builder, instead of the spec's defaults.
    """
    subjects = [subject_of(spec, framework, arguments) for framework in frameworks]
    failed = False
    for subject in subjects:
        for finding in run_checks(subject, ALL[subject.framework]):
            failed |= finding.status == "failed"
            yield finding
    if len(subjects) == 2 and not failed:
        from harness.conformance.parity import parity

        yield parity(*subjects)


def check_quickly(spec: BackboneSpec, framework: str, arguments: dict[str, Any]) -> None:
    """The quick checks. Raises UserError with the first failure in one line."""
    _check(spec, framework, arguments, QUICK)


def check_closed_form(spec: BackboneSpec, framework: str, arguments: dict[str, Any]) -> None:
    """The closed form of the compute against the network. Raises UserError in one line. Computes nothing."""
    _check(spec, framework, arguments, {"closed form": closed_form})


def _check(spec: BackboneSpec, framework: str, arguments: dict[str, Any], checks: dict[str, Check]) -> None:
    findings = []
    with Bar(f"check {spec.name}", len(checks), "checks") as bar:
        for finding in run_checks(subject_of(spec, framework, arguments), checks):
            findings.append(finding)
            bar.advance(1, finding.check)
    failures = [each for each in findings if each.status == "failed"]
    if failures:
        first = failures[0]
        more = f" ({len(failures) - 1} more checks failed)" if len(failures) > 1 else ""
        raise UserError(
            f"backbone {spec.name!r} fails the check {first.check!r}: {first.message}{more}; see: harness check {spec.name}"
        )


def count_checks(frameworks: Sequence[str]) -> int:
    """How many findings `check_backbone` gives at most."""
    return sum(len(ALL[each]) for each in frameworks) + (len(frameworks) == 2)


def _maker(framework: str) -> Callable[[BackboneSpec, dict[str, Any], int], Network]:
    """The class of networks of a framework, imported late."""
    if framework == "torch":
        from harness.conformance.torch_network import TorchNetwork

        return TorchNetwork
    from harness.conformance.jax_network import JaxNetwork

    return JaxNetwork
