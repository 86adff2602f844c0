"""Parts of the figures on scaling: the lines of a panel, marks at one training length, names and rows."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence

from reports.charts import Figure, Mark, Panel, Series
from reports.points import (
    BEYOND,
    SIGNS,
    Group,
    Line,
    RecordIndex,
    better,
    comparable_groups,
    figure_row,
    left_out_note,
    lines_of,
    marks_of,
    paper_name,
    quality,
    usual_sampling,
)
from reports.texts import count_text
from results.experiments import ALONG_TRAINING
from results.records import Record, Training

# Tables of the paper: DETAILS has all DiTs with their training, SYSTEMS compare the best of them with other systems.
DETAILS, SYSTEMS = ("Table 4",), ("Table 2", "Table 3")
DIT = re.compile(r"dit-(?P<size>3xs|2xs|xs|s|b|l|xl)-(?P<patch>\d+)(?:-(?P<block>in-context|cross-attention|adaln))?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """The lines of one panel: comparable records of one metric, with the sampling setting that most models share.

    notes: sentences without a full stop, to be shown above the panel.
    """

    group: Group
    lines: tuple[Line, ...]
    notes: tuple[str, ...]

    @property
    def records(self) -> list[Record]:
        """The records of all lines."""
        return [record for line in self.lines for record in line.records]

    def without_published_blocks(self) -> "Study":
        """The study without the paper's DiTs of other blocks than adaLN-Zero, which only Figure 5 shows."""
        kept = tuple(line for line in self.lines if line.provenance == "measured" or not block_of(line.model))
        return dataclasses.replace(self, lines=kept)


def studies(index: RecordIndex, published: Iterable[Record]) -> list[Study]:
    """A study of FID, or of FD where there is no FID, for each set of comparable records."""
    printed = [record for record in published if record.metric == "fid" and record.table in DETAILS]
    groups, more = comparable_groups(index.quality, printed)
    group_studies = [study_of(group, quality(group.records), more) for group in groups]
    return [study for study in group_studies if study is not None]


def study_of(group: Group, records: Sequence[Record], more: int) -> Study | None:
    """The study of these records of a group, which have one metric; None without trained or published records.

    more: number of groups that are not drawn, for the note on them.
    """
    records = [record for record in records if record.training is not None or record.provenance == "published"]
    if not records:
        return None
    usual, note = usual_sampling(records)
    lines, omitted = lines_of(usual, ALONG_TRAINING, Training)
    notes = [note, left_out_note(omitted, more)]
    return Study(group=group, lines=tuple(lines), notes=tuple(text for text in notes if text))


def at_one_length(
    study: Study, gflops: Callable[[Record], float | None] = lambda record: cost_or_none(record.gflops)
) -> tuple[list[tuple[Line, Mark]], str]:
    """([(line, mark), ...] of each line at the training length that most models share, note that names the length).

    gflops: function from a record to the x of its mark; None: no mark. A mark's text is the name of its line, and its size
    the number of parameters. A line without the usual length is shown at its longest training, which the mark's text states.
    """
    models: dict[int | None, set[str]] = {}
    for line in study.lines:
        for record in line.records:
            models.setdefault(steps_of(record), set()).add(line.model)
    if not models:
        return [], ""
    usual = max(models, key=lambda steps: (len(models[steps]), steps or 0))
    marked = []
    for line in study.lines:
        lengths = {steps_of(record) for record in line.records}
        steps = usual if usual in lengths else max(lengths, key=lambda length: length or 0)
        records = [record for record in line.records if steps_of(record) == steps]
        for mark in marks_of(records, gflops):
            text = name_of(line) if steps == usual else f"{name_of(line)} ({count_text(steps)} steps)"
            marked.append((line, dataclasses.replace(mark, text=text, size=cost_or_none(records[0].params))))
    return marked, f"after {count_text(usual)} training steps" if usual else ""


def best_at_usual_length(marked: Sequence[tuple[Line, Mark]]) -> list[tuple[Line, Mark]]:
    """One (line, mark) for each model that has the usual training length: a measured one if there is one, of several the best.

    marked: as `at_one_length` returns it. Models without the usual length are left out.
    """
    return [min(pairs, key=_sort_key) for pairs in _at_usual_length_by_model(marked).values()]


