"""Which backbone a file's weights are of: decided by names and shapes, never by the file's name.

The family is the one whose layout's marks the file holds; within it, the backbones that agree best with what the shapes
tell are built on the meta device (no memory, no arithmetic) and compared tensor by tensor.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from harness.errors import UserError
from harness.spec import BackboneSpec
from harness.weights.files import WeightFile
from harness.weights.maps import Differences, Layout, Mismatch, Recipes, Shapes, WeightMap, compare, take_all

INPUT_SIZES = (4, 8, 16, 32, 64, 128, 256, 512)
FREE = ("input_size", "in_channels", "num_classes", "out_channels")  # what may differ from a backbone's own

OWN_NAMES = Layout(name="own", title="state dict", marks=(), inward=take_all, outward=take_all)
OWN = WeightMap(layouts=(OWN_NAMES,))
"""Of a family without a map, such as a plug-in's: the network's own names."""


@dataclass(frozen=True, kw_only=True)
class Match:
    """What a file's weights are. `spec` None: no registered backbone is near."""

    spec: BackboneSpec | None
    arguments: dict[str, Any]  # those that differ from the spec's own
    layout: Layout
    recipes: Recipes  # our tensors from the file's
    differences: Differences
    notes: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        return self.spec is not None and not self.differences


def weight_map(spec: BackboneSpec) -> WeightMap:
    """The map of the backbone's family: MAP in the module `weights` beside its torch network."""
    package = spec.builders.get("torch", "").partition(":")[0].rpartition(".")[0]
    address = f"{package}.weights"
    try:
        return getattr(importlib.import_module(address), "MAP", OWN) if package else OWN
    except ModuleNotFoundError as error:
        if error.name in (address, package):
            return OWN
        raise


def choose_layout(layouts: Iterable[Layout], names: Iterable[str]) -> tuple[float, Layout]:
    """The layout most of whose marks are among the names, and their share."""
    names = set(names)
    scores = [(sum(mark in names for mark in each.marks) / max(len(each.marks), 1), each) for each in layouts]
    return max(scores, key=lambda score: score[0])


def translate(
    weights: WeightFile, layout: Layout, expected: Shapes | None = None
) -> tuple[Recipes, Shapes, dict[str, str]]:
    """Our tensors by recipe, their shapes, and what they lack: our name to the name that the file should have.

    Raises `Mismatch` where the file's shapes allow no translation at all.
    """
    shapes = weights.shapes
    known: Mapping[str, Any] = {"config": weights.config, "expected": expected or {}}
    recipes, ours, lacking = {}, {}, {}
    for name, recipe in layout.inward(shapes, known).items():
        absent = next((source for source in recipe.sources if source not in shapes), None)
        if absent is not None:
            lacking[name] = absent
            continue
        dtypes = {weights.tensors[source].dtype for source in recipe.sources}
        if len(dtypes) > 1:
            raise Mismatch(f"{recipe.sources[0]} and its like are of several dtypes: {', '.join(sorted(dtypes))}")
        recipes[name], ours[name] = recipe, recipe.shape(shapes)
    return recipes, ours, lacking


def differences(ours: Shapes, expected: Shapes, lacking: Mapping[str, str], layout: Layout) -> Differences:
    """Our tensors against the network's; what is missing bears the name that it has in the file."""
    found = compare(ours, expected, layout.beside)
    return replace(found, missing=tuple(lacking.get(name, name) for name in found.missing))


def expected_shapes(spec: BackboneSpec, arguments: Mapping[str, Any]) -> Shapes:
    """Names and shapes of the torch network's state dict."""
    from harness.compute.meta_torch import build_on_meta

    return {name: tuple(tensor.shape) for name, tensor in build_on_meta(spec, dict(arguments)).state_dict().items()}


