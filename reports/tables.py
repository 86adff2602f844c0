"""The tables: the paper's Tables 1-6 with measured rows beside the published ones, and the table of a protocol."""

import dataclasses
import hashlib
import itertools
import urllib.parse
from collections.abc import Callable, Iterable, Sequence

from reports.best import best_marks, bold_remark
from reports.counts import GFLOPS_COLUMNS, PARAMS_COLUMN, Counted, counted
from reports.deviations import (
    deviation_data,
    deviation_section,
    guidance_scale,
    has_guidance_interval,
    matching_pairs,
    may_share,
    model_text,
)
from reports.rows import Cell, Row, column_title, columns_of, groups, make_rows, metrics_of
from reports.sections import Section, Table, aligned, build_section, data_row, make_line, metric_columns
from reports.texts import key_text, metric_title
from results import paper
from results.paper import PublishedValue
from results.records import Record

MAX_LINES = 1000  # of one section of a protocol's table, besides the best lines; the CSV file has all
PAPER_METRICS = ("fid", "sfid", "is", "precision", "recall")
COUNT_REMARK = (
    "Counted: by this harness, multiply-adds and one flop per element of the normalisations that the convention counts; "
    "in brackets the deviation from the printed figure where, rounded as that is, it is another."
)
_COUNT_TITLES = dict(  # title of a printed column -> title of the column of counts after it
    zip(
        (*GFLOPS_COLUMNS, PARAMS_COLUMN),
        ("Counted", "Counted (G)", "Base counted (G)", "Upsampler counted (G)", "Total counted (G)", "Counted (M)"),
        strict=True,
    )
)
# Suffix of a DiT's name -> its block.
_BLOCKS = {"in-context": "in-context", "cross-attention": "cross-attention", "adaln": "adaLN"}


def paper_tables(records: Iterable[Record]) -> list[Table]:
    """Tables 1-6. Measured records join them where data set, resolution, N and suite agree with the paper's."""
    measured = [record for record in records if record.provenance == "measured" and record.dataset == paper.DATASET]
    ablation = "Decoder ablation, DiT-XL/2-G (cfg=1.5), 256x256"
    return [
        _published_table("Table 1", "DiT models"),
        _metric_table("Table 2", "Class-conditional ImageNet 256x256", measured, _has_paper_metric),
        _metric_table("Table 3", "Class-conditional ImageNet 512x512", measured, _has_paper_metric),
        _details_table(measured),
        _metric_table("Table 5", ablation, measured, _is_decoder_ablation),
        _published_table("Table 6", "Gflops of the U-Net baselines, diffusion models only"),
    ]


def protocol_table(protocol: str, records: Iterable[Record]) -> Table | None:
    """The table of a protocol's rows with all their metrics; None without rows."""
    members = [record for record in records if record.protocol == protocol]
    if not members:
        return None
    rows_by_section = [make_rows(group) for group in groups(members)]
    sections_and_data = [_protocol_section(rows, number) for number, rows in enumerate(rows_by_section, start=1)]
    return Table(
        name=protocol_file_name(protocol),
        title=f"Protocol {protocol}",
        sections=tuple(section for section, _ in sections_and_data),
        data=aligned(
            [entry for _, data in sections_and_data for entry in data],
            metric_columns(itertools.chain(*rows_by_section)),
        ),
    )


def protocol_file_name(protocol: str) -> str:
    """`table-digits`: a safe file name, different for every protocol, whatever its name."""
    safe = urllib.parse.quote(protocol, safe="", errors="backslashreplace")
    if len(safe) > 100:
        safe = f"{safe[:80]}-{hashlib.sha256(safe.encode()).hexdigest()[:12]}"
    is_taken = safe.isdigit() or safe == "verdicts"  # by the paper's Tables 1-6 and by the table of verdicts
    return f"table-protocol-{safe}" if is_taken else f"table-{safe}"


