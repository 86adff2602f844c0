"""Figures as the page's script draws them: the marks of every series, with colour and marker of the static figures."""

from collections.abc import Iterable, Mapping

from reports.charts import Figure, Panel, Series, Style
from reports.page.beside import picture_uri

MOST_MARKS = 4000  # of one panel
_PLAIN = Style(colour="#555555", marker="o", dash="solid")


def figure_data(figure: Figure, styles: Mapping[str, Style], files: Mapping[str, bytes]) -> dict[str, object]:
    """files: the report's other files; the PNG of a figure that shows pictures is taken from them."""
    pictures = []
    if figure.grids and f"{figure.name}.png" in files:
        uri = picture_uri(files[f"{figure.name}.png"])
        pictures = [{"src": uri, "alt": "; ".join(grid.heading for grid in figure.grids)}] if uri else []
    return {
        "name": figure.name,
        "title": figure.title,
        "panels": [_panel_data(panel, styles) for panel in figure.panels],
        "pictures": pictures,
    }


def record_ids(figures: Iterable[Figure]) -> list[str]:
    """Of every record that stands behind a mark."""
    marks = (mark for figure in figures for panel in figure.panels for series in panel.series for mark in series.marks)
    return [name for mark in marks for name in mark.record_ids]


def _panel_data(panel: Panel, styles: Mapping[str, Style]) -> dict[str, object]:
    x = {"text": panel.x.text, "scale": panel.x.scale}
    if panel.x.scale == "names":
        names = {int(mark.x): mark.text for series in panel.series for mark in series.marks}
        x["names"] = [names.get(index, "") for index in range(max(names, default=-1) + 1)]
    count = sum(len(series.marks) for series in panel.series)
    every = -(-count // MOST_MARKS)  # of a long curve every so many marks, one is enough
    notes = [panel.note] if panel.note else []
    if every > 1:
        notes.append(f"one mark of {every} is drawn here")
    return {
        "title": panel.title,
        "heading": panel.heading,
        "note": "; ".join(notes),
        "x": x,
        "y": {"text": panel.y.text, "scale": panel.y.scale},
        "series": [_series_data(series, styles, every, panel.x.scale == "names") for series in panel.series],
    }


def _series_data(series: Series, styles: Mapping[str, Style], every: int, named: bool) -> dict[str, object]:
    style = styles.get(series.model, _PLAIN)
    return {
        "label": series.label or series.model,
        "kind": series.kind,
        "provenance": series.provenance,
        "colour": style.colour,
        "marker": style.marker,
        "dash": style.dash,
        "marks": [
            {
                "x": mark.x,
                "y": mark.y,
                "low": mark.low,
                "high": mark.high,
                "size": mark.size,
                "text": mark.text,
                "said": "" if named else mark.text,
                "records": list(mark.record_ids),
                "facts": [list(pair) for pair in mark.facts],
            }
            for mark in series.marks[::every]
        ],
    }
