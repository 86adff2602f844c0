"""Direct labels: text beside the lines of a plot, where it covers neither points nor other text."""

from collections.abc import Sequence

from reports.points import Point

Label = tuple[float, float, str, tuple]  # x, y, text, colour

_LINE_SAMPLES = 12  # places on each stretch of a line that a label should not cover
# Places to try around a point, as (x, y) offsets in font points and the side of the text that touches them.
_PLACES = (
    *((9, 0, "left"), (8, 9, "left"), (8, -9, "left"), (8, 18, "left"), (8, -18, "left"), (0, -16, "center")),
    *((0, 22, "center"), (-9, -9, "right"), (8, 30, "left"), (8, -30, "left"), (-9, -20, "right"), (0, -34, "center")),
)


def place_labels(
    axis, labels: Sequence[tuple[float, float, str, tuple]], points: Sequence[tuple[float, float]]
) -> None:
    """Writes each label (x, y, text, colour) beside its point, at the first place that covers the least.

    Widens the x axis so that the text fits inside the axes. The layout of the figure must be settled.
    """
    texts = [
        axis.annotate(
            text, (x, y), xytext=(9, 0), textcoords="offset points", va="center", color=colour, fontsize=10,
            fontweight="bold", parse_math=False,
        )
        for x, y, text, colour in sorted(labels, key=lambda label: (-label[0], label[1], label[2]))
    ]  # fmt: skip
    _make_room(axis, texts)
    obstacles = _obstacles(axis, points)
    frame = axis.get_window_extent()
    taken = []
    for text in texts:
        boxes = []
        for order, (dx, dy, side) in enumerate(_PLACES):
            text.set_position((dx, dy))
            text.set_horizontalalignment(side)
            box = text.get_window_extent().padded(2)
            covered = sum(box.contains(*place) for place in obstacles) + 20 * sum(
                box.overlaps(other) for other in taken
            )
            outside = box.x1 > frame.x1 + 2 or box.y0 < frame.y0 or box.y1 > frame.y1
            boxes.append((covered + 10 * outside, order, box))
        _, order, box = min(boxes, key=lambda found: found[:2])
        text.set_position(_PLACES[order][:2])
        text.set_horizontalalignment(_PLACES[order][2])
        taken.append(box)


def place_step_numbers(axis, points: Sequence[Point]) -> None:
    """Writes the number of sampling steps over each point, but not over other text."""
    taken = [text.get_window_extent() for text in axis.texts]
    stepped = [point for point in points if point.sampling_steps is not None]
    for point in sorted(stepped, key=lambda point: (-point.value, point.gflops_per_image)):
        text = axis.annotate(
            point.stage_steps or str(point.sampling_steps),
            (point.gflops_per_image, point.value if point.high is None else point.high),
            xytext=(0, 5 if point.high is not None else 10),
            textcoords="offset points",
            ha="center",
            fontsize=8.5,
            color="0.35",
        )
        box = text.get_window_extent()
        if any(box.overlaps(other) for other in taken):
            text.remove()
        else:
            taken.append(box)


def _make_room(axis, texts) -> None:
    """Moves the right end of the logarithmic x axis until the text beside each point ends within the axes."""
    low, high = axis.get_xlim()
    frame = axis.get_window_extent()
    for text in texts:
        width = text.get_window_extent().width + 24
        share = min(width / frame.width, 0.6)
        # The point stands at most (1 - share) of the way along the axis: solve for the end of the axis.
        high = max(high, low * (text.xy[0] / low) ** (1 / (1 - share)))
    axis.set_xlim(low, high)


def _obstacles(axis, points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Pixel positions of the points and of places on the lines."""
    places = [tuple(place) for place in axis.transData.transform(list(points))]
    for line in axis.lines:
        corners = axis.transData.transform(line.get_xydata())
        for start, end in zip(corners[:-1], corners[1:], strict=True):
            places += [tuple(start + (end - start) * step / _LINE_SAMPLES) for step in range(_LINE_SAMPLES)]
    return places