def _protocol_section(rows: Sequence[Row], number: int) -> tuple[Section, list[dict[str, object]]]:
    """(section, data of all rows) of comparable rows.

    The section prints the first MAX_LINES rows and those that are best or tied in the first metric. number: of the
    section, from 1.
    """
    metrics = metrics_of(rows)
    marks = best_marks(rows, metrics)
    printed = [  # (row, its columns, its marks)
        (row, columns_of(row), marks_of_row)
        for index, (row, marks_of_row) in enumerate(zip(rows, marks, strict=True))
        if index < MAX_LINES or metrics[0] in marks_of_row
    ]
    all_titles = list(printed[0][1])
    titles = [title for title in all_titles if any(columns[title].text != "-" for _, columns, _ in printed)]
    cells = [
        (
            Cell(row.representative.system),
            *(columns[title] for title in titles),
            *(row.cell(metric, marks_of_row.get(metric, "")) for metric in metrics),
        )
        for row, columns, marks_of_row in printed
    ]
    # The metadata that need no footnote. In lower case, the titles of columns are names of metadata.
    shown = ("training seed", "protocol", "metric mode", *(title.lower() for title in all_titles))
    heads = ("System", *titles, *(column_title(metric, rows) for metric in metrics))
    section = build_section(key_text(rows[0].representative), heads, [row for row, _, _ in printed], cells, shown)
    remarks = _with_remark(section.remarks, bold_remark(rows, marks))
    if left_out := len(rows) - len(printed):
        remarks = (f"{left_out:,} more rows are in the CSV file.", *remarks)
    # `origin` is for published rows, which record files may contain; the CSV file names the source of each.
    section = dataclasses.replace(section, origin="source in the CSV file", remarks=remarks)
    return section, [data_row(row, number, marks_of_row) for row, marks_of_row in zip(rows, marks, strict=True)]


def _metric_table(table: str, title: str, measured: Sequence[Record], wanted: Callable[[Record], bool]) -> Table:
    """Table 2, 3 or 5, which has only metrics, with measured rows and sections that compare them with published ones.

    table: its name in the paper. wanted: whether a measured record may be in this table.
    """
    published = [record for record in paper.records() if record.table == table]
    joining = groups([record for record in measured if wanted(record) and may_share(published[0], record)])
    columns = ("Model", *(metric_title(key, published[0].n) for key in PAPER_METRICS), "Source")

    def cells(row: Row, marks: dict) -> tuple[Cell, ...]:
        return (Cell(model_text(row)), *(_metric_cell(row, key, marks) for key in PAPER_METRICS), _source_cell(row))

    sections: list[Section] = []
    data: list[dict[str, object]] = []
    rows: list[Row] = []
    for records in _section_records(published, joining):
        section, new_data, new_rows = _joint_section(
            records, columns, cells, ("protocol",), len(sections) + 1, named=("training steps", "training seed")
        )
        sections.append(section)
        data += new_data
        rows += new_rows
    return _with_pairs(table, title, sections, data, rows)


def _details_table(measured: Sequence[Record]) -> Table:
    """Table 4, with measured rows without guidance, in one section for each resolution."""
    table = _published_table("Table 4", "")
    columns = table.sections[0].columns
    lines = dict(zip((entry["model"] for entry in table.data), table.sections[0].lines, strict=True))  # model -> line
    printed = {entry["model"]: entry for entry in table.data}  # model -> the row of data with all printed columns

    def cells(row: Row, marks: dict) -> tuple[Cell, ...]:
        fid = _metric_cell(row, "fid", marks)
        if not row.is_published:
            return (*_details_cells(row), fid, _source_cell(row))
        line = lines[row.representative.row]
        *before_fid, _fid, _source = map(Cell, line.cells, line.values)  # the last two are made anew, with marks
        return (*before_fid, fid, _source_cell(row))

    sections: list[Section] = []
    data: list[dict[str, object]] = []
    rows: list[Row] = []
    for resolution in (256, 512):
        published = [
            record for record in paper.records() if record.table == "Table 4" and record.resolution == resolution
        ]
        joining = groups(r for r in measured if _is_fid_of_unguided_dit(r) and may_share(published[0], r))
        for records in _section_records(published, joining):
            shown = ("protocol", "training steps", "batch", "learning rate")
            section, new_data, new_rows = _joint_section(records, columns, cells, shown, len(sections) + 1)
            sections.append(dataclasses.replace(section, remarks=(COUNT_REMARK, *section.remarks)))
            for row, entry in zip(new_rows, new_data, strict=True):
                from_paper = printed.get(row.representative.row) if row.is_published else None
                # In `from_paper` every row is in section 1.
                data.append({**entry, **from_paper, "section": len(sections)} if from_paper else entry)
            rows += new_rows
    return _with_pairs("Table 4", "All DiT models, FID-50K without guidance", sections, data, rows)


