"""Quality over training: Figures 5 and 6 over steps, Figures 9 and 12 over compute."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

from reports.charts import Axis, Figure, Panel, Series, model_of
from reports.figures_study import (
    DETAILS,
    DIT,
    Study,
    at_one_length,
    best_at_usual_length,
    block_of,
    cost_columns,
    dit_title,
    figure_or_none,
    mark_rows,
    name_of,
    recipes_note,
    records_of,
    single_mark_series,
    steps_of,
    study_of,
    training_gflops,
)
from reports.fits import correlation
from reports.points import (
    BEYOND,
    Line,
    RecordIndex,
    bars_note,
    by_metric,
    comparable_groups,
    figure_row,
    is_guided,
    marks_of,
    quality_axis,
)
from results.metrics import LOSS, higher_is_better, rank
from results.records import Record

_SIZE_ORDER = ("3xs", "2xs", "xs", "s", "b", "l", "xl")
MAX_METRICS = 8  # rows of Figure 12


def conditioning_blocks(all_studies: Sequence[Study]) -> Figure | None:
    """Figure 5: the conditioning blocks of one DiT over training steps."""
    panels: list[Panel] = []
    rows: list[dict] = []
    for study in all_studies:
        bases: dict[str, list[Line]] = {}  # name without the block, as "dit-xl-2" -> lines
        for line in _over_steps(study):
            dit = DIT.fullmatch(line.model)
            if dit:
                bases.setdefault(f"dit-{dit['size']}-{dit['patch']}", []).append(line)
        for base, lines in sorted(bases.items()):
            if len({line.model for line in lines}) < 2:
                continue
            lines = _up_to_shared_length(lines)
            # model -> the name of its block
            blocks = {line.model: (block_of(line.model) or "adaLN-Zero").replace("adaln", "adaLN") for line in lines}
            title = f"Conditioning blocks of {dit_title(base)}"
            _steps_panel(study, lines, title, blocks.__getitem__, panels, rows)
    return figure_or_none("figure-5", "Conditioning blocks over training", panels, rows)


def _over_steps(study: Study) -> list[Line]:
    """The study's lines with the records that have a place on an axis of training steps; without lines that have none."""
    lines = [
        dataclasses.replace(
            line, records=tuple(r for r in line.records if (steps := steps_of(r)) is not None and steps < BEYOND)
        )
        for line in study.lines
    ]
    return [line for line in lines if line.records]


def _up_to_shared_length(lines: Sequence[Line]) -> list[Line]:
    """The lines, cut off at the longest training length that at least two models reach. Needs two models."""
    ends: dict[str, int] = {}  # model -> the longest training of all its lines, of which each recipe has one
    for line in lines:
        ends[line.model] = max(ends.get(line.model, 0), *(steps_of(record) or 0 for record in line.records))
    last_shared = sorted(ends.values())[-2]
    cut = [
        dataclasses.replace(line, records=tuple(r for r in line.records if (steps_of(r) or 0) <= last_shared))
        for line in lines
    ]
    kept = [line for line in cut if line.records]
    # At matched compute a small model may begin where a large one ends; then both are shown uncut.
    return kept if len({line.model for line in kept}) > 1 else list(lines)


def size_and_patch(all_studies: Sequence[Study]) -> Figure | None:
    """Figure 6: quality over training steps, of several sizes at one patch size (above) and of several patch sizes."""
    panels: list[Panel] = []
    rows: list[dict] = []
    for study in all_studies:
        dits = [(dit, line) for line in _over_steps(study) if (dit := DIT.fullmatch(line.model)) and not dit["block"]]
        sizes = [size for size in _SIZE_ORDER if any(dit["size"] == size for dit, _ in dits)]
        patches = sorted({int(dit["patch"]) for dit, _ in dits}, reverse=True)
        for fixed, values in (("patch", [str(patch) for patch in patches]), ("size", sizes)):
            first = True  # whether the next panel is the first with `fixed`, which begins a row
            for value in values:
                lines = [line for dit, line in dits if dit[fixed] == value]
                if len({line.model for line in lines}) < 2:
                    continue
                title = (
                    f"Patch size {value}, sizes differ" if fixed == "patch" else f"DiT-{value.upper()}, patches differ"
                )
                _steps_panel(study, _up_to_shared_length(lines), title, dit_title, panels, rows, starts_row=first)
                first = False
    return figure_or_none("figure-6", "Scaling size and patch over training", panels, rows, columns=4)


