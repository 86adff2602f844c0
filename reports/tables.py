"""The tables: the paper's Tables 1-6 with measured rows beside the published ones, and the table of a protocol."""

import dataclasses
import hashlib
import string
import urllib.parse
from collections.abc import Iterable, Sequence

from reports.columns import (
    FACTS,
    METRICS,
    count_text,
    facts,
    features_of,
    key_text,
    metric_title,
    quantity_text,
)
from reports.rows import Cell, Row, description, groups, make_rows, metrics_of
from results import paper
from results.paper import PublishedValue
from results.records import Record, comparable_key

PAPER_METRICS = ("fid", "sfid", "is", "precision", "recall")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One printed row. notes: indices into the section's footnotes.

    values, record_ids and marks have an entry for each cell, or are empty where no cell has one.
    """

    cells: tuple[str, ...]
    published: bool
    notes: tuple[int, ...] = ()
    values: tuple[float | None, ...] = ()  # the number behind the cell, unrounded: what a column is sorted by
    record_ids: tuple[str, ...] = ()  # of the record that the number is from; "" where it is from none
    marks: tuple[str, ...] = ()  # "best" or "tie" in a column of a metric, else ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """Rows that may stand under one another."""

    heading: str
    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    footnotes: tuple[str, ...] = ()  # marked a, b, c, ...
    remarks: tuple[str, ...] = ()  # hold for all rows
    origin: str = "arXiv:2212.09748"  # of the published rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A table as it is printed (sections), and its data with nothing rounded or left out (data, for CSV)."""

    name: str  # file name without extension
    title: str
    sections: tuple[Section, ...]
    data: tuple[dict[str, object], ...]


def paper_tables(records: Iterable[Record]) -> list[Table]:
    """Tables 1-6. Measured records join them where data set, resolution, N and suite are as published."""
    measured = [record for record in records if record.provenance == "measured"]
    return [
        _architecture_table(measured),
        _metric_table("Table 2", "Class-conditional ImageNet 256x256", 256, measured, _any),
        _metric_table("Table 3", "Class-conditional ImageNet 512x512", 512, measured, _any),
        _details_table(measured),
        _metric_table(
            "Table 5", "Decoder ablation, DiT-XL/2-G (cfg=1.5), 256x256", 256, measured, _is_decoder_ablation
        ),
        _published_table("Table 6", "Gflops of the U-Net baselines, diffusion models only"),
    ]


def protocol_table(protocol: str, records: Iterable[Record]) -> Table | None:
    """The rows of one protocol (those of record files, not the paper's), all metrics; None without any."""
    members = [record for record in records if record.protocol == protocol]
    if not members:
        return None
    sections, data = [], []
    for group in groups(members):
        rows = make_rows(group)
        sections.append(_protocol_section(rows))
        data += [_data_row(row, len(sections)) for row in rows]
    return Table(
        name=protocol_file_name(protocol), title=f"Protocol {protocol}", sections=tuple(sections), data=_aligned(data)
    )


def protocol_file_name(protocol: str) -> str:
    """`table-digits`; safe as a file name and different for every protocol, whatever a record calls it."""
    safe = urllib.parse.quote(protocol, safe="", errors="backslashreplace")
    if len(safe) > 100:
        safe = f"{safe[:80]}-{hashlib.sha256(safe.encode()).hexdigest()[:12]}"
    return f"table-protocol-{safe}" if safe.isdigit() else f"table-{safe}"


def _protocol_section(rows: Sequence[Row]) -> Section:
    metrics = metrics_of(rows)
    descriptions = [description(row) for row in rows]
    titles = [title for title in descriptions[0] if any(cells[title].text != "-" for cells in descriptions)]
    head = rows[0].any
    cells = [
        (Cell(row.any.system), *(found[title] for title in titles), *(row.cell(metric) for metric in metrics))
        for row, found in zip(rows, descriptions, strict=True)
    ]
    shown = ("training steps", "training seed", "sampler", "sampling steps", "guidance")
    columns = ("System", *titles, *(metric_title(key, head.n, mode, features_of(head)) for key, mode in metrics))
    section = _section(key_text(head), columns, rows, cells, shown)
    return dataclasses.replace(section, origin="source in the CSV file")


