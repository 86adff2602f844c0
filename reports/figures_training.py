"""Quality over training: Figures 5 and 6 over steps, Figures 9 and 12 over compute."""

import dataclasses
import math
from collections.abc import Iterable, Sequence

from reports.charts import Axis, Figure, Panel, Series, model_of
from reports.figures_study import (
    DETAILS,
    DIT,
    Study,
    at_one_length,
    block_of,
    figure_of,
    mark_rows,
    name_of,
    one_mark,
    places_of,
    pretty,
    recipes_note,
    records_of,
    same_length,
    steps_of,
    study_of,
    training_gflops,
)
from reports.fits import correlation
from reports.points import (
    Line,
    RecordIndex,
    bars_note,
    by_metric,
    comparable_groups,
    data_row,
    is_guided,
    marks_of,
    quality_axis,
)
from results.metrics import LOSS, higher_is_better, rank
from results.records import Record

_SIZE_ORDER = ("xs", "s", "b", "l", "xl")
MAX_METRICS = 8  # rows of Figure 12


def conditioning_blocks(made: Sequence[Study]) -> Figure | None:
    """Figure 5: the conditioning blocks of one DiT over training steps."""
    panels: list[Panel] = []
    rows: list[dict] = []
    for study in made:
        bases: dict[str, list[Line]] = {}
        for line in study.lines:
            found = DIT.fullmatch(line.model)
            if found:
                bases.setdefault(f"dit-{found[1]}-{found[2]}", []).append(line)
        for base, lines in sorted(bases.items()):
            if len({line.model for line in lines}) < 2:
                continue
            lines = _shared_stretch(lines)
            blocks = {line.model: (block_of(line.model) or "adaLN-Zero").replace("adaln", "adaLN") for line in lines}
            title = f"Conditioning blocks of {pretty(base)}"
            _steps_panel(study, lines, title, blocks.__getitem__, panels, rows)
    return figure_of("figure-5", "Conditioning blocks over training", panels, rows)


def _shared_stretch(lines: Sequence[Line]) -> list[Line]:
    """The lines up to the last training length that two models reach."""
    ends = sorted({line.model: max(steps_of(r) or 0 for r in line.records) for line in lines}.values())
    reach = ends[-2]
    cut = [
        dataclasses.replace(line, records=tuple(r for r in line.records if (steps_of(r) or 0) <= reach))
        for line in lines
    ]
    kept = [line for line in cut if line.records]
    # At matched compute a small model may begin where a large one ends; then both are shown whole.
    return kept if len({line.model for line in kept}) > 1 else list(lines)


def size_and_patch(made: Sequence[Study]) -> Figure | None:
    """Figure 6: quality over training steps, of several sizes at one patch size (above) and of several patch sizes."""
    panels: list[Panel] = []
    rows: list[dict] = []
    for study in made:
        dits = [(found, line) for line in study.lines if (found := DIT.fullmatch(line.model)) and not found[3]]
        sizes = [size for size in _SIZE_ORDER if any(found[1] == size for found, _ in dits)]
        patches = sorted({int(found[2]) for found, _ in dits}, reverse=True)
        for part, kept in ((2, [str(patch) for patch in patches]), (1, sizes)):
            first = True
            for value in kept:
                lines = [line for found, line in dits if found[part] == value]
                if len({line.model for line in lines}) < 2:
                    continue
                title = f"Patch size {value}, sizes differ" if part == 2 else f"DiT-{value.upper()}, patches differ"
                _steps_panel(study, _shared_stretch(lines), title, pretty, panels, rows, starts_row=first)
                first = False
    return figure_of("figure-6", "Scaling size and patch over training", panels, rows, columns=4)


def _steps_panel(study, lines, title, name, panels, rows, *, starts_row=False) -> None:
    mixed = len({line.provenance for line in lines}) > 1
    series = tuple(
        Series(
            label=f"{name(line.model)} (paper)" if mixed and line.provenance == "published" else name(line.model),
            model=line.model,
            kind="line",
            provenance=line.provenance,
            marks=marks_of(line.records, steps_of),
        )
        for line in lines
    )
    records = [record for line in lines for record in line.records]
    axis = Axis(title="Training steps", from_zero=True)
    y = quality_axis(records)
    panels.append(
        Panel(
            heading=study.group.heading,
            title=title,
            x=axis,
            y=y,
            series=series,
            note="; ".join([*study.notes, *_lone(series), *bars_note(series)]),
            starts_row=starts_row,
        )
    )
    rows += [data_row(record, len(panels), line.label, places_of(record)) for line in lines for record in line.records]


