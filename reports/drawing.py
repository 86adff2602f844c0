"""Drawing of figures: PNG for screens, SVG and PDF for papers.

Drawing is deterministic: with one matplotlib version, the same figure gives the same bytes.
"""

import io
import math
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache

import numpy as np

from reports.charts import Axis, Figure, Mark, Panel, Series, Style, series_styles
from reports.labels import Label, place_labels, place_texts
from reports.render import one_line

DOTS_PER_INCH = 160
_FILES = {  # kind -> metadata to leave out, because it would differ from run to run
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}
_DOTTED, _DASHES = (0, (1.2, 1.6)), {"solid": "-", "dashed": "--", "dashdot": "-.", "dotted": (0, (3, 1, 1, 1, 1, 1))}
_PANEL = (5.4, 3.9)  # width and height of the axes of a panel, inches
_MARGINS = (0.85, 0.25, 0.66)  # left, right, below the axes of each panel
_LINE = 11.5 / 72  # height of a line of the text above a panel
_TITLE = 0.36  # above all panels
_TILE = 0.72  # side of a picture in a grid of samples, inches
_NAMES = 0.85  # room for names beside bars, within the width of a panel
_BUBBLE = 900.0  # area of the largest bubble, in square points
_MANY = 30  # a line with more marks is drawn without them, as in charts.js
_HEADING = 8.2  # font size of the text above a panel


def draw(figure: Figure, styles: Mapping[str, Style], kinds: Sequence[str] = tuple(_FILES)) -> dict[str, bytes]:
    """The figure as {"png": bytes, "svg": bytes, "pdf": bytes}. styles: model -> style, of `charts.model_styles`."""
    with _theme():
        import matplotlib.pyplot as plt

        sheet = _grid_sheet(figure) if figure.grids else _panel_sheet(figure, styles)
        for text in sheet.findobj(lambda artist: hasattr(artist, "set_fontfeatures")):  # from matplotlib 3.11 on
            text.set_fontfeatures(("-liga",))  # no ligatures: a PDF would embed a further font for them
        files = {}
        for kind in kinds:
            buffer = io.BytesIO()
            sheet.savefig(buffer, format=kind, dpi=DOTS_PER_INCH, metadata=_FILES[kind])
            files[kind] = buffer.getvalue()
        plt.close(sheet)
    return files


def warm_up() -> None:
    """Draw a small figure, to load what the first figure needs: libraries, fonts, backends."""
    marks = (Mark(x=1.0, y=1.0, text="x"), Mark(x=2.0, y=2.0))
    series = Series(label="x", model="", kind="line", provenance="measured", marks=marks)
    panel = Panel(heading="x", title="x", x=Axis(title="x"), y=Axis(title="y"), series=(series,))
    draw(Figure(name="", title="x", panels=(panel,), rows=()), {"": Style(colour="#000000", marker="o", dash="solid")})


@contextmanager
def _theme() -> Iterator[None]:
    """A context with the style of all figures; matplotlib's settings are restored at its end."""
    import matplotlib

    matplotlib.use("Agg")
    with warnings.catch_warnings():
        # Warnings about seaborn's use of pandas and matplotlib; no figure depends on it.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=PendingDeprecationWarning)
        import seaborn

        with matplotlib.rc_context():
            seaborn.set_theme(context="notebook", style="ticks", font="DejaVu Sans")
            matplotlib.rcParams.update(
                {
                    "axes.spines.top": False,
                    "axes.spines.right": False,
                    "svg.hashsalt": "backbone-harness",  # else the ids in an SVG file are random
                    "svg.fonttype": "none",  # text as text, not as outlines
                    "pdf.fonttype": 42,  # TrueType, so that text can be edited
                    "path.simplify": True,
                }
            )
            yield


