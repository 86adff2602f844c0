"""What a reader of a mean or a comparison should know: compute that is not matched, and versions that were mixed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from results.compare import Verdict
from results.experiments import Group
from results.matched import TOLERANCE
from results.records import Record

NOT_RECORDED = "not recorded"


@dataclass(frozen=True, kw_only=True)
class Compute:
    """The compute of both sides of a comparison, in Gflops. None: not stated.

    what: "training", of the whole training; or "sampling", of an image, decoder included. sampling: how the images were
    sampled, as in `Verdict.sampling`; "": it is the same for all verdicts, or of the training.
    """

    what: str
    a: float | None
    b: float | None
    sampling: str = ""

    @property
    def ratio(self) -> float | None:
        """How many times the other side's compute the larger one is; None if a side's is not stated, or 0."""
        return max(self.a, self.b) / min(self.a, self.b) if self.a and self.b else None

    @property
    def warning(self) -> str:
        """A sentence if the compute is not matched within TOLERANCE, or known of one side only; else ""."""
        where = f" at {self.sampling}" if self.sampling else ""
        if (self.a is None) != (self.b is None):
            side = "A" if self.a is None else "B"
            return f"the {self.what} compute of {side}{where} is not stated, so it cannot be matched"
        if self.ratio is None or self.ratio <= 1 + TOLERANCE:
            return ""
        larger, smaller = ("A", "B") if (self.a or 0) > (self.b or 0) else ("B", "A")
        return f"{larger} has {self.ratio:.3g} times the {self.what} compute of {smaller}{where}"


def compute_of(verdicts: Iterable[Verdict]) -> list[Compute]:
    """The training compute and the sampling compute of the sides of these verdicts, each pair of values once."""
    verdicts = list(verdicts)
    training = [
        Compute(what="training", a=training_gflops(verdict.a), b=training_gflops(verdict.b)) for verdict in verdicts
    ]
    several = len({verdict.sampling for verdict in verdicts}) > 1
    sampling = [
        Compute(
            what="sampling", a=sampling_gflops(verdict.a), b=sampling_gflops(verdict.b),
            sampling=verdict.sampling if several else "",
        )
        for verdict in verdicts
    ]  # fmt: skip
    return list(dict.fromkeys([*training, *sampling]))


def training_gflops(group: Group) -> float | None:
    """Gflops of the whole training of one seed; None if they are not stated."""
    training = group.records[0].training
    return None if training is None else training.gflops


def sampling_gflops(group: Group) -> float | None:
    """Gflops of an image, decoder included; None if they are not stated."""
    sampling = group.records[0].sampling
    if sampling is None or sampling.gflops_per_image is None:
        return None
    return sampling.gflops_per_image + (sampling.decoder_gflops or 0.0)


def cautions_on_sides(a: Group, b: Group) -> list[str]:
    """`cautions` on each side of a comparison, or else on both together."""
    sides = [f"{name}: {text}" for name, group in (("A", a), ("B", b)) for text in cautions(group.records)]
    return sides or [f"A and B: {text}" for text in cautions((*a.records, *b.records))]


def cautions(records: Iterable[Record]) -> list[str]:
    """A sentence on the libraries, harness and git commits of which the trainings had several versions; [] if on none.

    Versions that are not recorded count as a version of their own, unless no record states any. A package that a record with
    versions does not state, such as one that brings another network, had no part in its training.
    """
    trained = [record.environment.training_versions if record.environment else None for record in records]
    names = {name for versions in trained for name in versions or ()}
    texts = []
    for name in sorted(names):
        found = {
            versions[name] if versions else NOT_RECORDED for versions in trained if not versions or name in versions
        }
        if len(found) > 1 or any(", then " in version for version in found):
            ordered = [*sorted(found - {NOT_RECORDED}), *(found & {NOT_RECORDED})]
            texts.append(f"{'git commit' if name == 'git_commit' else name} {' and '.join(ordered)}")
    return [f"trained with {'; '.join(texts)}"] if texts else []