def _lone(series: Sequence[Series]) -> list[str]:
    """A note on why there are points instead of lines, where there are."""
    alone = all(each.provenance == "published" and len(each.marks) == 1 for each in series)
    return ["the paper states these values only"] if alone else []


def training_compute(made: Sequence[Study]) -> Figure | None:
    """Figure 9: quality against the Gflops of the whole training, both logarithmic, a line for each model."""
    panels: list[Panel] = []
    rows: list[dict] = []
    for study in made:
        study = study.only(lambda line: line.provenance == "measured" or not block_of(line.model))
        _compute_panel(study, quality_axis(study.records), panels, rows, is_log=True)
    return figure_of("figure-9", "Training compute and quality", panels, rows)


def other_metrics(index: RecordIndex, published: Sequence[Record]) -> Figure | None:
    """Figure 12: every metric against training compute (left) and against Gflops at one training length (right)."""
    panels: list[Panel] = []
    rows: list[dict] = []
    printed = [
        record
        for record in published
        if record.gflops
        and record.resolution == 256
        and (record.metric == "fid" if record.table in DETAILS else record.table == "Table 2")
        and not is_guided(record)
        and (record.metric != "fid" or record.table in DETAILS)
        and not block_of(model_of(record))
    ]
    groups, more = comparable_groups(index.every, printed)
    for group in groups:
        starts = True
        wanted = sorted(_directed(group.records), key=rank)
        for (metric, _), records in list(by_metric(group.records, wanted).items())[:MAX_METRICS]:
            study = study_of(group, records, more)
            if study is None:
                continue
            axis = quality_axis(study.records)
            first = len(panels)
            _compute_panel(
                study, axis, panels, rows, is_log=False, title=f"{axis.title} over training", starts_row=starts
            )
            marked, note = at_one_length(study)
            same = same_length(marked)
            found = correlation([math.log10(mark.x) for _, mark in same], [mark.y for _, mark in same])
            if metric != "fid" and all(line.provenance == "published" for line, _ in marked):
                marked = [(line, dataclasses.replace(mark, text=name_of(line))) for line, mark in marked]
                note, found = "each trained as long as its authors did", None
            if len(marked) > 1:
                series = tuple(one_mark(line, mark, "points") for line, mark in marked)
                notes = [*study.notes, note, *bars_note(series)]
                notes += (
                    [f"correlation with log Gflops {found.r:.2f} ({found.n} models)", *recipes_note(marked)]
                    if found
                    else []
                )
                panels.append(
                    Panel(
                        heading=group.heading,
                        title=f"{axis.title} against Gflops",
                        x=Axis(title="Backbone compute", unit="Gflops a forward pass", scale="log"),
                        y=quality_axis(records_of(marked)),
                        series=series,
                        note="; ".join(text for text in notes if text),
                        starts_row=starts and len(panels) == first,
                    )
                )
                rows += mark_rows(len(panels), marked, {})
            starts = starts and len(panels) == first
    return figure_of("figure-12", "Scale and every metric", panels, rows, columns=4)


def _directed(records: Iterable[Record]) -> set[str]:
    """The metrics of known direction, without losses."""
    examples = {(record.metric, record.higher_is_better): record for record in records}
    found = {metric for (metric, _), record in examples.items() if higher_is_better(record) is not None}
    return {metric for metric in found if not metric.startswith(LOSS)}


def _compute_panel(
    study: Study, y: Axis, panels, rows, *, is_log: bool, title: str = "", starts_row: bool = False
) -> None:
    mixed = len({line.provenance for line in study.lines}) > 1
    series = []
    for line in study.lines:
        marks = marks_of(line.records, training_gflops)
        if marks:
            label = name_of(line, plain=not mixed)
            series.append(Series(label=label, model=line.model, kind="line", provenance=line.provenance, marks=marks))
    if sum(len(each.marks) for each in series) < 2:
        return
    panels.append(
        Panel(
            heading=study.group.heading,
            title=title,
            x=Axis(title="Training compute", unit="Gflops", scale="log"),
            y=dataclasses.replace(y, scale="log") if is_log else y,
            series=tuple(series),
            note="; ".join([*study.notes, *bars_note(series)]),
            starts_row=starts_row,
        )
    )
    for line in study.lines:
        found = [record for record in line.records if training_gflops(record)]
        rows += [data_row(record, len(panels), line.label, places_of(record)) for record in found]
