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
    """One row of a table: records that differ only in the metric."""

    records: dict[tuple[str, str], Record]  # (metric, mode or "") -> record

    @functools.cached_property
    def representative(self) -> Record:
        """One of the row's records, the first by metric and mode, for reading what all of them have in common."""
        return self.records[min(self.records)]

    @functools.cached_property
    def is_published(self) -> bool:
        """Whether the row is printed in the paper."""
        return self.representative.provenance == "published"

    def text(self, metric: tuple[str, str]) -> str:
        """The text of a (metric, mode): as printed if published, value and interval if measured, a dash if missing.

        A published record that the DiT paper does not print, which record files may contain, is written with its value.
        """
        record = self.records.get(metric)
        if record is None:
            return "-"
        if record.source is not None:
            return paper.printed().get(record.source) or f"{record.value:g}"
        return measured_text(record.value, record.low, record.high)

    def cell(self, metric: tuple[str, str], mark: str = "") -> Cell:
        """The cell of a (metric, mode); a dash if the row has no such record. mark: "best", "tie" or ""."""
        record = self.records.get(metric)
        return Cell("-") if record is None else Cell(self.text(metric), record.value, record.id, mark)


def make_rows(records: Iterable[Record]) -> list[Row]:
    """One row for each (system, training, sampling, ...): records share a row only if nothing but the metric differs.

    Published rows come first, in the order given; then measured rows, sorted by Gflops, name, training and sampling.
    """
    rows: dict[tuple, dict[tuple[str, str], Record]] = {}  # row key -> (metric, mode) -> record
    for record in records:
        mode = record.evaluation.mode if record.evaluation is not None else None
        rows.setdefault(_row_key(record), {})[(record.metric, mode or "")] = record
    all_rows = [Row(records=by_metric) for by_metric in rows.values()]
    published = [row for row in all_rows if row.is_published]
    return published + sorted((row for row in all_rows if not row.is_published), key=_sort_key)


def metrics_of(rows: Iterable[Row]) -> list[tuple[str, str]]:
    """The (metric, mode) of each metric column of these rows, in the order of the columns."""
    return sorted({metric for row in rows for metric in row.records}, key=lambda pair: (rank(pair[0]), pair[1]))


def column_title(metric: tuple[str, str], rows: Iterable[Row], *, names_n: bool = True) -> str:
    """The title of a (metric, mode) column; at least one of the rows must have the metric."""
    return title_of([row.records[metric] for row in rows if metric in row.records], names_n=names_n)


def groups(records: Iterable[Record]) -> list[list[Record]]:
    """Records grouped by comparable key: each group may share a table. Records without a suite come last."""
    by_key: dict[tuple, list[Record]] = {}
    for record in records:
        by_key.setdefault(comparable_key(record), []).append(record)

    def order(pair: tuple[tuple, list[Record]]) -> tuple:
        (dataset, resolution, n, suite, *hashes), _ = pair
        return (suite is None, dataset, resolution, -n, [text or "" for text in (suite, *hashes)])

    return [members for _, members in sorted(by_key.items(), key=order)]


# Metadata (names of `row_metadata`) that a table on the terminal shows as columns if the rows differ in it, because such
# a table has no footnotes.
SHOWN_IF_DIFFERENT = (
    *("recipe", "batch", "training precision", "eta", "clip denoised", "label policy", "sampling precision"),
    *("sampling seed", "framework", "suite version"),
)


def console_table(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Rows for a terminal: for each a dict of column title -> text, with the same keys in all.

    Columns that contain only dashes are left out. If N differs between rows, it has a column of its own and is not in the
    titles of metrics.
    """
    metrics = metrics_of(rows)
    sample_counts = {row.representative.n for row in rows}
    titles = {metric: column_title(metric, rows, names_n=len(sample_counts) == 1) for metric in metrics}
    metadata = [row_metadata(row.representative) for row in rows]
    differing = [name for name in SHOWN_IF_DIFFERENT if len({words.get(name) for words in metadata}) > 1]
    lines = []
    for row, words in zip(rows, metadata, strict=True):
        cells = {"System": row.representative.system, **{title: cell.text for title, cell in columns_of(row).items()}}
        cells |= {name.capitalize(): words.get(name, "-") for name in differing}
        if len(sample_counts) > 1:
            cells["N"] = str(row.representative.n)
        for metric in metrics:
            cells[titles[metric]] = row.text(metric)
        lines.append(cells)
    empty = [title for title in (lines[0] if lines else ()) if all(cells[title] == "-" for cells in lines)]
    return [{title: text for title, text in cells.items() if title not in empty} for cells in lines]


def columns_of(row: Row) -> dict[str, Cell]:
    """The columns of a measured row that are not metrics: title -> cell."""
    record, training, sampling = row.representative, row.representative.training, row.representative.sampling
    steps = sampling.steps if sampling else None
    stage_steps = sampling.stage_steps if sampling else None  # of a cascade, as "50 + 50"
    without_steps = "-"
    if sampling and sampling.evaluations_mean is not None:
        without_steps = f"adaptive ({sampling.evaluations_mean:.4g} evaluations)"
    return {
        "Params (M)": Cell(params_text(record.params), record.params),
        "Gflops": _quantity_cell(record.gflops),
        "Training steps": _number_cell(training.steps if training else None, count_text),
        "Training Gflops": _quantity_cell(training.gflops if training else None),
        "Seed": _number_cell(training.seed if training else None),
        "Sampler": Cell((sampling.sampler if sampling else None) or "-"),
        "Sampling steps": Cell(without_steps) if steps is None else Cell(stage_steps or str(steps), steps),
        "Guidance": Cell(guidance_text(record), sampling.guidance_scale if sampling else None),
        "Sampling Gflops": _quantity_cell(sampling.gflops_per_image if sampling else None),
    }


def _number_cell(value: float | None, write: Callable[[Any], str] = str) -> Cell:
    """The cell of a number with the text `write(value)`; a dash for None."""
    return Cell("-") if value is None else Cell(write(value), value)


def _quantity_cell(value: float | None) -> Cell:
    """The cell of a number of Gflops; a dash for None."""
    return _number_cell(value, quantity_text)


def _row_key(record: Record) -> tuple:
    """A record's identity without the metric and its mode, as a tuple of texts and numbers, which is fast to hash."""
    evaluation, source = record.evaluation, record.source
    return (
        record.provenance,
        record.protocol,
        record.protocol_version,
        record.dataset,
        record.resolution,
        record.n,
        record.system,
        record.backbone,
        record.kind,
        record.framework,
        record.params,
        record.gflops,
        record.gflops_published_input,
        (source.table, source.row) if source else None,
        record.training.canonical if record.training else None,
        record.sampling.canonical if record.sampling else None,
        (evaluation.suite, evaluation.suite_version, evaluation.features) if evaluation else None,
        (evaluation.features_sha256, evaluation.reference_sha256) if evaluation else None,
    )


def _sort_key(row: Row) -> tuple:
    """The sort key of a measured row."""
    record, training, sampling = row.representative, row.representative.training, row.representative.sampling
    return (
        record.gflops or 0.0,
        record.system,
        (training.steps if training else None) or 0,
        (training.seed if training else None) or 0,
        (sampling.sampler if sampling else None) or "",
        (sampling.guidance_scale if sampling else None) or 0.0,
        (sampling.guidance_interval if sampling else None) or "",
        (sampling.steps if sampling else None) or 0,
        row.representative.id,  # to order rows that agree in all of the above
    )
