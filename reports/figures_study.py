"""Parts of the figures on scaling: the lines of a panel, marks at one training length, names and rows."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence

from reports.charts import Figure, Mark, Panel, Series
from reports.points import (
    ALONG_TRAINING,
    BEYOND,
    SIGNS,
    Group,
    Line,
    RecordIndex,
    better,
    comparable_groups,
    data_row,
    left_out,
    lines_of,
    marks_of,
    paper_name,
    quality,
    usual_sampling,
)
from reports.texts import count_text
from results.records import Record, Training

DETAILS, SYSTEMS = ("Table 4",), ("Table 2", "Table 3")
DIT = re.compile(r"dit-(xs|s|b|l|xl)-(\d+)(?:-(in-context|cross-attention|adaln))?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """The lines of one panel: comparable records of one metric, drawn with one usual sampling setting."""

    group: Group
    lines: tuple[Line, ...]
    notes: tuple[str, ...]

    @property
    def records(self) -> list[Record]:
        """The records of all lines."""
        return [record for line in self.lines for record in line.records]

    def only(self, wanted: Callable[[Line], bool]) -> "Study":
        """The study with the wanted lines alone."""
        return dataclasses.replace(self, lines=tuple(line for line in self.lines if wanted(line)))


def studies(index: RecordIndex, published: Iterable[Record]) -> list[Study]:
    """A study of FID, or of FD where there is no FID, for each set of comparable records."""
    printed = [record for record in published if record.metric == "fid" and record.table in DETAILS]
    groups, more = comparable_groups(index.quality, printed)
    made = [study_of(group, quality(group.records), more) for group in groups]
    return [study for study in made if study is not None]


def study_of(group: Group, records: Sequence[Record], more: int) -> Study | None:
    records = [record for record in records if record.training is not None or record.provenance == "published"]
    if not records:
        return None
    usual, note = usual_sampling(records)
    lines, omitted = lines_of(usual, ALONG_TRAINING, Training)
    notes = [note, left_out(omitted, more)]
    return Study(group=group, lines=tuple(lines), notes=tuple(text for text in notes if text))


def at_one_length(study: Study, gflops: Callable[[Record], float | None] = lambda record: above_zero(record.gflops)):
    """(line, mark) of each line at the training length that most models share, and a note that names the length.

    A line without that length is shown at its longest, which its text states.
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
        steps = usual if usual in lengths else max(lengths, key=lambda each: each or 0)
        own = [record for record in line.records if steps_of(record) == steps]
        for mark in marks_of(own, gflops):
            text = name_of(line) if steps == usual else f"{name_of(line)} ({count_text(steps)} steps)"
            marked.append((line, dataclasses.replace(mark, text=text, size=above_zero(own[0].params))))
    return marked, f"after {count_text(usual)} training steps" if usual else ""


def same_length(marked: Sequence[tuple[Line, Mark]]) -> list[tuple[Line, Mark]]:
    """One mark for each model at the usual training length: a measured one if there is one, of several the best."""
    return [min(own, key=_how_bad) for own in _by_model(marked).values()]


def recipes_note(marked: Sequence[tuple[Line, Mark]]) -> list[str]:
    """A note on which value of a model enters a fit, where it has several at the usual training length."""
    if all(sum(line.provenance == "measured" for line, _ in own) < 2 for own in _by_model(marked).values()):
        return []
    return ["of a model's several recipes its best value counts in fit and correlation"]


def _by_model(marked: Sequence[tuple[Line, Mark]]) -> dict[str, list[tuple[Line, Mark]]]:
    found: dict[str, list[tuple[Line, Mark]]] = {}
    for line, mark in marked:
        if mark.text == name_of(line):
            found.setdefault(line.model, []).append((line, mark))
    return found


def _how_bad(pair: tuple[Line, Mark]) -> tuple[bool, float]:
    line, mark = pair
    return line.provenance != "measured", SIGNS[better(line.records)] * mark.y


def records_of(marked: Sequence[tuple[Line, Mark]]) -> list[Record]:
    drawn = {record_id for _, mark in marked for record_id in mark.record_ids}
    return [record for line, _ in marked for record in line.records if record.id in drawn]


def name_of(line: Line, *, plain: bool = True) -> str:
    """`DiT-XL/2` for a published line, the label of a measured one. plain: without `(paper)` after published names."""
    if line.provenance == "measured":
        return line.label
    name = paper_name(line.records[0])
    return name if plain else f"{name} (paper)"


def pretty(model: str) -> str:
    found = DIT.fullmatch(model)
    return model if found is None else f"DiT-{found[1].upper()}/{found[2]}"


def block_of(model: str) -> str:
    """The name of a DiT's conditioning block where it is not the paper's own choice."""
    found = DIT.fullmatch(model)
    return (found[3] or "") if found else ""


def one_mark(line: Line, mark: Mark, kind: str) -> Series:
    return Series(label=name_of(line), model=line.model, kind=kind, provenance=line.provenance, marks=(mark,))


def steps_of(record: Record) -> int | None:
    return record.training.steps if record.training else None


def training_gflops(record: Record) -> float | None:
    return above_zero(record.training.gflops) if record.training else None


def above_zero(value: float | None) -> float | None:
    """A cost if it fits on a logarithmic axis, else None."""
    return float(value) if value is not None and 0 < value < BEYOND else None


def places_of(record: Record) -> dict[str, object]:
    return {"params": record.params, "gflops": record.gflops, "training_gflops": training_gflops(record)}


def mark_rows(panel: int, marked: Sequence[tuple[Line, Mark]], more: dict[str, object]) -> list[dict]:
    rows = []
    for line, mark in marked:
        drawn = set(mark.record_ids)
        rows += [data_row(r, panel, mark.text, places_of(r) | more) for r in line.records if r.id in drawn]
    return rows


def figure_of(name: str, title: str, panels: list[Panel], rows: list[dict], columns: int = 2) -> Figure | None:
    if not panels:
        return None
    return Figure(name=name, title=title, panels=tuple(panels), rows=tuple(rows), columns=columns)
