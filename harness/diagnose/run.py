"""All stages in turn, their shares of the gap, and the sentence at the end."""

from __future__ import annotations

import dataclasses
import logging
import math
from dataclasses import dataclass
from pathlib import Path

from harness.diagnose.data import check_data, check_labels
from harness.diagnose.evaluation import check_count, check_evaluator, check_reference
from harness.diagnose.expectation import Expectation, expectation
from harness.diagnose.finding import FAULT, SUSPECT, UNKNOWN, Finding
from harness.diagnose.sampling import check_sampling, check_uint8
from harness.diagnose.subject import Subject, open_subject
from harness.diagnose.training import check_ema, check_loss
from results.compare import RETRAINING

logger = logging.getLogger(__name__)

IMAGES = 1000  # drawn again for a distance, unless there are fewer samples


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What was found.

    samples: their path. against: where the expectation comes from. value: the distance, as it was recorded, else as it is
    measured here. expected: the expected distance; None: not known. gap: the difference of both. findings: in the order of
    the pipeline. conclusion: the last sentence. healthy: no stage is at fault, and no gap is left over.
    """

    samples: Path
    against: str
    metric: str
    value: float
    expected: float | None
    gap: float | None
    findings: tuple[Finding, ...]
    conclusion: str
    healthy: bool


def diagnose(
    path: Path,
    against: Path | None = None,
    *,
    protocol: str | None = None,
    data: Path | None = None,
    reference: Path | None = None,
    suite: str | None = None,
    weights: Path | None = None,
    entry: str | None = None,
    cache: Path | None = None,
    images: int = IMAGES,
) -> Diagnosis:
    """Find the stage from which a gap in quality comes.

    path: a run, or a sample set. against: a run, a sample set, a record file or a reference point (a file, or the name of a
    packaged one); None: the run's protocol and its own evidence. The others: as of `harness evaluate`; reference: the images that samples should be compared with.
    images: at most so many are drawn again. Nothing is written but the cache. UserError for what cannot be read.
    """
    subject = open_subject(
        path, protocol=protocol, data=data, reference=reference, suite=suite, weights=weights, entry=entry, cache=cache
    )
    wanted = expectation(subject, against)
    redrawn = check_sampling(subject, wanted, images)
    sampler, decoder = redrawn.findings
    findings = _with_causes(
        [
            check_data(subject, wanted),
            check_labels(subject, wanted),
            check_loss(subject, wanted),
            check_ema(subject, wanted, redrawn.drawn_with, redrawn.ema_value),
            sampler,
            decoder,
            check_uint8(subject, wanted),
            check_evaluator(subject, wanted),
            check_reference(subject, wanted),
            check_count(subject, wanted),
        ]
    )
    record = subject.record
    value = record.value if record is not None else subject.own_distance.value
    expected = None if wanted.distance is None else wanted.distance.value
    gap = None if expected is None else value - expected
    findings = [_with_share(each, value, gap) for each in findings]
    conclusion, healthy = _conclude(subject, wanted, findings, value, gap)
    return Diagnosis(
        samples=subject.path, against=wanted.source, metric=subject.metric.key, value=value, expected=expected, gap=gap,
        findings=tuple(findings), conclusion=conclusion, healthy=healthy,
    )  # fmt: skip


def _with_causes(findings: list[Finding]) -> list[Finding]:
    """A loss that is not as expected follows from other data or labels, where these are at fault."""
    earlier = next((each.stage for each in findings if each.stage in ("data", "labels") and each.status == FAULT), "")
    return [
        dataclasses.replace(each, follows=earlier)
        if each.stage == "loss" and each.status == FAULT and earlier
        else each
        for each in findings
    ]


def _with_share(finding: Finding, value: float, gap: float | None) -> Finding:
    """The finding with the share of the gap that goes away with this stage as expected; 1 at most, 0 at least."""
    if finding.mended is None or not gap or finding.status not in (FAULT, SUSPECT):
        return finding
    return dataclasses.replace(finding, share=min(max((value - finding.mended) / gap, 0.0), 1.0))


def _conclude(
    subject: Subject, wanted: Expectation, findings: list[Finding], value: float, gap: float | None
) -> tuple[str, bool]:
    """(the last sentence, whether the run is healthy)."""
    key = subject.metric.key
    what = f"{key} {value:.4g}"
    what += "" if gap is None else f", {abs(gap):.3g} {'above' if gap > 0 else 'below'} the expected {value - gap:.4g}"
    faults = [each for each in findings if each.status == FAULT and not each.follows]
    if len(faults) == 1:
        (only,) = faults
        share = "" if only.share is None else f" ({only.share:.0%} of the gap)"
        return f"{what}: the gap comes from the stage {only.stage}{share}: {only.measured}.", False
    if faults:
        ordered = sorted(faults, key=lambda each: -(each.share or 0.0))
        names = ", ".join(f"{each.stage}{'' if each.share is None else f' ({each.share:.0%})'}" for each in ordered)
        return f"{what}: these stages are not as expected, and their shares could not be told apart: {names}.", False
    suspects = [each for each in findings if each.status == SUSPECT]
    if gap is not None and wanted.distance is not None:
        own = subject.own_distance
        # Of one other run: training again moves a distance about three times as much as sampling again.
        noise = wanted.distance.half if wanted.point else RETRAINING * math.hypot(own.half, wanted.distance.half)
        if abs(gap) > noise and len(suspects) == 1:
            (only,) = suspects
            return (
                f"{what}: the gap comes from the stage {only.stage}, the only one that differs: {only.measured}.",
                False,
            )
        if abs(gap) > noise:
            left = [each.stage for each in suspects] or [each.stage for each in findings if each.status == UNKNOWN]
            if not left:
                return f"{what}: no stage that was measured explains it.", False
            return f"{what}: it could not be told apart whether it comes from {', '.join(left)}.", False
    if suspects:
        names = ", ".join(each.stage for each in suspects)
        return f"{what}: no stage is at fault; not as expected, without a measured effect: {names}.", True
    return f"{what}: healthy, every stage that could be measured is as expected of {wanted.source}.", True