def _section_records(published: list[Record], joining: list[list[Record]]) -> list[list[Record]]:
    """The records of each section.

    joining: groups of comparable measured records. A single group shares the section of the published records; of several,
    which may not be compared with each other, each has its own section after the published one.
    """
    return [published + joining[0]] if len(joining) == 1 else [published, *joining]


def _joint_section(
    records: Sequence[Record],
    columns: Sequence[str],
    cells: Callable,
    shown: Sequence[str],
    number: int,
    *,
    named: Sequence[str] = (),
) -> tuple[Section, list[dict[str, object]], list[Row]]:
    """(section, data, rows) of published records with measured ones below them.

    records: published and measured ones, or only one kind. cells: function from a row and its marks to the row's cells.
    shown: metadata that need no footnote (as in `build_section`). number: of the section, from 1. named: metadata that the
    names of measured rows state.
    """
    rows = make_rows(records)
    marks = best_marks(rows, metrics_of(rows))
    # The names of published rows may not state them. So footnotes do where the section has published rows.
    if all(not row.is_published for row in rows):
        shown = (*shown, *named)
    representative = next((row.representative for row in rows if not row.is_published), rows[0].representative)
    cells_of_rows = [cells(row, marks_of_row) for row, marks_of_row in zip(rows, marks, strict=True)]
    section = build_section(key_text(representative), columns, rows, cells_of_rows, shown)
    section = dataclasses.replace(section, remarks=_with_remark(section.remarks, bold_remark(rows, marks)))
    return section, [data_row(row, number, marks_of_row) for row, marks_of_row in zip(rows, marks, strict=True)], rows


def _with_pairs(
    table: str, title: str, sections: list[Section], data: list[dict[str, object]], rows: list[Row]
) -> Table:
    """The table with further sections that compare published and measured rows of the same experiment.

    data: of `rows`, in the same order.
    """
    found = matching_pairs(rows, [row for row in rows if not row.is_published])
    for group in groups(pair.measured.representative for pair in found):
        members = [pair for pair in found if pair.measured.representative in group]
        sections = [*sections, deviation_section(members)]
    by_row = {id(pair.measured): pair for pair in found}  # by identity, because rows cannot be hashed
    data = [
        entry | (deviation_data(by_row[id(row)]) if id(row) in by_row else {})
        for row, entry in zip(rows, data, strict=True)
    ]
    return Table(
        name=_file_name(table), title=f"{table}. {title}", sections=tuple(sections),
        data=aligned(data, metric_columns(rows)),
    )  # fmt: skip


def _details_cells(row: Row) -> tuple[Cell, ...]:
    """The cells of a measured row of Table 4 before FID.

    Its Gflops and parameters are counts of the harness, so they are in the columns of counts; the columns of the paper's
    figures have dashes.
    """
    record, columns, training = row.representative, columns_of(row), row.representative.training
    steps, batch, rate = (training.steps, training.batch, training.learning_rate) if training else (None, None, None)
    suffix = next((suffix for suffix in _BLOCKS if (record.backbone or "").endswith(f"-{suffix}")), "")
    return (
        Cell(record.system),
        Cell(f"{record.resolution}x{record.resolution}"),
        Cell("-"),
        columns["Gflops"],
        Cell("-"),
        columns["Params (M)"],
        Cell("-") if steps is None else Cell(f"{steps / 1000:g}", steps / 1000),
        Cell("-") if batch is None else Cell(str(batch), batch),
        Cell("-") if rate is None else Cell(f"{rate:g}", rate),
        Cell(_BLOCKS.get(suffix, "adaLN-Zero")),
    )