def recipes_note(marked: Sequence[tuple[Line, Mark]]) -> list[str]:
    """[note] on which value of a model enters a fit, if a model has several measured ones at the usual training length; else []."""
    counts = [
        sum(line.provenance == "measured" for line, _ in pairs) for pairs in _at_usual_length_by_model(marked).values()
    ]
    if all(count < 2 for count in counts):
        return []
    fewest = min(max(count, 1) for count in counts)
    note = "of a model's several recipes its best value counts in fit and correlation"
    # The best of k equal recipes is the luckiest. Where all models have as many, the law is shifted and keeps its exponent.
    if fewest < max(counts):
        note += (
            f" (best of {fewest} to {max(counts)}): the best of more is better by luck alone, which tilts the law, and its "
            "intervals leave that out; compare one recipe for all"
        )
    else:
        note += f" (best of {fewest} each), which is better than their mean by luck alone; intervals leave that out"
    return [note]


def _at_usual_length_by_model(marked: Sequence[tuple[Line, Mark]]) -> dict[str, list[tuple[Line, Mark]]]:
    """Model -> the (line, mark)s at the usual training length, which are those whose text states no other length."""
    by_model: dict[str, list[tuple[Line, Mark]]] = {}
    for line, mark in marked:
        if mark.text == name_of(line):  # otherwise `at_one_length` has added another length
            by_model.setdefault(line.model, []).append((line, mark))
    return by_model


def _sort_key(pair: tuple[Line, Mark]) -> tuple[bool, float]:
    """Sorts measured marks before published ones, and better values before worse."""
    line, mark = pair
    return line.provenance != "measured", SIGNS[better(line.records)] * mark.y


def records_of(marked: Sequence[tuple[Line, Mark]]) -> list[Record]:
    """The records that the marks show."""
    drawn = {record_id for _, mark in marked for record_id in mark.record_ids}
    return [record for line, _ in marked for record in line.records if record.id in drawn]


def name_of(line: Line, *, plain: bool = True) -> str:
    """The name of a line in a figure: `DiT-XL/2` for a published one, the label of a measured one.

    plain: False adds " (paper)" to published names.
    """
    if line.provenance == "measured":
        return line.label
    name = paper_name(line.records[0])
    return name if plain else f"{name} (paper)"


def dit_title(model: str) -> str:
    """`DiT-XL/2` for dit-xl-2 and its blocks, such as dit-xl-2-adaln; the names of other models as they are."""
    dit = DIT.fullmatch(model)
    return model if dit is None else f"DiT-{dit['size'].upper()}/{dit['patch']}"


def block_of(model: str) -> str:
    """The block in a DiT's name: "in-context", "cross-attention" or "adaln"; "" for adaLN-Zero and for other models."""
    dit = DIT.fullmatch(model)
    return (dit["block"] or "") if dit else ""


def single_mark_series(line: Line, mark: Mark, kind: str) -> Series:
    """A series of this mark alone, with the name and style of its line."""
    return Series(label=name_of(line), model=line.model, kind=kind, provenance=line.provenance, marks=(mark,))


def steps_of(record: Record) -> int | None:
    """Training steps; None if they are not stated."""
    return record.training.steps if record.training else None


def training_gflops(record: Record) -> float | None:
    """Gflops of the whole training, if they fit on a logarithmic axis, else None."""
    return cost_or_none(record.training.gflops) if record.training else None


def cost_or_none(value: float | None) -> float | None:
    """The value, if it is above 0 and fits on a logarithmic axis, else None."""
    return float(value) if value is not None and 0 < value < BEYOND else None


def cost_columns(record: Record) -> dict[str, object]:
    """Column -> value of the figure's data that state the cost of a record."""
    return {"params": record.params, "gflops": record.gflops, "training_gflops": training_gflops(record)}


def mark_rows(panel: int, marked: Sequence[tuple[Line, Mark]], more: dict[str, object]) -> list[dict]:
    """The rows of data of the records that the marks show. panel: number from 1. more: column -> value of further columns."""
    rows = []
    for line, mark in marked:
        drawn = set(mark.record_ids)
        rows += [figure_row(r, panel, mark.text, cost_columns(r) | more) for r in line.records if r.id in drawn]
    return rows


def figure_or_none(name: str, title: str, panels: list[Panel], rows: list[dict], columns: int = 2) -> Figure | None:
    """The figure; None without panels."""
    if not panels:
        return None
    return Figure(name=name, title=title, panels=tuple(panels), rows=tuple(rows), columns=columns)
