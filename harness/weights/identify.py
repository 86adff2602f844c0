"""Identifies the backbone of a file's weights by the names and shapes of tensors, never by the file's name.

The family is the one with a layout of which the largest share of marks (names of tensors) is in the file. Within it,
the backbones that agree best with the arguments that the shapes imply are built on the meta device (no memory, no
arithmetic) and compared tensor by tensor.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from harness import registry
from harness.errors import UserError
from harness.spec import BackboneSpec
from harness.weights.files import WeightFile
from harness.weights.maps import (
    Differences,
    Layout,
    Mismatch,
    Recipes,
    Shape,
    Shapes,
    WeightMap,
    WithNullRow,
    compare,
    take_all,
)

INPUT_SIZES = (4, 8, 16, 32, 64, 128, 256, 512)  # tried where no shape implies the input size
# arguments that may differ from the spec's defaults
FREE_ARGUMENTS = ("input_size", "in_channels", "num_classes", "out_channels")

OWN_NAMES = Layout(name="own", title="state dict", marks=(), inward=take_all, outward=take_all)
OWN = WeightMap(layouts=(OWN_NAMES,))
"""The map of a family without one, such as a plug-in's: the names in the file are those of the network."""


@dataclass(frozen=True, kw_only=True)
class Match:
    """The backbone that a file's weights fit best, and how they differ from it."""

    spec: BackboneSpec | None  # None: no registered backbone is near
    arguments: dict[str, Any]  # those that differ from the spec's defaults
    layout: Layout
    recipes: Recipes  # how our tensors are made from those of the file
    differences: Differences
    notes: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether every tensor fits."""
        return self.spec is not None and not self.differences


def weight_map(spec: BackboneSpec) -> WeightMap:
    """The map of the backbone's family: MAP in the module `weights` beside its torch network; OWN if there is none."""
    # "backbones.dit.torch_model:DiT" -> "backbones.dit"; "": no torch network, or one in a module without a package
    package = spec.builders.get("torch", "").partition(":")[0].rpartition(".")[0]
    if not package:
        return OWN
    address = f"{package}.weights"
    try:
        found: WeightMap = getattr(importlib.import_module(address), "MAP", OWN)
        return found
    except ModuleNotFoundError as error:
        if error.name in (address, package):  # no module `weights`, or not even its package
            return OWN
        raise  # an import inside the module fails


def markings_of(specs: Iterable[BackboneSpec], own: Collection[str] = ()) -> list[Collection[str]]:
    """The marks of the layouts of `specs`, and `own`, names of a network's tensors, for families without marks."""
    layouts = (layout for spec in specs for layout in weight_map(spec).layouts)
    return [*dict.fromkeys(layout.marks for layout in layouts if layout.marks), *([own] if own else [])]


def choose_layout(layouts: Iterable[Layout], names: Iterable[str]) -> tuple[float, Layout]:
    """The layout with the largest share of its marks among `names`, as (share from 0 to 1, layout)."""
    names = set(names)
    # max(..., 1): OWN_NAMES has no marks, and its share is 0
    scores = [(sum(mark in names for mark in each.marks) / max(len(each.marks), 1), each) for each in layouts]
    return max(scores, key=lambda score: score[0])


def translate(
    weights: WeightFile, layout: Layout, expected: Shapes | None = None
) -> tuple[Recipes, Shapes, dict[str, str]]:
    """(recipes, shapes, missing), each by the names of our tensors.

    recipes, shapes: of the tensors that the file has. missing: of each other tensor, the first name that is missing in
    the file. expected: shapes of the network, if it is known. `Mismatch` where the file's shapes or dtypes allow no
    translation at all.
    """
    shapes = weights.shapes
    known: Mapping[str, Any] = {"config": weights.config, "expected": expected or {}}
    recipes, ours, missing = {}, {}, {}
    for name, recipe in layout.inward(shapes, known).items():
        absent = next((source for source in recipe.sources if source not in shapes), None)
        if absent is not None:
            missing[name] = absent
            continue
        dtypes = {weights.tensors[source].dtype for source in recipe.sources}
        if len(dtypes) > 1:
            raise Mismatch(
                f"{', '.join(recipe.sources)} are joined, but have several dtypes: {', '.join(sorted(dtypes))}"
            )
        recipes[name], ours[name] = recipe, recipe.shape(shapes)
    return *with_null_row(recipes, ours, layout, expected or {}), missing