def identify(weights: WeightFile, specs: Iterable[BackboneSpec], *, sizes: bool = True) -> Match:
    """The backbone among `specs` whose network has these tensors, or the nearest one and the differences.

    Without `sizes`, input sizes that no shape tells are not tried, each of which takes the building of a network.
    Where the file has no shape that allows a comparison, the refusal says what stands in the way.
    """
    specs = list(specs)
    families: dict[int, tuple[WeightMap, list[BackboneSpec]]] = {}
    for spec in specs:
        found = weight_map(spec)
        families.setdefault(id(found), (found, []))[1].append(spec)
    share, layout, chosen = 0.0, OWN_NAMES, OWN
    for found, _ in families.values():
        score, best = choose_layout(found.layouts, weights.tensors)
        if score > share or (len(families) == 1 and share == 0):
            share, layout, chosen = score, best, found
    candidates = families.get(id(chosen), (chosen, []))[1]
    try:
        recipes, ours, lacking = translate(weights, layout)
        facts = [(spec, chosen.facts(spec, ours)) for spec in candidates]
    except Mismatch as error:
        raise UserError(f"{weights.path} ({layout.title}): {error}") from error
    ranked = sorted(facts, key=lambda each: _disagreements(*each))
    nearest = [each for each in ranked if _disagreements(*each) == _disagreements(*ranked[0])]
    best: Match | None = None
    for spec, told in nearest:
        for arguments in _candidates(spec, told) if sizes else [next(_candidates(spec, told))]:
            try:
                expected = expected_shapes(spec, arguments)
            except UserError:
                continue  # these shapes fit no network of this name
            match = Match(
                spec=spec,
                arguments=arguments,
                layout=layout,
                recipes=recipes,
                differences=differences(ours, expected, lacking, layout),
                notes=(*weights.notes, *layout.notes(weights.shapes)),
            )
            if best is None or _rank(match) < _rank(best):
                best = match
            if match.exact:
                break
    if (
        best is not None
        and best.exact
        and (text := contradiction(weights, layout, ours, best.spec.defaults.get("heads")))
    ):
        raise UserError(f"{weights.path} ({layout.title}): {text}")
    if best is not None and (share > 0 or best.exact or len(specs) == 1):
        return best
    return Match(
        spec=None, arguments={}, layout=layout, recipes=recipes, differences=Differences(), notes=weights.notes
    )


def contradiction(weights: WeightFile, layout: Layout, ours: Shapes, heads: int | None) -> str | None:
    """What the config.json beside a file whose tensors fit says against them, or None."""
    return layout.contradiction(weights.config, ours, heads) if weights.config is not None else None


def recognised(weights: WeightFile, layout: Layout) -> bool:
    """Whether the file has any of the names that `layout` is told by."""
    return not layout.marks or choose_layout([layout], weights.tensors)[0] > 0


def misfit(weights: WeightFile, layout: Layout, name: str, problem: str) -> str:
    """The line that refuses a file for the backbone `name`, read by `layout`: what it holds, where that is known."""
    from harness.registry import backbones

    try:
        found = identify(weights, backbones, sizes=False)
    except UserError:
        found = None
    if found is not None and found.exact:
        settings = "".join(f", {key} {value}" for key, value in found.arguments.items())
        holds = f"{weights.path} holds {found.spec.name}{settings} ({found.layout.title})"
        if not recognised(weights, layout):
            return f"{holds}, which is not {name}"
        return f"{holds} and does not fit {name}: {problem}"
    if not recognised(weights, layout):
        first = next(iter(weights.tensors))
        return f"{weights.path} does not fit {name}: its names are not those of {layout.title} (the first is {first})"
    return f"{weights.path} ({layout.title}) does not fit {name}: {problem}"


def _candidates(spec: BackboneSpec, told: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Builder arguments to try: what the shapes tell, and where they do not tell the input size, other powers of 2.

    A U-Net attends at certain sides, so its input size decides which of its blocks have attention.
    """
    arguments = {name: told[name] for name in FREE if name in told and name in spec.defaults}
    arguments = {name: value for name, value in arguments.items() if value != spec.defaults[name]}
    yield arguments
    native = spec.defaults.get("input_size")
    if native is None or "input_size" in told:
        return
    for size in INPUT_SIZES:
        if size != native:
            factor = (
                {"low_res_size": size * spec.defaults["low_res_size"] // native}
                if "low_res_size" in spec.defaults
                else {}
            )
            yield {**arguments, "input_size": size, **factor}


def _disagreements(spec: BackboneSpec, told: Mapping[str, Any]) -> int:
    return sum(spec.defaults.get(name) != value for name, value in told.items() if name not in FREE)


def _rank(match: Match) -> tuple[int, int]:
    return (match.differences.count, len(match.arguments))