def _panel_sheet(figure: Figure, styles: Mapping[str, Style]):
    """The matplotlib figure of all panels, in rows. Lengths: inches.

    Places are computed, so that no layout has to be solved.
    """
    import matplotlib.pyplot as plt

    places = _panel_places(figure)
    columns = max(column for _, column in places) + 1
    rows = max(row for row, _ in places) + 1
    left, right, below = _MARGINS
    above = 0.22 + _LINE * max(len(_heading(panel)) for panel in figure.panels)
    width, height = left + _PANEL[0] + right, below + _PANEL[1] + above
    size = (columns * width, rows * height + _TITLE)
    sheet = plt.figure(figsize=size)
    sheet.text(
        left / size[0], 1 - 0.14 / size[1], figure.title, fontsize=13, fontweight="bold", va="top", parse_math=False
    )
    for panel, (row, column) in zip(figure.panels, places, strict=True):
        x, y = column * width + left, size[1] - _TITLE - (row + 1) * height + below
        inset = _NAMES if any(each.kind == "bars" for each in panel.series) else 0.0
        axes = sheet.add_axes(((x + inset) / size[0], y / size[1], (_PANEL[0] - inset) / size[0], _PANEL[1] / size[1]))
        _draw_panel(axes, panel, styles)
    return sheet


