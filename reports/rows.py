"""From records to table rows: which records share a row, which rows share a table, and in which order."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from reports.texts import (
    count_text,
    guidance_text,
    measured_text,
    params_text,
    quantity_text,
    row_metadata,
    title_of,
)
from results import paper
from results.metrics import rank
from results.records import Record, comparable_key


class Cell(NamedTuple):
    """One cell of a table: its text, and the number and record that it shows."""

    text: str
    value: float | None = None  # the number, unrounded; None where there is none
    record_id: str = ""  # of the number's record
    mark: str = ""  # "best" or "tie" in a metric's column


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table: records that differ in the metric alone."""

    records: dict[tuple[str, str], Record]  # (metric, mode or "") -> record

    @functools.cached_property
    def representative(self) -> Record:
        """A record from which to read what the row's records have in common."""
        return self.records[min(self.records)]

    @functools.cached_property
    def is_published(self) -> bool:
        """Whether the row is the paper's."""
        return self.representative.provenance == "published"

    def text(self, metric: tuple[str, str]) -> str:
        """The text of a metric: as printed if published, value and interval if measured, a dash if missing."""
        record = self.records.get(metric)
        if record is None:
            return "-"
        if record.source is not None:
            return paper.printed().get(record.source) or f"{record.value:g}"
        return measured_text(record.value, record.low, record.high)

    def cell(self, metric: tuple[str, str], mark: str = "") -> Cell:
        """The cell of a metric."""
        record = self.records.get(metric)
        return Cell("-") if record is None else Cell(self.text(metric), record.value, record.id, mark)


def make_rows(records: Iterable[Record]) -> list[Row]:
    """One row for each (system, training, sampling, ...): records share a row only if they differ in the metric alone.

    Published rows first, in the order given; measured rows after them, by compute, name, training and sampling.
    """
    rows: dict[tuple, dict[tuple[str, str], Record]] = {}
    for record in records:
        mode = record.evaluation.mode if record.evaluation is not None else None
        rows.setdefault(_row_key(record), {})[(record.metric, mode or "")] = record
    made = [Row(records=found) for found in rows.values()]
    published = [row for row in made if row.is_published]
    return published + sorted((row for row in made if not row.is_published), key=_order)


def metrics_of(rows: Iterable[Row]) -> list[tuple[str, str]]:
    """The (metric, mode) columns of the rows, in the order of tables."""
    return sorted({metric for row in rows for metric in row.records}, key=lambda pair: (rank(pair[0]), pair[1]))


def column_title(metric: tuple[str, str], rows: Iterable[Row], *, names_n: bool = True) -> str:
    """The title of a (metric, mode) column of these rows, of which at least one fills it."""
    return title_of([row.records[metric] for row in rows if metric in row.records], names_n=names_n)


def groups(records: Iterable[Record]) -> list[list[Record]]:
    """Records that may share a table, in groups, in a stable order."""
    found: dict[tuple, list[Record]] = {}
    for record in records:
        found.setdefault(comparable_key(record), []).append(record)

    def order(pair: tuple[tuple, list[Record]]) -> tuple:
        (dataset, resolution, n, *rest), _ = pair
        return (rest[0] is None, dataset, resolution, -n, [text or "" for text in rest])

    return [members for _, members in sorted(found.items(), key=order)]


# Metadata that a table on the terminal, which has no footnotes, shows where the rows differ in it.
SHOWN_IF_DIFFERENT = (
    *("recipe", "batch", "training precision", "eta", "clip denoised", "label policy", "sampling precision"),
    *("sampling seed", "framework", "suite version"),
)


def console_table(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Rows for a terminal: column title -> text, the same keys in every row.

    Columns that contain only dashes are left out. Where N differs between rows, it gets a column and is left out of the
    titles of metrics.
    """
    metrics = metrics_of(rows)
    sizes = {row.representative.n for row in rows}
    titles = {metric: column_title(metric, rows, names_n=len(sizes) == 1) for metric in metrics}
    found = [row_metadata(row.representative) for row in rows]
    differing = {name: len({known.get(name) for known in found}) for name in SHOWN_IF_DIFFERENT}
    tables = []
    for row, known in zip(rows, found, strict=True):
        cells = {"System": row.representative.system, **{title: cell.text for title, cell in description(row).items()}}
        cells |= {name.capitalize(): known.get(name, "-") for name in SHOWN_IF_DIFFERENT if differing[name] > 1}
        if len(sizes) > 1:
            cells["N"] = str(row.representative.n)
        for metric in metrics:
            cells[titles[metric]] = row.text(metric)
        tables.append(cells)
    empty = [title for title in (tables[0] if tables else ()) if all(cells[title] == "-" for cells in tables)]
    return [{title: text for title, text in cells.items() if title not in empty} for cells in tables]


def description(row: Row) -> dict[str, Cell]:
    """The columns of a measured row that are not metrics: title -> cell."""
    record, training, sampling = row.representative, row.representative.training, row.representative.sampling
    steps = sampling.steps if sampling else None
    stage_steps = sampling.stage_steps if sampling else None
    return {
        "Params (M)": Cell(params_text(record.params), record.params),
        "Gflops": _quantity(record.gflops),
        "Training steps": _number(training.steps if training else None, count_text),
        "Training Gflops": _quantity(training.gflops if training else None),
        "Seed": _number(training.seed if training else None),
        "Sampler": Cell((sampling.sampler if sampling else None) or "-"),
        "Sampling steps": Cell("-") if steps is None else Cell(stage_steps or str(steps), steps),
        "Guidance": Cell(guidance_text(record), sampling.guidance_scale if sampling else None),
        "Sampling Gflops": _quantity(sampling.gflops_per_image if sampling else None),
    }


def _number(value: float | None, write: Callable[[Any], str] = str) -> Cell:
    return Cell("-") if value is None else Cell(write(value), value)


def _quantity(value: float | None) -> Cell:
    return _number(value, quantity_text)


def _row_key(record: Record) -> tuple:
    """A record's identity but for the metric and its mode, as texts and numbers that are quickly hashed."""
    evaluation, source = record.evaluation, record.source
    return (
        *(record.provenance, record.protocol, record.protocol_version, record.dataset, record.resolution, record.n),
        *(record.system, record.backbone, record.kind, record.framework),
        *(record.params, record.gflops, record.gflops_published_input),
        (source.table, source.row) if source else None,
        record.training.canonical if record.training else None,
        record.sampling.canonical if record.sampling else None,
        (evaluation.suite, evaluation.suite_version, evaluation.features) if evaluation else None,
        (evaluation.features_sha256, evaluation.reference_sha256) if evaluation else None,
    )


def _order(row: Row) -> tuple:
    record, training, sampling = row.representative, row.representative.training, row.representative.sampling
    return (
        record.gflops or 0.0,
        record.system,
        (training.steps if training else None) or 0,
        (training.seed if training else None) or 0,
        (sampling.sampler if sampling else None) or "",
        (sampling.guidance_scale if sampling else None) or 0.0,
        (sampling.steps if sampling else None) or 0,
        row.representative.id,  # to order rows that agree in all of the above
    )