def _steps_panel(
    study: Study,
    lines: Sequence[Line],
    title: str,
    name: Callable[[str], str],
    panels: list[Panel],
    rows: list[dict],
    *,
    starts_row: bool = False,
) -> None:
    """Append a panel of quality over training steps to `panels`, and its data to `rows`.

    lines: those of the study that the panel shows. name: function from a model to the label of its line.
    """
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
            note="; ".join([*study.notes, *_single_values_note(series), *bars_note(series)]),
            starts_row=starts_row,
        )
    )
    rows += [
        figure_row(record, len(panels), line.label, cost_columns(record)) for line in lines for record in line.records
    ]


def _single_values_note(series: Sequence[Series]) -> list[str]:
    """[note] on why there are points instead of lines, if the paper states only one value for each line; else []."""
    only_points = all(each.provenance == "published" and len(each.marks) == 1 for each in series)
    return ["the paper states these values only"] if only_points else []


def training_compute(all_studies: Sequence[Study]) -> Figure | None:
    """Figure 9: quality against the Gflops of the whole training, both logarithmic, a line for each model."""
    panels: list[Panel] = []
    rows: list[dict] = []
    for study in all_studies:
        study = study.without_published_blocks()
        _compute_panel(study, quality_axis(study.records), panels, rows, is_log=True)
    return figure_or_none("figure-9", "Training compute and quality", panels, rows)


def other_metrics(index: RecordIndex, published: Sequence[Record]) -> Figure | None:
    """Figure 12: every metric against training compute (left) and against Gflops at one training length (right)."""
    panels: list[Panel] = []
    rows: list[dict] = []
    printed = [
        record
        for record in published
        if record.gflops
        and record.resolution == 256
        and (record.table in DETAILS if record.metric == "fid" else record.table == "Table 2")
        and not is_guided(record)
        and not block_of(model_of(record))
    ]
    groups, more = comparable_groups(index.every, printed)
    for group in groups:
        starts_row = True  # until the group has a panel
        wanted = sorted(_quality_metrics(group.records), key=rank)
        for (metric, _), records in list(by_metric(group.records, wanted).items())[:MAX_METRICS]:
            study = study_of(group, records, more)
            if study is None:
                continue
            axis = quality_axis(study.records)
            first = len(panels)
            _compute_panel(
                study, axis, panels, rows, is_log=False, title=f"{axis.title} over training", starts_row=starts_row
            )
            marked, note = at_one_length(study)
            best = best_at_usual_length(marked)
            pearson = correlation([math.log10(mark.x) for _, mark in best], [mark.y for _, mark in best])
            # Of the other metrics the paper prints only Table 2, whose systems are trained for different lengths.
            if metric != "fid" and all(line.provenance == "published" for line, _ in marked):
                marked = [(line, dataclasses.replace(mark, text=name_of(line))) for line, mark in marked]
                note, pearson = "each trained as long as its authors did", None
            if len(marked) > 1:
                series = tuple(single_mark_series(line, mark, "points") for line, mark in marked)
                notes = [*study.notes, note, *bars_note(series)]
                notes += (
                    [f"correlation with log Gflops {pearson.r:z.2f} ({pearson.n} models)", *recipes_note(marked)]
                    if pearson
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
                        starts_row=starts_row and len(panels) == first,
                    )
                )
                rows += mark_rows(len(panels), marked, {})
            starts_row = starts_row and len(panels) == first  # False once this metric has made a panel
    return figure_or_none("figure-12", "Scale and every metric", panels, rows, columns=4)


def _quality_metrics(records: Iterable[Record]) -> set[str]:
    """The metrics of these records whose direction is known, without losses."""
    # One record for each metric and stated direction: all others have the same answer.
    examples = {(record.metric, record.higher_is_better): record for record in records}
    directed = {metric for (metric, _), record in examples.items() if higher_is_better(record) is not None}
    return {metric for metric in directed if not metric.startswith(LOSS)}


def _compute_panel(
    study: Study,
    y: Axis,
    panels: list[Panel],
    rows: list[dict],
    *,
    is_log: bool,
    title: str = "",
    starts_row: bool = False,
) -> None:
    """Append a panel of quality over training Gflops to `panels`, and its data to `rows`; nothing for fewer than two marks.

    y: the axis of quality. is_log: True makes it logarithmic, False leaves it as it is.
    """
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
        drawn = [record for record in line.records if training_gflops(record)]
        rows += [figure_row(record, len(panels), line.label, cost_columns(record)) for record in drawn]