def with_null_row(recipes: Recipes, ours: Shapes, layout: Layout, expected: Shapes) -> tuple[Recipes, dict[str, Shape]]:
    """(recipes, shapes) with a row for the null label, where the network has one and the file's label table does not.

    A network that was trained without label dropout has no such row. It is never used without guidance.
    """
    name = layout.label_table
    rows, wanted = ours.get(name, ()), expected.get(name, ())
    if len(rows) != 2 or tuple(wanted) != (rows[0] + 1, rows[1]):
        return recipes, dict(ours)
    padded = WithNullRow(recipes[name])
    return {**recipes, name: padded}, {**ours, name: (rows[0] + 1, rows[1])}


def null_row_notes(recipes: Recipes) -> tuple[str, ...]:
    """A line for the user if the null label's row is made."""
    if not any(isinstance(recipe, WithNullRow) for recipe in recipes.values()):
        return ()
    return ("its label table has no row for the null label: it was trained without label dropout and has no guidance",)


def differences(ours: Shapes, expected: Shapes, missing: Mapping[str, str], layout: Layout) -> Differences:
    """How the shapes `ours` differ from those `expected` by the network.

    missing: as `translate` returns it; a missing tensor is named as the file would name it.
    """
    by_our_names = compare(ours, expected, layout.beside)
    return replace(by_our_names, missing=tuple(missing.get(name, name) for name in by_our_names.missing))


def expected_shapes(spec: BackboneSpec, arguments: Mapping[str, Any]) -> Shapes:
    """Names and shapes of the state dict of the torch network."""
    from harness.compute.meta_torch import build_on_meta  # needs torch

    return {name: tuple(tensor.shape) for name, tensor in build_on_meta(spec, dict(arguments)).state_dict().items()}


def identify(weights: WeightFile, specs: Iterable[BackboneSpec], *, sizes: bool = True) -> Match:
    """The backbone among `specs` whose network has these tensors, or the nearest one and the differences.

    sizes: whether to try other input sizes if no shape implies the input size; each try builds a network. UserError where
    the shapes in the file allow no comparison, or config.json contradicts tensors that fit.
    """
    specs = list(specs)
    share, layout, family, members = _choose_family(weights.tensors, specs)
    try:
        recipes, ours, missing = translate(weights, layout)
        implied = [(spec, family.facts(spec, ours)) for spec in members]
    except Mismatch as error:
        raise UserError(f"{weights.path} ({layout.title}): {error}") from error
    except (LookupError, ValueError, TypeError, ArithmeticError) as error:  # a map takes the axes that a network has
        text = "a tensor has not the axes that this name has in the network"
        raise UserError(f"{weights.path} ({layout.title}): {text}") from error
    ranked = sorted(implied, key=lambda each: _disagreements(*each))
    nearest = [each for each in ranked if _disagreements(*each) == _disagreements(*ranked[0])]
    best: Match | None = None
    for spec, facts in nearest:
        for arguments in _arguments_to_try(spec, facts) if sizes else [next(_arguments_to_try(spec, facts))]:
            try:
                expected = expected_shapes(spec, arguments)
            except UserError:
                continue  # no network of this name has such arguments
            made, shapes = with_null_row(recipes, ours, layout, expected)
            match = Match(
                spec=spec,
                arguments=arguments,
                layout=layout,
                recipes=made,
                differences=differences(shapes, expected, missing, layout),
                notes=(*weights.notes, *layout.notes(weights.shapes), *null_row_notes(made)),
            )
            if best is None or _sort_key(match) < _sort_key(best):
                best = match
            if match.exact:
                break  # no other size is needed; another backbone may still fit with fewer arguments
    if best is not None and best.spec is not None and best.exact:
        if conflict := contradiction(weights, layout, ours, best.spec.defaults.get("heads")):
            raise UserError(f"{weights.path} ({layout.title}): {conflict}")
        return best
    # The nearest of several backbones means nothing if the file has no mark of any family.
    if best is not None and (share > 0 or len(specs) == 1):
        return best
    return Match(
        spec=None, arguments={}, layout=layout, recipes=recipes, differences=Differences(), notes=weights.notes
    )