def _metric_table(table: str, title: str, resolution: int, measured: Sequence[Record], wanted) -> Table:
    published = [record for record in paper.records() if record.source.table == table]
    joining = [record for record in measured if wanted(record) and may_share(published[0], record)]
    measured_groups = groups(joining)
    # With two measured groups (say, two feature networks) neither may stand under the other: a section each.
    parts = [published + group for group in measured_groups] if len(measured_groups) < 2 else [published]
    parts = parts or [published]
    parts += measured_groups if len(measured_groups) > 1 else []
    sections, data = [], []
    for part in parts:
        rows = make_rows(part)
        columns = ("Model", *(metric_title(key, part[0].n) for key in PAPER_METRICS), "Source")
        cells = [
            (Cell(_model_text(row)), *(_metric_cell(row, key) for key in PAPER_METRICS), Cell(_source_text(row)))
            for row in rows
        ]
        # A published row says in its name what tells it from its neighbours; a measured row says steps and seed there.
        shown = ("training steps", "training seed") if all(not row.is_published for row in rows) else ()
        speaker = next((row.any for row in rows if not row.is_published), rows[0].any)
        sections.append(_section(key_text(speaker), columns, rows, cells, shown))
        data += [_data_row(row, len(sections)) for row in rows]
    return Table(name=_file_name(table), title=f"{table}. {title}", sections=tuple(sections), data=_aligned(data))


def may_share(published: Record, record: Record) -> bool:
    """Whether a record may stand in a published table: the key agrees in everything that the paper states.

    The paper names its suite but gives no hash of the feature network or the reference.
    """
    pairs = zip(comparable_key(published), comparable_key(record), strict=True)
    return all(stated is None or stated == found for stated, found in pairs)


def _architecture_table(measured: Sequence[Record]) -> Table:
    """Table 1, with the Gflops counted here for the sizes that were run (at the paper's input, patch 4)."""
    table = _published_table("Table 1", "DiT models")
    counted = {
        record.backbone: record.gflops_published_input
        for record in sorted(measured, key=lambda record: record.id)
        if record.gflops_published_input is not None
    }
    names = {cell.backbone: cell.row for cell in paper.values() if cell.table == "Table 1"}
    (section,) = table.sections
    lines, data = list(section.lines), list(table.data)
    for backbone, name in names.items():
        if backbone in counted:
            text = quantity_text(counted[backbone])
            cells = (Cell(name), *[Cell("-")] * 3, Cell(text, counted[backbone]), Cell("counted"))
            lines.append(make_line(cells, published=False))
            data.append({"provenance": "measured", "model": name, section.columns[4]: counted[backbone]})
    section = dataclasses.replace(section, lines=tuple(lines))
    return dataclasses.replace(table, sections=(section,), data=_aligned(data))


def _details_table(measured: Sequence[Record]) -> Table:
    """Table 4, a section for each resolution (they share no table), with measured rows without guidance."""
    table = _published_table("Table 4", "All DiT models, FID-50K without guidance")
    (whole,) = table.sections
    sections, data = [], []
    for resolution in (256, 512):
        square = f"{resolution}x{resolution}"
        pairs = zip(whole.lines, table.data, strict=True)
        kept = [(line, entry) for line, entry in pairs if line.cells[1] == square]
        published = next(r for r in paper.records() if r.source.table == "Table 4" and r.resolution == resolution)
        joining = [r for r in measured if r.metric == "fid" and _is_unguided_dit(r) and may_share(published, r)]
        parts = [[], *groups(joining)] if len(groups(joining)) > 1 else [joining]
        for index, part in enumerate(parts):
            rows = make_rows(part)
            lines = [line for line, _ in kept] if index == 0 else []
            data += [entry | {"section": len(sections) + 1} for _, entry in kept] if index == 0 else []
            data += [_data_row(row, len(sections) + 1) for row in rows]
            cells = [_details_cells(row, square) for row in rows]
            speaker = rows[0].any if rows else published
            section = _section(
                key_text(speaker), whole.columns, rows, cells, ("training steps", "batch", "learning rate")
            )
            sections.append(dataclasses.replace(section, lines=(*lines, *section.lines)))
    return dataclasses.replace(table, sections=tuple(sections), data=_aligned(data))


