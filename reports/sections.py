"""Tables: sections of printed lines with footnotes, and the same rows as unrounded data."""

import dataclasses
import functools
import operator
import string
from collections.abc import Collection, Iterable, Mapping, Sequence

from reports.rows import Cell, Row
from reports.texts import DISTINGUISHING_METADATA, METADATA, distinguishing_metadata, row_metadata
from results.metrics import rank

PAPER = "arXiv:2212.09748"  # where the DiT paper is found
DEVIATION_PARTS = ("paper", "deviation_percent")  # columns of a metric that compare it with the paper


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One printed row.

    notes: indices into the section's footnotes. values, record_ids and marks have an entry for each cell, or are empty
    if no cell has one.
    """

    cells: tuple[str, ...]
    published: bool
    notes: tuple[int, ...] = ()
    values: tuple[float | None, ...] = ()  # the number in the cell, unrounded: columns are sorted by it
    record_ids: tuple[str, ...] = ()  # of the record of the number; "" where there is none
    marks: tuple[str, ...] = ()  # "best" or "tie" in a metric's column, else ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """Rows that may be compared with each other."""

    heading: str
    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    footnotes: tuple[str, ...] = ()  # marked a, b, c, ...
    remarks: tuple[str, ...] = ()  # sentences about all rows
    origin: str = PAPER  # where the published rows are from

    @functools.cached_property
    def numeric(self) -> tuple[bool, ...]:
        """For each column, whether it contains numbers."""
        filled = [line.values for line in self.lines if line.values]
        if not filled:
            return (False,) * len(self.columns)
        return tuple(any(value is not None for value in column) for column in zip(*filled, strict=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A table: as printed (sections), and as data for CSV, with nothing rounded or left out (data: a dict for each row)."""

    name: str  # file name without extension
    title: str
    sections: tuple[Section, ...]
    data: tuple[dict[str, object], ...]


def make_line(cells: Sequence[Cell], *, published: bool, notes: Sequence[int] = ()) -> Line:
    """The printed row of `cells`."""
    texts, values, record_ids, marks = zip(*cells, strict=True)
    return Line(cells=texts, published=published, notes=tuple(notes), values=values, record_ids=record_ids, marks=marks)


def build_section(
    heading: str, columns: Sequence[str], rows: Sequence[Row], cells: Sequence[Sequence[Cell]], shown: Sequence[str]
) -> Section:
    """A section whose footnotes state the metadata in which the rows differ and that no column shows.

    A row has one note for metadata that other rows do not state, and one for metadata that other rows state differently.
    Rows that still look alike get a third note, which tells them apart. Metadata that all rows state with the same text
    are in a remark instead.
    cells: of each row. shown: names of the metadata that need no footnote, such as those that a column shows.
    """
    metadata = [row_metadata(row.representative) for row in rows]
    names = [name for name in METADATA if name not in shown and any(name in words for words in metadata)]
    texts_of = {name: {words[name] for words in metadata if name in words} for name in names}
    common = [name for name in names if len(texts_of[name]) == 1 and all(name in words for words in metadata)]
    partly_stated = [name for name in names if len(texts_of[name]) == 1 and name not in common]
    differing = [name for name in names if len(texts_of[name]) > 1]
    notes = [  # of each row its two notes; "" where it states none of their metadata
        [", ".join(f"{name} {words[name]}" for name in group if name in words) for group in (partly_stated, differing)]
        for words in metadata
    ]
    for alike in _alike(rows, cells, notes):
        further = {index: distinguishing_metadata(rows[index].representative) for index in alike}
        telling = [name for name in DISTINGUISHING_METADATA if len({words.get(name) for words in further.values()}) > 1]
        for index, words in further.items():
            notes[index].append(", ".join(f"{name} {words.get(name, 'not stated')}" for name in telling))
    footnotes: dict[str, int] = {}  # text -> index
    lines = []
    for row, cells_of_row, notes_of_row in zip(rows, cells, notes, strict=True):
        indices = [footnotes.setdefault(note, len(footnotes)) for note in notes_of_row if note]
        lines.append(make_line(cells_of_row, published=row.is_published, notes=indices))
    remarks = []
    if common:
        remarks.append(f"All rows: {', '.join(f'{name} {metadata[0][name]}' for name in common)}.")
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


