"""Figures with seaborn: PNG for screens, SVG for papers.

Drawing is deterministic: the same points give the same bytes under one matplotlib version.
"""

import dataclasses
import io
import math
import textwrap
import warnings
from collections.abc import Sequence

from reports.columns import METRICS, metric_title
from reports.labels import Label, place_labels, place_step_numbers
from reports.points import Point
from reports.render import one_line

DOTS_PER_INCH = 160
MANY_MODELS = 6  # more lines than this leave no room for numbers at their points
WIDE_RANGE = 8.0  # largest over smallest value from which the quality axis is logarithmic


def draw_sampling_compute(points: Sequence[Point]) -> dict[str, bytes]:
    """Figure 10 as {"png": ..., "svg": ...}: log Gflops per image (x), quality (y), one line a model.

    Intervals are bars. A panel for each set of points that may be compared.
    """
    import matplotlib

    matplotlib.use("Agg")
    with warnings.catch_warnings():
        # seaborn's own use of pandas and matplotlib; not ours to mend, and the figure does not depend on it.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=PendingDeprecationWarning)
        import seaborn

        with matplotlib.rc_context():
            seaborn.set_theme(context="notebook", style="ticks", font="DejaVu Sans")
            matplotlib.rcParams.update({"svg.hashsalt": "backbone-harness", "svg.fonttype": "none"})
            return _draw(points)


def _draw(points: Sequence[Point]) -> dict[str, bytes]:
    import matplotlib.pyplot as plt
    import seaborn

    numbers = sorted({point.panel for point in points})
    models = _models(points)
    colours = dict(zip(models, _palette(len(models)), strict=True))
    columns = min(len(numbers), 2)
    rows = math.ceil(len(numbers) / columns)
    height = 4.6 if len(models) <= MANY_MODELS else 6.2  # inches a panel
    figure, axes = plt.subplots(
        rows, columns, figsize=(7.2 * columns, height * rows), squeeze=False, layout="constrained"
    )
    panels = []
    for axis, number in zip(axes.flat, numbers, strict=False):
        members = [point for point in points if point.panel == number]
        panels.append((axis, members, _draw_panel(axis, members, colours)))
    for axis in list(axes.flat)[len(numbers) :]:
        axis.set_visible(False)
    seaborn.despine(figure)
    figure.suptitle("Sampling compute against sample quality", fontweight="bold", fontsize=13)
    figure.canvas.draw()  # settles the layout, so that room for text can be measured in pixels
    figure.set_layout_engine("none")
    for axis, members, labels in panels:
        place_labels(axis, labels, [(point.gflops_per_image, point.value) for point in members])
        if len({point.line for point in members}) <= MANY_MODELS:
            place_step_numbers(axis, members)
    files = {}
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=DOTS_PER_INCH, metadata=metadata)
        files[kind] = buffer.getvalue()
    plt.close(figure)
    return files


def _draw_panel(axis, points: Sequence[Point], colours: dict[str, tuple]) -> list[Label]:
    """Draws the lines; returns the label that each asks for."""
    import pandas
    import seaborn

    axis.set_xscale("log")
    variants: dict[str, int] = {}
    labels = []
    for model, label, provenance in sorted({(point.model, point.line, point.provenance) for point in points}):
        members = [
            point for point in points if (point.model, point.line, point.provenance) == (model, label, provenance)
        ]
        colour, variant = colours[model], variants.get(model, 0)
        variants[model] = variant + 1
        published = provenance == "published"
        runs = sorted({point.run for point in members})
        for run in runs:
            data = pandas.DataFrame([dataclasses.asdict(point) for point in members if point.run == run])
            seaborn.lineplot(
                data=data,
                x="gflops_per_image",
                y="value",
                estimator=None,
                color=colour,
                linewidth=2 if len(runs) == 1 else 1.2,
                linestyle=":" if published else ("-", "--", "-.")[variant % 3],
                marker="osD^v"[variant % 5],
                markersize=7 if len(runs) == 1 else 5,
                markerfacecolor="white" if published else colour,
                markeredgecolor=colour,
                markeredgewidth=1.5,
                legend=False,
                ax=axis,
            )
        for point in members:
            if point.low is not None:
                axis.vlines(point.gflops_per_image, point.low, point.high, color=colour, linewidth=1.5)
        right = max(point.gflops_per_image for point in members)
        ends = [point.value for point in members if point.gflops_per_image == right]
        text = f"{label}, {len(runs)} runs" if len(runs) > 1 else label
        labels.append((right, sum(ends) / len(ends), _drawable(text), colour))
    _set_axes(axis, points, points[0].metric, points[0].n)
    return labels


def _set_axes(axis, points: Sequence[Point], metric: str, n: int) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    xs = [point.gflops_per_image for point in points]
    ys = [bound for point in points for bound in (point.value, point.low, point.high) if bound is not None]
    low, high = min(xs), max(xs)
    axis.set_xlim(low / 1.25, high * 1.25)
    subs = (1, 2, 5) if high / low < 500 else (1,)
    axis.xaxis.set_major_locator(LogLocator(base=10, subs=subs))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    if min(ys) > 0 and max(ys) / min(ys) > WIDE_RANGE:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        room = (max(ys) / min(ys)) ** 0.12
        axis.set_ylim(min(ys) / room, max(ys) * room**1.4)
    else:
        room = 0.12 * (max(ys) - min(ys)) or 0.1 * abs(max(ys)) or 1.0
        axis.set_ylim(min(ys) - room, max(ys) + 1.4 * room)
    better = {"lower": "lower is better", "higher": "higher is better"}.get(
        METRICS[metric].better if metric in METRICS else ""
    )
    numbers = "\nnumbers at the points: sampling steps" if len({p.line for p in points}) <= MANY_MODELS else ""
    title = metric_title(metric, n).rstrip("\u2191\u2193")
    axis.set_xlabel("Sampling compute (Gflops per image, decoder not counted)", fontsize=11)
    axis.set_ylabel(_drawable(f"{title} ({better})" if better else title), parse_math=False, fontsize=11)
    axis.set_title(
        _wrapped(_drawable(points[0].heading)) + numbers,
        fontsize=8.5,
        color="0.35",
        loc="left",
        parse_math=False,
    )
    axis.grid(visible=True, axis="y", color="0.92")


def _models(points: Sequence[Point]) -> list[str]:
    """Every model once, by its cheapest point."""
    cheapest: dict[str, float] = {}
    for point in points:
        cheapest[point.model] = min(point.gflops_per_image, cheapest.get(point.model, math.inf))
    return sorted(cheapest, key=lambda model: (cheapest[model], model))


def _palette(count: int) -> list[tuple]:
    """Colours that the colour-blind can tell apart: a qualitative set, or lightness in the order of compute."""
    import seaborn

    if count <= 10:
        return seaborn.color_palette("colorblind", 10)[:count]
    return seaborn.color_palette("viridis", count + 2)[:count]  # without the yellows, which are no text colour


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 100))


def _drawable(text: str) -> str:
    """Text with a question mark for each character that the font lacks (drawing it would be an empty box)."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    known = get_font(findfont(FontProperties(family="DejaVu Sans"))).get_charmap()
    return "".join(character if ord(character) in known else "?" for character in one_line(text))
