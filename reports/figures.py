"""The list of a report's figures, as data, and the records that each is made of."""

import contextlib
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from harness import registry
from harness.errors import UserError, one_line
from harness.plugins.hook import Hook
from harness.runs.run import build_arguments
from harness.spec import load_attribute
from reports import (
    figures_frontier,
    figures_gflops,
    figures_loss,
    figures_samples,
    figures_sampling,
    figures_target,
    figures_training,
)
from reports.charts import Figure
from reports.figures_study import studies
from reports.points import index_of
from results import paper
from results.records import Record

logger = logging.getLogger(__name__)


def figures(records: Iterable[Record], folders: Sequence[Path] = ()) -> tuple[Figure, ...]:
    """Every figure that these records can fill, in the order of the paper; those beyond the paper come last.

    records: measured and published ones. folders: the folders of the record files, with the logs and samples of runs.
    """
    every = tuple(records)
    measured = [record for record in every if record.provenance == "measured"]
    published = [record for record in every if record.provenance == "published"]
    index = index_of(measured)
    all_studies = studies(index, published)
    made = [
        figures_gflops.compute_efficiency(all_studies, index, published),
        figures_training.conditioning_blocks(all_studies),
        figures_training.size_and_patch(all_studies),
        figures_samples.same_noise(folders, measured),
        figures_gflops.correlation_with_gflops(all_studies),
        figures_training.training_compute(all_studies),
        figures_sampling.sampling_compute(index, published),
        figures_training.other_metrics(index, published),
        figures_loss.training_loss(folders, measured),
        figures_gflops.scaling_law(all_studies, registered_dits),
        figures_frontier.pareto(index, published),
        figures_frontier.best_size(all_studies),
        figures_target.compute_to_target(all_studies),
    ]
    made += [
        _of_package(hook, measured, {figure.name for figure in made if figure is not None}) for hook in registry.figures
    ]
    return tuple(figure for figure in made if figure is not None)


def _of_package(hook: Hook, measured: list[Record], taken: set[str]) -> Figure | None:
    """A package's figure; None, with a warning, if its code fails: the others are drawn all the same."""
    try:
        figure = load_attribute(hook.call, f"figure {hook.name!r}")(measured)
        if figure is None:
            return None
        if not isinstance(figure, Figure):
            raise UserError(f"came a {type(figure).__name__}, not a reports.charts.Figure")
        if figure.name != hook.name or figure.name in taken:
            raise UserError(
                f"it is called {figure.name!r}, and must have the name of its entry, which no other figure has"
            )
        return figure
    except Exception as error:  # other people's code can raise anything
        logger.warning(f"figure {hook.name!r} of {registry.figures.owner(hook.name)} is not drawn: {one_line(error)}")
        return None


ABSENT = {  # name of a figure that needs further files beside the records -> what to say if it is not drawn
    "figure-7": "Figure 7 is not drawn: it needs sample sets of two models with the same sampling settings beside the records",
    "figure-13": "Figure 13 is not drawn: it needs the log.jsonl of a run beside its records",
}


def absent(made: Iterable[Figure]) -> tuple[str, ...]:
    """A sentence for each figure in ABSENT that was not made. made: the figures of `figures`."""
    names = {figure.name for figure in made}
    return tuple(text for name, text in ABSENT.items() if name not in names)


def registered_dits(record: Record) -> dict[str, float]:
    """Name -> Gflops of every registered DiT with adaLN-Zero, at the input size of the record's protocol.

    Whether a DiT has records does not matter. Empty if the protocol is not registered. Without DiTs whose patch size does
    not divide the input.
    """
    if record.protocol not in registry.protocols:
        return {}
    protocol = registry.protocols.get(record.protocol)
    found = {}
    for spec in registry.backbones:
        # Without a closed form, counting would build the network in torch, which reports never import. The names of DiTs
        # with other blocks have a suffix, so they do not match.
        if spec.closed_form is not None and re.fullmatch(r"dit-[a-z]+-\d+", spec.name):
            with contextlib.suppress(UserError):  # its patch size does not divide the input
                found[spec.name] = spec.count(**build_arguments(spec, protocol)).gflops
    return found


def published_records(protocols: Iterable[str] | None = None) -> list[Record]:
    """The paper's records of these protocols; None: of all protocols."""
    wanted = None if protocols is None else set(protocols)
    return [record for record in paper.records() if wanted is None or record.protocol in wanted]
