"""Figure 10: quality against the compute of sampling an image."""

from collections.abc import Callable, Sequence

from reports.charts import Axis, Figure, Panel, Series
from reports.figures_study import cost_or_none, name_of
from reports.points import (
    ALONG_SAMPLING,
    QUALITY_METRICS,
    Group,
    RecordIndex,
    bars_note,
    by_metric,
    comparable_groups,
    figure_row,
    left_out_note,
    lines_of,
    longest_trained,
    marks_of,
    quality_axis,
)
from reports.texts import sampling_steps_text
from results.records import Record, Sampling

FIGURE_10_SOURCE = "Section 5.2"
FEW_LINES = 6  # the most lines whose marks have texts


def sampling_compute(index: RecordIndex, published: Sequence[Record]) -> Figure | None:
    """Figure 10: quality against Gflops per image (log), a line for each model; a second panel counts the decoder."""
    printed = [record for record in published if record.table == FIGURE_10_SOURCE]
    groups, more = comparable_groups(index.quality, printed)
    ours = [group for group in groups if group.representative.provenance == "measured"]
    panels: list[Panel] = []
    rows: list[dict[str, object]] = []
    for group in ours or groups:  # the paper's points have no panel of their own beside measured curves
        usable = [
            record
            for record in group.records
            if record.sampling and cost_or_none(record.sampling.gflops_per_image) is not None
        ]
        for members in by_metric(usable, QUALITY_METRICS).values():
            _sampling_panels(group, members, panels, rows, more)
    if not panels:
        return None
    return Figure(
        name="figure-10", title="Sampling compute against sample quality", panels=tuple(panels), rows=tuple(rows)
    )


def _sampling_panels(group: Group, records: list[Record], panels: list[Panel], rows: list[dict], more: int) -> None:
    """Append the panels of one metric of a group to `panels`, and their data to `rows`.

    more: number of groups that are not drawn, for the note on them.
    """
    lines, omitted = lines_of(records, ALONG_SAMPLING, Sampling)
    notes_longest = False  # whether a note says that only the longest trainings are drawn
    if len(lines) > FEW_LINES:  # the longest training of each system, instead of a line for each training length
        lines, omitted = lines_of(longest_trained(records), ALONG_SAMPLING, Sampling)
        # If records were left out, and for this reason alone.
        notes_longest = sum(len(line.records) for line in lines) < len(records) and not omitted
    choices: list[tuple[str, Callable[[Record], float | None]]] = [("decoder not counted", _sampling_gflops)]
    if any((record.sampling or Sampling()).decoder_gflops for line in lines for record in line.records):
        choices.append(("decoder counted", _decoded_gflops))
    few = len(lines) <= FEW_LINES
    mixed = len({line.provenance for line in lines}) > 1
    first_panel = len(panels) + 1  # number of the first panel; its rows of data have the values of both
    for title, gflops in choices:
        series = tuple(
            Series(
                label=name_of(line, plain=not mixed),
                model=line.model,
                kind="line",
                provenance=line.provenance,
                marks=marks,
            )
            for line in lines
            if (marks := marks_of(line.records, gflops, sampling_steps_text if few else lambda record: ""))
        )
        notes = ["numbers at the marks: sampling steps"] if few else []
        notes += bars_note(series)
        notes += ["the longest training of each system"] if notes_longest else []
        notes += [left_out_note(omitted, more)] if omitted or more else []
        panels.append(
            Panel(
                heading=group.heading,
                title=title if len(choices) > 1 else "",
                x=Axis(title="Sampling compute", unit=f"Gflops per image, {title}", scale="log"),
                y=quality_axis(records),
                series=series,
                note="; ".join(notes),
            )
        )
    for line in lines:
        for record in line.records:
            places = {column: gflops(record) for column, gflops in _GFLOPS.items()}
            rows.append(figure_row(record, first_panel, line.label, places))


def _sampling_gflops(record: Record) -> float | None:
    """Gflops per image without the decoder."""
    return record.sampling.gflops_per_image if record.sampling else None


def _decoded_gflops(record: Record) -> float | None:
    """Gflops per image with the decoder; None if the cost of the decoder is not known."""
    sampling = record.sampling or Sampling()
    if sampling.gflops_per_image is None or (sampling.decoder is not None and sampling.decoder_gflops is None):
        return None
    return sampling.gflops_per_image + (sampling.decoder_gflops or 0.0)


# Column of the figure's data -> function from a record to its value.
_GFLOPS = {"gflops_per_image": _sampling_gflops, "gflops_per_image_with_decoder": _decoded_gflops}
