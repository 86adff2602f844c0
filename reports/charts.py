"""Figures as data: panels have series, series have marks. PNG, SVG, PDF, CSV and the page's charts are made of them.

A figure is a pure function of records; nothing here draws. Styles are chosen here too, so that a model looks the same in
every figure.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping

import numpy as np

from reports.render import csv_text
from results.records import Record

SCALES = ("linear", "log", "names")  # names: x is 0, 1, 2, ... and is labelled with the marks' texts
KINDS = ("line", "points", "bubbles", "bars", "fit", "band")
PROVENANCES = ("published", "measured", "fit")

# Ten colours that are readable on white and differ under every common colour blindness: a search maximised the smallest
# distance in CIELAB over simulated protanopia, deuteranopia, tritanopia and none.
COLOURS = (
    *("#0088ee", "#aa3311", "#779977", "#660033"),  # the sizes S, B, L, XL of the paper
    *("#bb8800", "#5533dd", "#dd66bb", "#336677", "#331166", "#442200"),
)
NO_MODEL = "#555555"  # colour of fits and frontiers
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
DASHES = ("solid", "dashed", "dashdot", "dotted")
_DIT_SIZES = ("s", "b", "l", "xl")
_DIT_PATCHES = ("2", "4", "8")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis of a panel."""

    title: str
    unit: str = ""
    scale: str = "linear"  # of SCALES
    better: str = ""  # "lower" or "higher" values are better; "": neither
    from_zero: bool = False  # whether a linear axis begins at 0

    @property
    def text(self) -> str:
        """The text beside the axis: `Sampling compute (Gflops per image)`, `FID-50K (lower is better)`."""
        words = [self.unit, f"{self.better} is better" if self.better else ""]
        inside = ", ".join(word for word in words if word)
        return f"{self.title} ({inside})" if inside else self.title


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mark:
    """One point, bubble or bar, or one point of a line or band.

    low, high: the ends of its interval, in the units of y; None: no interval. size: the area of a bubble is proportional to
    it. text: written at the mark. record_ids: the ids of the records that the mark shows; if they are several, y is their
    mean. facts: (name, text) pairs that the page shows for the mark.
    """

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    size: float | None = None
    text: str = ""
    record_ids: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """Marks of one model and kind, in the order of x."""

    label: str  # written beside the last mark of a line or fit; points and bubbles have the texts of their marks
    model: str  # decides the style; "" for fits and frontiers
    kind: str  # of KINDS
    provenance: str  # of PROVENANCES
    marks: tuple[Mark, ...]
    faint: bool = False  # drawn pale, behind the other series


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes. Marks of different panels need not be comparable."""

    heading: str  # what the records of the panel have in common
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    title: str = ""  # how the panel differs from others of the same records
    note: str = ""  # what bars are, what was left out, ...
    starts_row: bool = False  # whether a new row of panels begins here


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Grid:
    """Pictures in rows (models) and columns (samples), with names of rows and columns."""

    heading: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    tiles: np.ndarray  # (rows, columns, H, W, C) uint8 in [0, 255], C 1 or 3
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure, and its data for CSV: unrounded rows, all with the same keys."""

    name: str  # file name without extension: "figure-8", "pareto"
    title: str
    panels: tuple[Panel, ...]
    rows: tuple[dict[str, object], ...]
    grids: tuple[Grid, ...] = ()
    columns: int = 2  # largest number of panels in a row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Style:
    """How a model is drawn."""

    colour: str  # "#rrggbb"
    marker: str  # of MARKERS, in matplotlib's letters
    dash: str  # of DASHES; published lines are dotted whatever the model


def model_of(record: Record) -> str:
    """The model of a record, which decides the style of its marks."""
    return record.backbone or record.system


def model_styles(records: Iterable[Record]) -> dict[str, Style]:
    """Model -> style for all figures made of these records, measured and published ones.

    DiT-S, -B, -L and -XL have a colour for each size and a marker for each patch size, as in the paper. The other models
    have the remaining colours: first one for each measured model, then one for each published family, whose members have
    different markers. When all colours are used, they are used again with other markers and dashes. "" -> style of fits.
    """
    measured: dict[str, bool] = {}  # model -> whether it has measured records
    costed: dict[str, bool] = {}  # model -> whether its Gflops are known: most figures show only such models
    for record in records:
        model = model_of(record)
        measured[model] = measured.get(model, False) or record.provenance == "measured"
        costed[model] = costed.get(model, False) or record.gflops is not None
    styles = {"": Style(colour=NO_MODEL, marker="o", dash="solid")}
    families: dict[str, list[str]] = {}  # measured model or published family -> models
    for model in sorted(measured, key=lambda model: (not measured[model], not costed[model], model)):
        dit = re.fullmatch(r"dit-(?P<size>s|b|l|xl)-(?P<patch>2|4|8)", model)
        if dit:
            size, patch = _DIT_SIZES.index(dit["size"]), _DIT_PATCHES.index(dit["patch"])
            styles[model] = Style(colour=COLOURS[size], marker=MARKERS[patch], dash=DASHES[patch])
        else:
            families.setdefault(model if measured[model] else _family(model), []).append(model)
    colours = (*COLOURS[len(_DIT_SIZES) :], *COLOURS[: len(_DIT_SIZES)])  # those of the DiT sizes last
    for index, members in enumerate(families.values()):
        # Published models never take the colour of a DiT size, because DiTs are in their panels.
        allowed = colours if measured[members[0]] else colours[: -len(_DIT_SIZES)]
        times_used, place = divmod(index, len(allowed))
        for number, model in enumerate(members, start=times_used):  # a colour used again begins with the next marker
            marker, dash = MARKERS[number % len(MARKERS)], DASHES[number % len(DASHES)]
            styles[model] = Style(colour=allowed[place], marker=marker, dash=dash)
    return styles


def series_styles(panel: Panel, styles: Mapping[str, Style]) -> list[Style]:
    """The style of each series of a panel, in the order of the series: that of its model.

    The second and further series of one model and kind have other markers and dashes; points always keep those of their
    model.
    """
    found = []
    before: dict[tuple[str, str], int] = {}  # (model, kind) -> number of series so far
    for series in panel.series:
        shift = 0 if series.kind == "points" else before.get((series.model, series.kind), 0)
        before[series.model, series.kind] = shift + 1
        style = styles.get(series.model, styles[""])
        marker, dash = MARKERS.index(style.marker) + shift, DASHES.index(style.dash) + shift
        changed = {"marker": MARKERS[marker % len(MARKERS)], "dash": DASHES[dash % len(DASHES)]}
        found.append(dataclasses.replace(style, **changed))
    return found


def _family(model: str) -> str:
    """The name of a published network without sizes and without its guidance classifier: `adm`, `adm-u`, `ldm`, ...

    The model of a cascade is the names of its networks, joined with "+"; its family is that of the last of them by name. A
    DiT is its own family.
    """
    if model.startswith("dit-"):
        return model
    names = sorted(re.sub(r"(-\d+)+$", "", part) for part in model.split("+") if "-classifier-" not in part)
    return names[-1] if names else model  # no names: a guidance classifier alone


def to_csv(figure: Figure) -> str:
    """The figure's data as CSV with one header line, floats with all digits; "" for a figure without rows."""
    return csv_text(figure.rows) if figure.rows else ""
