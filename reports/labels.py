"""Direct labels: text beside the marks of a plot, placed so that it covers no marks, lines or other text."""

import math
import textwrap
from collections.abc import Sequence

import numpy as np

Label = tuple[float, float, str, str]  # x, y, text, colour

_LINE_SAMPLES = 12  # places on each segment of a line that a label should not cover
MAX_LABELS = 40  # more would only cover one another
CROWDED = 12  # if there are more labels, those without room are left out
_LONGEST_LINE = 36  # characters: a longer label is broken into lines
_PADDING = 2  # pixels on each side of a text's box
# A place for text beside a point: (dx, dy, horizontal alignment of the text there), offsets in font points.
Place = tuple[float, float, str]
# The places to try, the preferred ones first.
_PLACES: tuple[Place, ...] = (
    *((9, 0, "left"), (8, 9, "left"), (8, -9, "left"), (0, 13, "center"), (0, -13, "center"), (-9, 0, "right")),
    *((8, 18, "left"), (8, -18, "left"), (-8, 9, "right"), (-8, -9, "right"), (0, 22, "center"), (0, -22, "center")),
    *((8, 30, "left"), (8, -30, "left"), (-9, 20, "right"), (-9, -20, "right"), (0, 34, "center"), (0, -34, "center")),
)


def place_labels(
    axes, labels: Sequence[Label], points: Sequence[tuple[float, float]], radii: Sequence[float] = ()
) -> None:
    """Write each label (x, y, text, colour) beside its point, at the place where it covers the least.

    points: (x, y) of all marks of the plot. radii: of the bubbles at `points`, in font points; 0 for marks that are not
    bubbles; empty: there are no bubbles. At most MAX_LABELS are written, those of the largest x, where lines end. If there
    are more than CROWDED, those without room are left out.
    The x axis is widened so that the text fits inside the axes; the layout of the figure must be final.
    """
    texts = [
        axes.annotate(
            textwrap.fill(text, _LONGEST_LINE), (x, y), xytext=(9, 0), textcoords="offset points", va="center", color=colour, fontsize=9,
            fontweight="bold", parse_math=False, zorder=5,
        )
        for x, y, text, colour in sorted(labels, key=lambda label: (-label[0], label[1], label[2]))[:MAX_LABELS]
    ]  # fmt: skip
    if not texts:
        return
    scale = axes.figure.dpi / 72  # pixels per font point
    radii = radii or [0.0] * len(points)
    radius = dict(zip(points, radii, strict=True))  # (x, y) -> radius; the keys are also the `xy` of the texts
    sizes = [text.get_window_extent() for text in texts]  # their width and height do not depend on the place
    _make_room(
        axes, texts, [size.width + scale * radius.get(text.xy, 0.0) for text, size in zip(texts, sizes, strict=True)]
    )
    marks, lines = _obstacles(axes, points)
    frame = axes.get_window_extent()
    mark_radii = scale * np.array(radii)  # pixels
    taken = np.empty((0, 4))  # boxes of the labels placed so far
    for text, extent in zip(texts, sizes, strict=True):
        x, y = axes.transData.transform(text.xy)
        places = [_beyond(place, radius.get(text.xy, 0.0)) for place in _PLACES]
        boxes = np.array([_box(x, y, extent.width, extent.height, place, scale) for place in places])
        # The cost of each place. The worst is to leave the axes, then to cover a label, a mark, a line; of equal places the
        # one that is earlier in _PLACES is preferred. `unfit` is above 0 where the text has no room.
        unfit = 20.0 * _overlaps(boxes, taken)
        # At the right and at the top, where the axes have no line, the padding may stick out.
        unfit += 40.0 * ((boxes[:, 2] > frame.x1 + _PADDING) | (boxes[:, 0] < frame.x0))
        unfit += 40.0 * ((boxes[:, 1] < frame.y0) | (boxes[:, 3] > frame.y1 + _PADDING))
        cost = unfit + 6.0 * _touched(boxes, marks, mark_radii) + 1.5 * np.minimum(_inside(boxes, lines), 3)
        best = int((cost + 0.4 * np.arange(len(_PLACES))).argmin())
        if len(texts) > CROWDED and unfit[best]:
            text.remove()
            continue
        text.set_position(places[best][:2])  # an offset from the point, because of `textcoords`
        text.set_horizontalalignment(places[best][2])
        taken = np.vstack([taken, boxes[best]])