def _grid_sheet(figure: Figure):
    """The matplotlib figure of all grids: a row of tiles for each model, enlarged by repeating pixels. Lengths: inches."""
    import matplotlib.pyplot as plt

    left = 0.3 + 0.085 * max(len(name) for grid in figure.grids for name in grid.rows)  # of the tiles: room for names
    widths = [left + 0.1 + _TILE * len(grid.columns) for grid in figure.grids]
    heads = [
        [_drawable(line) for text in (grid.heading, grid.note) for line in _wrapped(text) if line]
        for grid in figure.grids
    ]
    heights = [0.3 + _LINE * len(head) + _TILE * len(grid.rows) for head, grid in zip(heads, figure.grids, strict=True)]
    width, height = max(widths), sum(heights) + _TITLE + 0.2
    sheet = plt.figure(figsize=(width, height))
    sheet.text(0.1 / width, 1 - 0.14 / height, figure.title, fontsize=13, fontweight="bold", va="top", parse_math=False)
    top = height - _TITLE  # of the next grid, from the bottom of the figure
    for head, grid, grid_height in zip(heads, figure.grids, heights, strict=True):
        rows, columns, tall, wide, channels = grid.tiles.shape  # tall, wide: pixels of a tile
        tiles_top = top - 0.3 - _LINE * len(head)
        for index, line in enumerate(head):
            place = (0.1 / width, (top - 0.1 - _LINE * (index + 0.5)) / height)
            sheet.text(*place, line, fontsize=_HEADING, color="0.35", va="center", parse_math=False)
        gap = 1 + max(tall, wide) // 24
        scale = max(1, -(-48 // max(tall, wide)))  # to at least 48 pixels, enlarged here so that no viewer smooths them
        canvas = np.full((rows * (tall * scale + gap), columns * (wide * scale + gap), channels), 255, np.uint8)
        for row in range(rows):
            for column in range(columns):
                tile = grid.tiles[row, column].repeat(scale, axis=0).repeat(scale, axis=1)
                y, x = row * (tall * scale + gap), column * (wide * scale + gap)
                canvas[y : y + tall * scale, x : x + wide * scale] = tile
        axes = sheet.add_axes(
            (left / width, (tiles_top - _TILE * rows) / height, _TILE * columns / width, _TILE * rows / height)
        )
        axes.imshow(
            canvas.squeeze(-1) if channels == 1 else canvas,
            cmap="gray",
            vmin=0,
            vmax=255,
            aspect="auto",
            interpolation="nearest",
        )
        axes.axis("off")
        for row, name in enumerate(grid.rows):
            place = ((left - 0.08) / width, (tiles_top - _TILE * (row + 0.47)) / height)
            sheet.text(*place, _drawable(name), fontsize=9, ha="right", va="center", parse_math=False)
        for column, name in enumerate(grid.columns):
            place = ((left + _TILE * (column + 0.46)) / width, (tiles_top + 0.05) / height)
            sheet.text(*place, _drawable(name), fontsize=8, ha="center", va="bottom", color="0.35", parse_math=False)
        top -= grid_height
    return sheet


def _panel_places(figure: Figure) -> list[tuple[int, int]]:
    """(row, column) of each panel, from 0."""
    places, row, column = [], 0, 0
    for panel in figure.panels:
        if column and (column == figure.columns or panel.starts_row):
            row, column = row + 1, 0
        places.append((row, column))
        column += 1
    return places


def _draw_panel(axes, panel: Panel, styles: Mapping[str, Style]) -> None:
    """Draw a panel into `axes`, whose size and place must be final."""
    labels: list[Label] = []  # names of lines, and the texts of points and bubbles
    texts: list[Label] = []  # small texts above marks of lines
    largest = max((mark.size or 0.0 for each in panel.series for mark in each.marks), default=0.0)
    _set_up_axes(axes, panel)
    looks = series_styles(panel, styles)
    _draw_intervals(axes, panel, looks)
    _draw_points(axes, panel, looks)
    for each, style in zip(panel.series, looks, strict=True):
        if each.kind in _DRAW_SERIES:
            _DRAW_SERIES[each.kind](axes, each, style, largest)
        ink = style.colour
        if each.kind in ("line", "fit"):
            last = each.marks[-1]
            labels += [(last.x, last.y, _drawable(each.label), ink)] if each.label else []
            texts += [(m.x, m.y if m.high is None else m.high, _drawable(m.text), "0.35") for m in each.marks if m.text]
        elif each.kind in ("points", "bubbles"):
            labels += [(mark.x, mark.y, _drawable(mark.text), ink) for mark in each.marks if mark.text]
    radii = [
        _bubble_radius(mark, largest) if each.kind == "bubbles" else 0.0 for each in panel.series for mark in each.marks
    ]
    if panel.x.scale != "names":
        place_labels(axes, labels, [(mark.x, mark.y) for each in panel.series for mark in each.marks], radii)
        low, high = axes.get_xlim()  # widened for the labels, so the ticks are chosen again
        if axes.get_xscale() == "log":
            axes.xaxis.get_major_locator().set_params(subs=_log_steps(high / low))
    place_texts(axes, texts, [(mark.x, mark.y) for each in panel.series for mark in each.marks])


def _bubble_radius(mark: Mark, largest: float) -> float:
    """Radius of a bubble in font points; a very small one is enlarged, to be visible.

    largest: the largest size in the panel; 0: no mark has a size, and all bubbles are equal.
    """
    area = max(_BUBBLE * (mark.size or 0.0) / largest, 12.0) if largest else 60.0
    return math.sqrt(area / math.pi)


def _draw_line(axes, series: Series, style: Style, largest: float) -> None:
    """Draw a line with its marks, or a fit without marks."""
    published, fit = series.provenance == "published", series.kind == "fit"
    xs = [mark.x for mark in series.marks]
    many = len(xs) > _MANY
    axes.plot(
        xs,
        [mark.y for mark in series.marks],
        color=style.colour,
        linewidth=1.4 if fit or many else 1.9,
        linestyle=_DOTTED if published else _DASHES["dashed" if fit else style.dash],
        marker="" if fit or many else style.marker,
        markersize=6.5,
        markerfacecolor="white" if published else style.colour,
        markeredgecolor=style.colour,
        markeredgewidth=1.4,
        zorder=3,
    )


def _draw_points(axes, panel: Panel, styles: Sequence[Style]) -> None:
    """Draw the marks of all series of points, as one artist for each kind of marker, because many artists are slow."""
    # (marker, faint) -> (x, y, colour inside, colour of the edge) of each mark
    found: dict[tuple[str, bool], list[tuple[float, float, str, str]]] = {}
    for each, style in zip(panel.series, styles, strict=True):
        if each.kind == "points":
            marker = "x" if each.provenance == "fit" else style.marker
            inside = "white" if each.provenance == "published" else style.colour
            places = found.setdefault((marker, each.faint), [])
            places += [(mark.x, mark.y, inside, style.colour) for mark in each.marks]
    for (marker, faint), places in found.items():
        xs, ys, insides, edges = zip(*places, strict=True)
        # A cross has no inside: matplotlib warns of colours for its edge.
        colours = {"color": edges} if marker == "x" else {"facecolors": insides, "edgecolors": edges}
        size, alpha = (4.5, 0.4) if faint else (7, 1.0)
        axes.scatter(xs, ys, s=size**2, marker=marker, alpha=alpha, linewidths=1.5, zorder=3, **colours)


def _draw_bubbles(axes, series: Series, style: Style, largest: float) -> None:
    published = series.provenance == "published"
    axes.scatter(
        [mark.x for mark in series.marks],
        [mark.y for mark in series.marks],
        s=[math.pi * _bubble_radius(mark, largest) ** 2 for mark in series.marks],
        facecolor=style.colour,
        alpha=0.45 if published else 0.85,
        edgecolor=style.colour,
        linewidth=1.2,
        zorder=3,
    )


def _draw_bars(axes, series: Series, style: Style, largest: float) -> None:
    """Draw horizontal bars: a mark's x is its place from top to bottom, its y the length of the bar, its size the Gflops."""
    published = series.provenance == "published"
    axes.barh(
        [mark.x for mark in series.marks],
        [mark.y for mark in series.marks],
        height=0.62,
        color=style.colour,
        alpha=0.55 if published else 0.95,
        edgecolor=style.colour,
        zorder=2,
    )
    end = axes.get_xlim()[1]
    if largest:
        axes.text(end, -0.62, "Gflops", va="center", ha="right", fontsize=8.5, color="0.25")
    for mark in series.marks:
        if mark.low is not None:
            axes.hlines(mark.x, mark.low, mark.high, color="black", linewidth=1.3, zorder=4)
        axes.text(
            max(mark.y, mark.high or 0.0) + 0.012 * end,
            mark.x,
            f"{mark.y:.4g}",
            va="center",
            fontsize=8.5,
            color="0.25",
        )
        if mark.size is not None and largest:  # a bubble in a separate column, beside the bars
            area = max(_BUBBLE * 0.5 * mark.size / largest, 3.0)
            axes.scatter([0.83 * end], [mark.x], s=[area], facecolor=style.colour, alpha=0.6, linewidth=0, zorder=3)
            axes.text(
                end,
                mark.x,
                f"{mark.size:.3g}" if mark.size < 1 else f"{mark.size:.4g}",
                va="center",
                ha="right",
                fontsize=8.5,
                color="0.25",
            )


def _draw_band(axes, series: Series, style: Style, largest: float) -> None:
    marks = [mark for mark in series.marks if mark.low is not None]
    axes.fill_between(
        [mark.x for mark in marks],
        [mark.low for mark in marks],
        [mark.high for mark in marks],
        color=style.colour,
        alpha=0.14,
        linewidth=0,
        zorder=1,
    )


# kind -> function that draws a series into axes. largest: the largest size of a mark in the panel.
_DRAW_SERIES = {"line": _draw_line, "fit": _draw_line, "bubbles": _draw_bubbles, "bars": _draw_bars, "band": _draw_band}


def _draw_intervals(axes, panel: Panel, styles: Sequence[Style]) -> None:
    """Draw the intervals of all marks as one artist: an artist for each mark would take most of the time of a panel.

    Not those of bars and bands, which are drawn with them, of faint series, and of series where they would merge.
    """
    from matplotlib.collections import LineCollection

    bars, colours = [], []  # bars: ((x, low), (x, high)) of each interval
    for each, style in zip(panel.series, styles, strict=True):
        ends = [(mark.x, mark.low, mark.high) for mark in each.marks if mark.low is not None and mark.high is not None]
        if each.kind in ("line", "fit", "points", "bubbles") and not each.faint and len(ends) <= 100:
            bars += [((x, low), (x, high)) for x, low, high in ends]
            colours += [style.colour] * len(ends)
    if bars:
        axes.add_collection(LineCollection(bars, colors=colours, linewidths=1.4, zorder=2), autolim=False)


def _set_up_axes(axes, panel: Panel) -> None:
    """Set limits, ticks and titles of the axes, and write the lines of text above the panel."""
    marks = [mark for each in panel.series for mark in each.marks]
    xs = [mark.x for mark in marks]
    not_bands = [mark for each in panel.series if each.kind != "band" for mark in each.marks]  # bands may be cut off
    ys = [bound for mark in not_bands for bound in (mark.y, mark.low, mark.high) if bound is not None]
    if panel.x.scale == "names":  # horizontal bars, so that names can be read
        names = {mark.x: mark.text for mark in marks}
        axes.set_yticks(list(names), [_drawable(text) for text in names.values()], fontsize=9, parse_math=False)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(max(xs) + 0.6, min(xs) - 0.9)  # the first at the top, below the title of the Gflops' column
        axes.set_xlim(0, 1.45 * max(ys))  # room for values and bubbles right of the bars
        axes.set_xlabel(_drawable(panel.y.text), fontsize=10.5, parse_math=False)
        axes.grid(visible=True, axis="x", color="0.92", zorder=0)
    else:
        _set_scale(axes, "x", panel.x, xs, below=0.06, above=0.06)
        _set_scale(axes, "y", panel.y, ys, below=0.1, above=0.12)
        axes.set_xlabel(_drawable(panel.x.text), fontsize=10.5, parse_math=False)
        axes.set_ylabel(_drawable(panel.y.text), fontsize=10.5, parse_math=False)
        axes.grid(visible=True, axis="y", color="0.92", zorder=0)
    axes.tick_params(labelsize=9.5, which="major")
    shown = _heading(panel)
    for index, line in enumerate(reversed(shown)):
        is_title = bool(panel.title) and index == len(shown) - 1
        axes.annotate(
            line,
            (0, 1),
            xycoords="axes fraction",
            xytext=(-72 * _NAMES if panel.x.scale == "names" else 0, 6 + 72 * _LINE * index),
            textcoords="offset points",
            fontsize=10 if is_title else _HEADING,
            fontweight="bold" if is_title else "normal",
            color="0.15" if is_title else "0.35",
            parse_math=False,
        )


def _heading(panel: Panel) -> list[str]:
    """The lines of text above a panel."""
    lines = [panel.title, *_wrapped(panel.heading), *_wrapped(panel.note)]
    return [_drawable(line) for line in lines if line]


def _set_scale(axes, name: str, axis: Axis, values: Sequence[float], below: float, above: float) -> None:
    """Set the limits of one axis with room around the values, and readable ticks.

    An axis with values that are not above 0 is linear, whatever its scale.
    name: "x" or "y". below, above: room, as shares of the range of the values.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = min(values), max(values)
    side = axes.xaxis if name == "x" else axes.yaxis
    set_limits = axes.set_xlim if name == "x" else axes.set_ylim
    if axis.scale == "log" and low > 0:
        (axes.set_xscale if name == "x" else axes.set_yscale)("log")
        ratio = max(high / low, 1.5)
        low, high = low / ratio**below, high * ratio**above
        set_limits(low, high)
        ratio = high / low
        side.set_major_locator(LogLocator(base=10, subs=_log_steps(ratio), numticks=12))
        side.set_major_formatter(FuncFormatter(_tick_text))
        side.set_minor_locator(NullLocator())  # drawing hundreds of minor ticks is slow
    else:
        span = high - low or 0.2 * abs(high) or 1.0  # above 0 also where all values are equal, or all are 0
        # Values above 0, but close to it in comparison with the largest: the axis does not extend below 0.
        floor = 0.0 if low >= 0 and low < 0.25 * high else -math.inf
        start = 0.0 if axis.from_zero else max(low - below * span, floor)
        set_limits(start, high + above * span)
        side.set_major_locator(MaxNLocator(nbins=6 if name == "x" else 7, steps=[1, 2, 2.5, 5, 10]))
        side.set_major_formatter(FuncFormatter(_tick_text))


def _log_steps(ratio: float) -> tuple[int, ...]:
    """Which multiples of powers of ten are ticks of a logarithmic axis. ratio: its right end over its left end."""
    if ratio < 8:
        return (1, 2, 3, 5, 7)
    if ratio < 200:
        return (1, 2, 5)
    return (1, 3) if ratio < 3000 else (1,)


def _tick_text(value: float, position: int | None = None) -> str:
    """The text of a tick: `0.05`, `2,000`, `400K`, `2M`; with a power of ten below 1e-4 and from 1e7 on.

    position: the tick's number, which matplotlib passes and which is not used.
    """
    size = abs(value)
    if size >= 1e7 or 0 < size < 1e-4:
        exponent = math.floor(math.log10(size) + 1e-9)  # the log of a power of ten may be rounded down
        factor = value / 10**exponent
        power = str(exponent).translate(
            str.maketrans("-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")
        )
        return f"10{power}" if math.isclose(factor, 1) else f"{factor:.3g}\u00d710{power}"
    if size >= 1e6:
        return f"{value / 1e6:.10g}M"
    return f"{value / 1e3:.10g}K" if size >= 1e5 else f"{value:,.6g}"


def _wrapped(text: str) -> list[str]:
    """The text in lines of at most 94 characters, which fit the width of a panel at the size _HEADING."""
    return textwrap.wrap(text, 94)


def _drawable(text: str) -> str:
    """The text on one line, with question marks for characters that the font does not have and would draw as boxes."""
    known = _characters()
    return "".join(character if ord(character) in known else "?" for character in one_line(text))


@cache
def _characters() -> frozenset[int]:
    """The code points that the font of all figures has."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return frozenset(get_font(findfont(FontProperties(family="DejaVu Sans"))).get_charmap())