def _alike(rows: Sequence[Row], cells: Sequence[Sequence[Cell]], notes: Sequence[Sequence[str]]) -> list[list[int]]:
    """Groups of two or more measured rows, as indices, that agree in their notes and in all cells that are not metrics."""
    found: dict[tuple, list[int]] = {}
    for index, (row, cells_of_row) in enumerate(zip(rows, cells, strict=True)):
        if not row.is_published:
            texts = tuple(cell.text for cell in cells_of_row if not cell.record_id)  # values of metrics have an id
            found.setdefault((texts, *notes[index]), []).append(index)
    return [members for members in found.values() if len(members) > 1]


def note_mark(index: int) -> str:
    """The mark of the footnote with this index: a, b, ..., z, aa, ab, ..."""
    letters = string.ascii_lowercase
    return letters[index] if index < 26 else note_mark(index // 26 - 1) + letters[index % 26]


def data_row(row: Row, section: int, marks: Mapping[tuple[str, str], str]) -> dict[str, object]:
    """A row of a table's data, column -> value: identity first, then value, interval, mark and record of each metric.

    section: number of its section, from 1. marks: (metric, mode) -> "best" or "tie".
    """
    record = row.representative
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
        "gflops_source": record.gflops_source,
    }
    for prefix, part in (("training", training), ("sampling", sampling), ("evaluation", evaluation)):
        if part is not None:
            kind: type = type(part)
            columns, values_of = _columns(prefix, kind)
            entry.update(zip(columns, values_of(part), strict=True))
    for key, mode in _in_order(tuple(row.records)):
        of_metric = row.records[key, mode]
        value = row.text((key, mode)) if row.is_published else of_metric.value  # published: the text as printed
        mark = marks.get((key, mode))
        fields = (value, of_metric.low, of_metric.high, of_metric.interval, mark, of_metric.id)
        entry.update(zip(_metric_columns(key, mode), fields, strict=True))
    return entry


@functools.lru_cache(maxsize=1024)
def _in_order(metrics: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """(metric, mode) pairs in the order of tables."""
    return tuple(sorted(metrics, key=lambda metric: (rank(metric[0]), metric[1])))


@functools.lru_cache(maxsize=1024)
def _metric_columns(key: str, mode: str) -> tuple[str, ...]:
    """The data columns of a metric: value, low, high, interval, mark and record, as `fid`, `fid_low`, ..."""
    name = f"{key}_{mode}" if mode else key
    return (name, *(f"{name}_{part}" for part in ("low", "high", "interval", "mark", "record")))


@functools.cache
def _columns(prefix: str, part: type) -> tuple[tuple[str, ...], operator.attrgetter]:
    """(columns, function from a part of a record to their values), without `mode`, which is in the names of metric columns.

    prefix: of the columns' names. part: the class, such as Training.
    """
    names = [field.name for field in dataclasses.fields(part) if field.name != "mode"]
    return tuple(f"{prefix}_{name}" for name in names), operator.attrgetter(*names)


def metric_columns(rows: Iterable[Row]) -> frozenset[str]:
    """The names of the data columns that belong to the metrics of these rows, those of `deviation_data` included."""
    names: set[str] = set()
    for metric in {metric for row in rows for metric in row.records}:
        columns = _metric_columns(*metric)
        names.update(columns, (f"{columns[0]}_{part}" for part in DEVIATION_PARTS))
    return frozenset(names)


def aligned(data: Sequence[dict[str, object]], last: Collection[str] = frozenset()) -> tuple[dict[str, object], ...]:
    """The rows with the same columns in each, None where a row had no value, without columns that are empty in all rows.

    last: columns that come last.
    """
    layouts = dict.fromkeys(tuple(entry) for entry in data)  # the different tuples of columns, of which there are few
    names = dict.fromkeys(name for layout in layouts for name in layout)  # every column once, in order of appearance
    kept = [name for name in names if any(entry.get(name) not in (None, "") for entry in data)]
    kept.sort(key=last.__contains__)  # False sorts before True; otherwise the order stays
    return tuple(dict(zip(kept, map(entry.get, kept), strict=True)) for entry in data)
