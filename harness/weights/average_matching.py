"""Moving averages under the names of the weights that they are of, where they have other names or none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from harness.weights.holders import place
from harness.weights.tensors import Stored

MAX_SKIPPED = 2  # tensors that a list of averages may leave out because they are not trained, such as positions


def by_order(tensors: Mapping[str, Stored], averages: Sequence[Stored]) -> dict[str, Stored] | None:
    """The averages under the names of `tensors`, matched in the order of the parameters; None where they do not fit.

    Objects that average keep a list of the parameters, most of them only of the trained ones; the others, such as a table
    of positions, are those of `tensors`. It must be certain which: shapes allow one match only.
    """
    places: dict[tuple[object, ...], str] = {}  # a parameter that a network has twice is averaged once
    alias: dict[str, str] = {}
    for name, tensor in tensors.items():
        alias[name] = places.setdefault(place(tensor), name)
    names = list(places.values())
    skipped = len(names) - len(averages)
    if not 0 <= skipped <= MAX_SKIPPED:
        return None
    shapes = [tensors[name].shape for name in names]
    # ways[s]: in how many ways (at most 2) the averages so far match the names so far with s names left out
    history = [[1] + [0] * skipped]
    for position, shape in enumerate(shapes):
        before, ways = history[-1], [0] * (skipped + 1)
        for left_out in range(skipped + 1):
            index = position - left_out  # of the average that would be this one's
            if 0 <= index < len(averages) and averages[index].shape == shape:
                ways[left_out] = before[left_out]
            if left_out:
                ways[left_out] = min(2, ways[left_out] + before[left_out - 1])
        history.append(ways)
    if history[-1][skipped] != 1:
        return None
    matched: dict[str, Stored] = {}
    left_out = skipped
    for position in range(len(names) - 1, -1, -1):
        index = position - left_out
        fits = 0 <= index < len(averages) and averages[index].shape == shapes[position]
        if fits and history[position][left_out]:
            matched[names[position]] = averages[index]
        else:
            left_out -= 1
    return {name: matched.get(alias[name], tensor) for name, tensor in tensors.items()}


def by_name(
    tensors: Mapping[str, Stored], prefix: Sequence[str], averages: Mapping[str, Stored]
) -> dict[str, Stored] | None:
    """The averages under the names of `tensors`; None where they do not fit. LDM's LitEma writes names without their dots.

    The average may be of the module that holds the network, so its names may begin with parts of the `prefix`.
    """
    for begin in range(len(prefix) + 1):
        for dot in (".", ""):
            named = {name: dot.join((*prefix[begin:], *name.split("."))) for name in tensors}
            matched = {
                name: averages[named[name]]
                for name, tensor in tensors.items()
                if named[name] in averages and averages[named[name]].shape == tensor.shape
            }
            if 2 * len(matched) >= len(tensors):
                return matched
    return None