def _published_table(table: str, title: str) -> Table:
    """A table of the paper, cell for cell, with a column of the harness's counts after each column that it can count.

    Of a row's name only the model is printed; if the names have more after a comma ("DiT-S/8, 256x256, ..."), the
    resolution has a column of its own.
    """
    by_row: dict[str, dict[str, PublishedValue]] = {}  # row -> column -> cell
    for cell in paper.values():
        if cell.table == table:
            by_row.setdefault(cell.row, {})[cell.column] = cell
    titles = list(next(iter(by_row.values())))
    has_resolution = "," in next(iter(by_row))
    columns = ["Model", "Resolution"] if has_resolution else ["Model"]
    for title_of_cell in titles:
        columns += [title_of_cell, *([_COUNT_TITLES[title_of_cell]] if title_of_cell in _COUNT_TITLES else [])]
    lines, data = [], []
    for row, printed in by_row.items():
        first = printed[titles[0]]
        cells = [Cell(row)]
        if has_resolution:
            cells = [Cell(row.split(",")[0]), Cell(f"{first.resolution}x{first.resolution}")]
        entry = {"section": 1, "provenance": "published", "source": table, "model": row, "backbone": first.backbone}
        for name, cell in printed.items():
            cells.append(_printed_cell(cell))
            entry[name] = cell.value
            if name in _COUNT_TITLES:
                count = counted(cell)
                cells.append(_count_cell(count))
                entry[f"{name} counted"] = count.value if count else None
                entry[f"{name} deviation %"] = count.deviation if count else None
        lines.append(make_line([*cells, Cell("paper")], published=True))
        data.append(entry)
    section = Section(heading="", columns=(*columns, "Source"), lines=tuple(lines), remarks=(COUNT_REMARK,))
    return Table(name=_file_name(table), title=f"{table}. {title}", sections=(section,), data=aligned(data))


def _printed_cell(cell: PublishedValue) -> Cell:
    """The cell as printed, with its number if it is one; a dash for a blank cell."""
    try:
        return Cell(cell.value or "-", float(cell.value))
    except ValueError:
        return Cell(cell.value or "-")


def _count_cell(count: Counted | None) -> Cell:
    """`118.64`, or with its deviation from the printed figure `118.64 (+0.5 %)`; a dash for None."""
    if count is None:
        return Cell("-")
    return Cell(f"{count.text} ({count.deviation:+z.1f} %)" if count.deviation else count.text, count.value)


def _metric_cell(row: Row, key: str, marks: dict[tuple[str, str], str]) -> Cell:
    """The cell of a metric without a mode, or else with the first mode by name; a dash if the row does not have it."""
    modes = sorted(mode for metric, mode in row.records if metric == key)
    return row.cell((key, modes[0]), marks.get((key, modes[0]), "")) if modes else Cell("-")


def _with_remark(remarks: tuple[str, ...], further: str) -> tuple[str, ...]:
    """The remarks and a further one, unless that is empty."""
    return (*remarks, further) if further else remarks


def _source_cell(row: Row) -> Cell:
    return Cell("paper" if row.is_published else "measured")


def _file_name(table: str) -> str:
    return table.lower().replace(" ", "-")


def _has_paper_metric(record: Record) -> bool:
    return record.metric in PAPER_METRICS


def _is_decoder_ablation(record: Record) -> bool:
    is_guided_dit = record.backbone == "dit-xl-2" and guidance_scale(record) == 1.5
    return record.metric in PAPER_METRICS and is_guided_dit and not has_guidance_interval(record)


def _is_fid_of_unguided_dit(record: Record) -> bool:
    backbone = record.backbone or ""
    is_single = "+" not in backbone  # no classifier, no upsampler
    return record.metric == "fid" and is_single and backbone.startswith("dit-") and guidance_scale(record) is None