def _choose_family(
    names: Collection[str], specs: Iterable[BackboneSpec]
) -> tuple[float, Layout, WeightMap, list[BackboneSpec]]:
    """The family that fits the names of a file best.

    Returns (share of the layout's marks in the file, layout, map of the family, its backbones in `specs`). If all `specs`
    are of one family, the result is that one, even if the share is 0. If several families all have a share of 0, it is
    OWN, with those of `specs` whose family has no map.
    """
    families: dict[int, tuple[WeightMap, list[BackboneSpec]]] = {}  # by the id of the map: the map and its backbones
    for spec in specs:
        spec_map = weight_map(spec)
        families.setdefault(id(spec_map), (spec_map, []))[1].append(spec)
    share, layout, family = 0.0, OWN_NAMES, OWN
    for spec_map, _ in families.values():
        score, candidate = choose_layout(spec_map.layouts, names)
        if score > share or len(families) == 1:
            share, layout, family = score, candidate, spec_map
    members = families[id(family)][1] if id(family) in families else []
    return share, layout, family, members


def contradiction(weights: WeightFile, layout: Layout, ours: Shapes, heads: int | None) -> str | None:
    """How the config.json beside a file contradicts tensors that fit, in one line; None: it does not."""
    return layout.contradiction(weights.config, ours, heads) if weights.config is not None else None


def recognised(weights: WeightFile, layout: Layout) -> bool:
    """Whether the file has at least one of the marks of `layout`; also True for a layout without marks."""
    return not layout.marks or choose_layout([layout], weights.tensors)[0] > 0


def misfit(weights: WeightFile, layout: Layout, name: str, problem: str) -> str:
    """The message that `weights` do not fit the backbone `name`, and which backbone they fit, if one is known.

    layout: the one by which they were compared. problem: how they differ from the backbone.
    """
    try:
        nearest = identify(weights, registry.backbones, sizes=False)
    except UserError:
        nearest = None
    if nearest is not None and nearest.spec is not None and nearest.exact:
        settings = "".join(f", {key} {value}" for key, value in nearest.arguments.items())
        holds = f"{weights.path} holds {nearest.spec.name}{settings} ({nearest.layout.title})"
        if not recognised(weights, layout):
            return f"{holds}, which is not {name}"
        return f"{holds} and does not fit {name}: {problem}"
    if not recognised(weights, layout):
        first = next(iter(weights.tensors))
        return f"{weights.path} does not fit {name}: its names are not those of {layout.title} (the first is {first})"
    return f"{weights.path} ({layout.title}) does not fit {name}: {problem}"


def _arguments_to_try(spec: BackboneSpec, facts: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields builder arguments that may fit, without those that equal the spec's defaults.

    The first are those that the shapes imply. If the shapes do not imply the input size, others of INPUT_SIZES follow: a
    U-Net has attention at certain resolutions, so its input size decides which of its blocks have it. facts: all
    arguments that the shapes imply.
    """
    arguments = {name: facts[name] for name in FREE_ARGUMENTS if name in facts and name in spec.defaults}
    arguments = {name: value for name, value in arguments.items() if value != spec.defaults[name]}
    yield arguments
    native = spec.defaults.get("input_size")
    if native is None or "input_size" in facts:
        return
    for size in INPUT_SIZES:
        if size != native:
            low_res = spec.defaults.get("low_res_size")
            scaled = {} if low_res is None else {"low_res_size": size * low_res // native}
            yield {**arguments, "input_size": size, **scaled}


def _disagreements(spec: BackboneSpec, facts: Mapping[str, object]) -> int:
    """Number of the arguments in `facts`, without FREE_ARGUMENTS, that differ from the spec's defaults."""
    return sum(spec.defaults.get(name) != value for name, value in facts.items() if name not in FREE_ARGUMENTS)


def _sort_key(match: Match) -> tuple[int, int]:
    """(number of differences, number of arguments that are not the defaults); the best match has the smallest."""
    return (match.differences.count, len(match.arguments))
