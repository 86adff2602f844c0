"""The data of figures for the page's script: the marks of every series, with the styles of the static figures."""

import re
from collections.abc import Iterable, Mapping

from reports.charts import Figure, Mark, Panel, Series, Style, series_styles
from reports.page.payload import Json
from reports.page.run_artifacts import picture_uri

MAX_MARKS = 4000  # of one panel


def figure_data(figure: Figure, styles: Mapping[str, Style]) -> Json:
    """A figure for the script, without the pictures of `figure_pictures`."""
    number = re.fullmatch(r"figure-(\d+)", figure.name)
    return {
        "name": figure.name,
        "title": f"Figure {number[1]}. {figure.title}" if number else figure.title,
        "panels": [_panel_data(panel, styles) for panel in figure.panels],
    }


def figure_pictures(figure: Figure, files: Mapping[str, bytes]) -> list[dict[str, str]]:
    """[{"src": data URI, "alt": text}] of the PNG of a figure of sample grids, which the script cannot draw; else [].

    files: name -> content of the report's other files.
    """
    if not figure.grids or f"{figure.name}.png" not in files:
        return []
    uri = picture_uri(files[f"{figure.name}.png"])
    return [{"src": uri, "alt": "; ".join(grid.heading for grid in figure.grids)}] if uri else []


def record_ids(figures: Iterable[Figure]) -> list[str]:
    """The ids of the records of all marks, with repetitions."""
    marks = (mark for figure in figures for panel in figure.panels for series in panel.series for mark in series.marks)
    return [record_id for mark in marks for record_id in mark.record_ids]


def _panel_data(panel: Panel, styles: Mapping[str, Style]) -> dict[str, object]:
    """A panel for the script, with at most about MAX_MARKS marks."""
    x: dict[str, object] = {"text": panel.x.text, "scale": panel.x.scale}
    if panel.x.scale == "names":  # the script needs a name for each of 0, 1, 2, ..., also where no mark is
        names = {int(mark.x): mark.text for series in panel.series for mark in series.marks}
        x["names"] = [names.get(index, "") for index in range(max(names, default=-1) + 1)]
    count = sum(len(series.marks) for series in panel.series)
    every = max(1, -(-count // MAX_MARKS))  # one in `every` marks of each series is kept
    notes = [panel.note] if panel.note else []
    if every > 1:
        notes.append(f"one mark of {every} is drawn here")
    return {
        "title": panel.title,
        "heading": panel.heading,
        "note": "; ".join(notes),
        "x": x,
        "y": {"text": panel.y.text, "scale": panel.y.scale},
        "starts_row": panel.starts_row,
        "series": [
            _series_data(series, style, every)
            for series, style in zip(panel.series, series_styles(panel, styles), strict=True)
        ],
    }


def _series_data(series: Series, style: Style, every: int) -> dict[str, object]:
    """A series for the script, with one in `every` marks."""
    return {
        "label": series.label or series.model,
        "kind": series.kind,
        "provenance": series.provenance,
        "colour": style.colour,
        "marker": "X" if series.provenance == "fit" else style.marker,  # points of fits are predictions: crosses
        "dash": style.dash,
        "marks": [_mark_data(mark) for mark in series.marks[::every]],
    }


def _mark_data(mark: Mark) -> dict[str, object]:
    """A mark for the script, small because a training curve has thousands: no empty fields, numbers with seven digits."""
    found = {
        **{name: _rounded(getattr(mark, name)) for name in ("x", "y", "low", "high", "size")},
        "text": mark.text or None,
        "records": list(mark.record_ids) or None,
        "facts": [list(pair) for pair in mark.facts] or None,
    }
    return {name: value for name, value in found.items() if value is not None}


def _rounded(value: float | None) -> float | None:
    """The value with seven significant digits."""
    return None if value is None else float(f"{value:.7g}")