def place_texts(axes, texts: Sequence[Label], points: Sequence[tuple[float, float]]) -> None:
    """Write small texts (x, y, text, colour) above their points; a text that would cover other text or points is left out.

    points: (x, y) of all marks of the plot. Labels must have been placed before.
    """
    if not texts:
        return
    # Texts at a point of the data: the labels. The lines of text above the panel are placed relative to the axes.
    others = [text for text in axes.texts if getattr(text, "xycoords", "") == "data"]
    marks = axes.transData.transform(np.array(points, dtype=float).reshape(-1, 2))
    half = 3.0 * axes.figure.dpi / 72  # half the side of the square that a mark takes, in pixels
    taken = np.array([text.get_window_extent().extents for text in others]).reshape(-1, 4)
    taken = np.vstack([taken, np.hstack([marks - half, marks + half])])
    for x, y, text, colour in sorted(texts, key=lambda label: (-label[1], label[0], label[2])):
        note = axes.annotate(
            text, (x, y), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8, color=colour,
            parse_math=False, zorder=4,
        )  # fmt: skip
        box = np.array([note.get_window_extent().extents])
        if _overlaps(box, taken)[0]:
            note.remove()
        else:
            taken = np.vstack([taken, box])


def _beyond(place: Place, radius: float) -> Place:
    """The place moved outwards, so that the text is outside a bubble of this radius (font points)."""
    dx, dy, side = place
    out = max(radius - 4, 0.0)  # the offsets of _PLACES leave room for a mark of radius 4
    if side != "center":
        return (dx + math.copysign(out, dx), dy, side)
    return (dx, dy + math.copysign(out, dy), side)


def _box(x: float, y: float, width: float, height: float, place: Place, scale: float) -> tuple:
    """(left, bottom, right, top) of a text beside (x, y), in pixels, with _PADDING on each side.

    x, y, width, height: in pixels. place: (dx, dy, horizontal alignment). scale: pixels per font point.
    """
    dx, dy, side = place
    left = x + dx * scale - {"left": 0.0, "center": width / 2, "right": width}[side]
    bottom = y + dy * scale - height / 2
    return (left - _PADDING, bottom - _PADDING, left + width + _PADDING, bottom + height + _PADDING)


def _overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """For each of `boxes` (N, 4), how many of `others` (M, 4) it overlaps: (N,)."""
    apart = (boxes[:, None, 0] > others[None, :, 2]) | (boxes[:, None, 2] < others[None, :, 0])
    apart |= (boxes[:, None, 1] > others[None, :, 3]) | (boxes[:, None, 3] < others[None, :, 1])
    return (~apart).sum(axis=1)


def _make_room(axes, texts, widths: Sequence[float]) -> None:
    """Move the right end of the x axis so far that the text beside each point fits in the axes.

    widths: of each text plus the radius of its bubble, in pixels.
    """
    low, high = axes.get_xlim()
    is_log = axes.get_xscale() == "log"
    frame = axes.get_window_extent()
    for text, width in zip(texts, widths, strict=True):
        # The share of the axis that the text needs right of its point (24 pixels: gap and padding), at most 55 %, so that
        # a long text does not crowd the marks. The point may then stand at most (1 - share) of the way along the axis:
        # solve for the end of the axis.
        share = min((width + 24) / frame.width, 0.55)
        x = text.xy[0]
        needed = low * (x / low) ** (1 / (1 - share)) if is_log else low + (x - low) / (1 - share)
        high = max(high, needed)
    axes.set_xlim(low, high)


def _inside(boxes: np.ndarray, places: np.ndarray) -> np.ndarray:
    """For each of `boxes` (N, 4), how many of `places` (M, 2) are in it: (N,)."""
    found = (places[None, :, :] >= boxes[:, None, :2]) & (places[None, :, :] <= boxes[:, None, 2:])
    return found.all(axis=2).sum(axis=1)


def _touched(boxes: np.ndarray, centres: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """For each of `boxes` (N, 4), how many of the discs around `centres` (M, 2) with `radii` (M,) it touches: (N,)."""
    # The point of each box nearest to each centre, (N, M, 2).
    nearest = np.clip(centres[None], boxes[:, None, :2], boxes[:, None, 2:])
    return (((nearest - centres[None]) ** 2).sum(axis=2) <= radii**2).sum(axis=1)


def _obstacles(axes, points: Sequence[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """(positions of `points` (N, 2), positions of places along the lines of the plot (M, 2)), in pixels."""
    marks = axes.transData.transform(np.array(points, dtype=float).reshape(-1, 2))
    places = [np.empty((0, 2))]
    shares = np.linspace(0, 1, _LINE_SAMPLES, endpoint=False)[:, None, None]  # of the way along a segment
    for line in axes.lines:
        corners = axes.transData.transform(line.get_xydata())
        if len(corners) > 1 and line.get_linestyle() != "None":
            places.append((corners[None, :-1] + shares * (corners[None, 1:] - corners[None, :-1])).reshape(-1, 2))
    return marks, np.vstack(places)
