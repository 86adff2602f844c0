"""The figures of a report as data: which there are, and of which records they are made."""

import contextlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from harness import registry
from harness.errors import UserError
from harness.runs.run import build_arguments
from reports import figures_frontier, figures_gflops, figures_loss, figures_samples, figures_sampling, figures_training
from reports.charts import Figure
from reports.figures_study import studies
from reports.points import index_of
from results import paper
from results.records import Record


def figures(records: Iterable[Record], folders: Sequence[Path] = ()) -> tuple[Figure, ...]:
    """Every figure that these records can fill, in the order of the paper.

    records: measured and published ones. folders: the folders of the record files, with the logs and samples of runs.
    """
    every = tuple(records)
    measured = [record for record in every if record.provenance == "measured"]
    published = [record for record in every if record.provenance == "published"]
    index = index_of(measured)
    found = studies(index, published)
    made = [
        figures_gflops.compute_efficiency(found, index, published),
        figures_training.conditioning_blocks(found),
        figures_training.size_and_patch(found),
        figures_samples.same_noise(folders, measured),
        figures_gflops.correlation_with_gflops(found),
        figures_training.training_compute(found),
        figures_sampling.sampling_compute(index, published),
        figures_training.other_metrics(index, published),
        figures_loss.training_loss(folders, measured),
        figures_gflops.scaling_law(found, unseen_dits),
        figures_frontier.pareto(index, published),
        figures_frontier.best_size(found),
    ]
    return tuple(figure for figure in made if figure is not None)


ABSENT = {
    "figure-7": "Figure 7 is not drawn: it needs sample sets of two models with the same sampling settings beside the records",
    "figure-13": "Figure 13 is not drawn: it needs the log.jsonl of a run beside its records",
}


def absent(made: Iterable[Figure]) -> tuple[str, ...]:
    """A sentence for each figure of the paper that needs more files than records and was not made."""
    names = {figure.name for figure in made}
    return tuple(text for name, text in ABSENT.items() if name not in names)


def unseen_dits(record: Record) -> dict[str, float]:
    """Name -> Gflops of every registered DiT with adaLN-Zero at the input of the record's protocol; empty if not known."""
    if record.protocol not in registry.protocols:
        return {}
    protocol = registry.protocols.get(record.protocol)
    found = {}
    for spec in registry.backbones:
        if spec.closed_form is not None and re.fullmatch(r"dit-[a-z]+-\d+", spec.name):
            with contextlib.suppress(UserError):  # a patch that does not divide the input
                found[spec.name] = spec.count(**build_arguments(spec, protocol)).gflops
    return found


def published_records(protocols: Iterable[str] | None = None) -> list[Record]:
    """The paper's records; only those of `protocols` unless that is None."""
    wanted = None if protocols is None else set(protocols)
    return [record for record in paper.records() if wanted is None or record.protocol in wanted]