def _details_cells(row: Row, square: str) -> tuple[Cell, ...]:
    found, training = description(row), row.any.training
    steps, batch, rate = (training.steps, training.batch, training.learning_rate) if training else (None, None, None)
    return (
        Cell(row.any.system),
        Cell(square),
        found["Gflops"],
        found["Params (M)"],
        Cell("-") if steps is None else Cell(f"{steps / 1000:g}", steps / 1000),
        Cell("-") if batch is None else Cell(str(batch), batch),
        Cell("-") if rate is None else Cell(f"{rate:g}", rate),
        Cell("-"),
        _metric_cell(row, "fid"),
        Cell("measured"),
    )


def _published_table(table: str, title: str) -> Table:
    """A table of the paper cell for cell; the row's further words (", 256x256, 400K") are columns of their own."""
    cells: dict[str, dict[str, PublishedValue]] = {}
    for cell in paper.values():
        if cell.table == table:
            cells.setdefault(cell.row, {})[cell.column] = cell
    titles = list(next(iter(cells.values())))
    is_sized = next(iter(cells)).count(",") > 0
    head = ("Model", "Resolution") if is_sized else ("Model",)
    lines, data = [], []
    for row, found in cells.items():
        first = found[titles[0]]
        name = (row.split(",")[0], f"{first.resolution}x{first.resolution}") if is_sized else (row,)
        cells = (*map(Cell, name), *(_printed_cell(found[title]) for title in titles), Cell("paper"))
        lines.append(make_line(cells, published=True))
        data.append(
            {"section": 1, "provenance": "published", "source": table, "model": row, "backbone": first.backbone}
            | {title: found[title].value for title in titles}
        )
    section = Section(heading="", columns=(*head, *titles, "Source"), lines=tuple(lines))
    return Table(name=_file_name(table), title=f"{table}. {title}", sections=(section,), data=_aligned(data))


def make_line(cells: Sequence[Cell], *, published: bool, notes: Sequence[int] = ()) -> Line:
    """The printed row of `cells`."""
    texts, values, record_ids, marks = zip(*cells, strict=True)
    return Line(cells=texts, published=published, notes=tuple(notes), values=values, record_ids=record_ids, marks=marks)


def _printed_cell(cell: PublishedValue) -> Cell:
    try:
        return Cell(cell.value or "-", float(cell.value))
    except ValueError:
        return Cell(cell.value or "-")


def _section(heading: str, columns, rows: Sequence[Row], cells, shown: Sequence[str]) -> Section:
    """Lines with footnotes for the facts, not shown in a column, in which the rows differ.

    A row has one note for what it states and others leave open, and one for what other rows state differently.
    """
    found = [facts(row.any) for row in rows]
    names = [name for name in FACTS if name not in shown and any(name in words for words in found)]
    known = {name: {words[name] for words in found if name in words} for name in names}
    common = [name for name in names if len(known[name]) == 1 and all(name in words for words in found)]
    stated = [name for name in names if len(known[name]) == 1 and name not in common]
    differing = [name for name in names if len(known[name]) > 1]
    footnotes: list[str] = []
    lines = []
    for row, members, words in zip(rows, cells, found, strict=True):
        parts = [[f"{name} {words[name]}" for name in group if name in words] for group in (stated, differing)]
        notes = [", ".join(part) for part in parts if part]
        footnotes += [note for note in notes if note not in footnotes]
        marks = tuple(footnotes.index(note) for note in notes)
        lines.append(make_line(members, published=row.is_published, notes=marks))
    remarks = []
    if common:
        remarks.append(f"All rows: {', '.join(f'{name} {found[0][name]}' for name in common)}.")
    methods = sorted({record.interval for row in rows for record in row.records.values() if record.interval})
    if methods:
        remarks.append(f"Intervals in brackets: {'; '.join(methods)}.")
    return Section(
        heading=heading,
        columns=tuple(columns),
        lines=tuple(lines),
        footnotes=tuple(footnotes),
        remarks=tuple(remarks),
    )


def note_mark(index: int) -> str:
    """a, b, ..., z, aa, ab, ..."""
    letters = string.ascii_lowercase
    return letters[index] if index < 26 else note_mark(index // 26 - 1) + letters[index % 26]


def _data_row(row: Row, section: int) -> dict[str, object]:
    """Everything about a row with nothing rounded: identity first, then value, low and high of each metric."""
    record = row.any
    training, sampling, evaluation, source = record.training, record.sampling, record.evaluation, record.source
    entry: dict[str, object] = {
        "section": section,
        "provenance": record.provenance,
        "source": source.table if source else None,
        "model": source.row if source else record.system,
        "system": record.system,
        "backbone": record.backbone,
        "framework": record.framework,
        "dataset": record.dataset,
        "resolution": record.resolution,
        "protocol": record.protocol,
        "protocol_version": record.protocol_version,
        "n": record.n,
        "params": record.params,
        "gflops": record.gflops,
        "gflops_published_input": record.gflops_published_input,
    }
    for prefix, part in (("training", training), ("sampling", sampling), ("evaluation", evaluation)):
        if part is not None:
            found = dataclasses.asdict(part)
            found.pop("mode", None)  # belongs to the metric, not to the row
            entry |= {f"{prefix}_{name}": value for name, value in found.items()}
    for key, mode in metrics_of([row]):
        metric = row.records[key, mode]
        name = f"{key}_{mode}" if mode else key
        entry[name] = row.text((key, mode)) if row.is_published else metric.value
        entry |= {f"{name}_low": metric.low, f"{name}_high": metric.high, f"{name}_interval": metric.interval}
    return entry


def _aligned(data: Sequence[dict[str, object]]) -> tuple[dict[str, object], ...]:
    """The same columns in every row; columns that are empty throughout are dropped, metrics stand last."""
    names = dict.fromkeys(name for entry in data for name in entry)
    kept = [name for name in names if any(entry.get(name) not in (None, "") for entry in data)]
    kept.sort(key=_is_metric_column)
    return tuple({name: entry.get(name) for name in kept} for entry in data)


def _is_metric_column(name: str) -> bool:
    return name.split("_")[0] in METRICS or name.startswith("loss_")


def _model_text(row: Row) -> str:
    if row.is_published:
        return row.any.source.row
    training = row.any.training
    words = []
    if training is not None and training.steps is not None:
        words.append(f"{count_text(training.steps)} steps")
    if training is not None and training.seed is not None:
        words.append(f"seed {training.seed}")
    return f"{row.any.system} ({', '.join(words)})" if words else row.any.system


def _metric_cell(row: Row, key: str) -> Cell:
    """The metric in its plain mode, or else in the only other one there is."""
    modes = sorted(mode for metric, mode in row.records if metric == key)
    return row.cell((key, modes[0])) if modes else Cell("-")


def _source_text(row: Row) -> str:
    return "paper" if row.is_published else "measured"


def _file_name(table: str) -> str:
    return table.lower().replace(" ", "-")


def _any(record: Record) -> bool:
    return record.metric in PAPER_METRICS


def _is_decoder_ablation(record: Record) -> bool:
    sampling = record.sampling
    guided = sampling is not None and sampling.guidance_scale == 1.5
    return record.metric in PAPER_METRICS and record.backbone == "dit-xl-2" and guided


def _is_unguided_dit(record: Record) -> bool:
    scale = record.sampling.guidance_scale if record.sampling is not None else None
    alone = "+" not in (record.backbone or "")  # no classifier, no upsampler
    return alone and (record.backbone or "").startswith("dit-") and scale in (None, 1.0)
