"""Maps between the public files of a family and our tensors: names, shapes, joining and cutting; no framework.

A family has a `WeightMap` named MAP in `backbones/<family>/weights.py`. It is plain data and numpy, so every engine uses
the same one. "Our" names and shapes are those of the state dict of the torch network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.errors import UserError
from harness.spec import BackboneSpec

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Read = Callable[[str], np.ndarray]
"""Read(name): the values of the source tensor `name`."""


class Mismatch(ValueError):
    """The shapes or dtypes in a file do not allow a recipe; the message is one line."""


# A recipe makes one tensor from source tensors. `sources` are the names of these, `shape(shapes)` is the shape of the
# result, given the shapes of the sources, and `evaluate(read)` are its values.


@dataclass(frozen=True)
class Take:
    """The tensor `name`, unchanged."""

    name: str

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.name,)

    def shape(self, shapes: Shapes) -> Shape:
        return shapes[self.name]

    def evaluate(self, read: Read) -> np.ndarray:
        return read(self.name)


@dataclass(frozen=True)
class Join:
    """The tensors `names` concatenated along the first axis."""

    names: tuple[str, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        return self.names

    def shape(self, shapes: Shapes) -> Shape:
        first, *rest = (shapes[name] for name in self.names)
        for name, shape in zip(self.names[1:], rest, strict=True):
            if shape[1:] != first[1:]:
                raise Mismatch(f"{name} {shape} does not fit beside {self.names[0]} {first}")
        return (first[0] + sum(shape[0] for shape in rest), *first[1:])

    def evaluate(self, read: Read) -> np.ndarray:
        return np.concatenate([read(name) for name in self.names])


@dataclass(frozen=True)
class Part:
    """Part number `index` when the tensor `name` is cut into `of` equal parts along the first axis."""

    name: str
    index: int
    of: int

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.name,)

    def shape(self, shapes: Shapes) -> Shape:
        shape = shapes[self.name]
        if not shape or shape[0] % self.of:
            raise Mismatch(f"{self.name} {shape} cannot be cut into {self.of} parts")
        return (shape[0] // self.of, *shape[1:])

    def evaluate(self, read: Read) -> np.ndarray:
        whole = read(self.name)
        rows = whole.shape[0] // self.of
        return np.ascontiguousarray(whole[self.index * rows : (self.index + 1) * rows])


@dataclass(frozen=True)
class Same:
    """One tensor that is stored under several names; `evaluate` raises UserError where the copies differ."""

    names: tuple[str, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        return self.names

    def shape(self, shapes: Shapes) -> Shape:
        first = shapes[self.names[0]]
        for name in self.names[1:]:
            if shapes[name] != first:
                raise Mismatch(f"{name} {shapes[name]} should be a copy of {self.names[0]} {first}")
        return first

    def evaluate(self, read: Read) -> np.ndarray:
        first = read(self.names[0])
        bits = first.reshape(-1).view(np.uint8)  # as bytes, so that NaN equals itself
        for name in self.names[1:]:
            if not np.array_equal(read(name).reshape(-1).view(np.uint8), bits):
                raise UserError(
                    f"{name} differs from {self.names[0]}; the harness's network has this tensor once, so the copies"
                    " must be equal. These weights were trained apart and cannot be converted"
                )
        return first


@dataclass(frozen=True)
class Made:
    """A tensor that is computed because no file holds it: float32 of `shape_`."""

    shape_: Shape
    make: Callable[[], np.ndarray]

    @property
    def sources(self) -> tuple[str, ...]:
        return ()

    def shape(self, shapes: Shapes) -> Shape:
        return self.shape_

    def evaluate(self, read: Read) -> np.ndarray:
        return np.ascontiguousarray(self.make(), dtype="<f4")


@dataclass(frozen=True)
class WithNullRow:
    """The tensor of `table`, a label table (classes, width), with one more row, of zeros, for the null label."""

    table: Recipe

    @property
    def sources(self) -> tuple[str, ...]:
        return self.table.sources

    def shape(self, shapes: Shapes) -> Shape:
        rows, width = self.table.shape(shapes)
        return (rows + 1, width)

    def evaluate(self, read: Read) -> np.ndarray:
        table = self.table.evaluate(read)
        return np.concatenate([table, np.zeros((1, table.shape[1]), table.dtype)])


Recipe = Take | Join | Part | Same | Made | WithNullRow
Recipes = dict[str, Recipe]  # by the name of the resulting tensor


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A public way to name and store a family's weights.

    name: for `harness weights export --format`. title: in messages. marks: names of tensors that identify such a file.
    store: how an export is stored, "state dict", "lightning" or "diffusers". suffix: of an exported file.

    inward(shapes, known): recipes of our tensors, given the shapes of a file. `known` has the keys "config", config.json
    beside the file or None, and "expected", the network's shapes or {}. Raises `Mismatch`. A recipe may name a source
    that the file does not have; `identify.translate` reports it as missing.
    outward(shapes): recipes of an exported file's tensors, given the shapes of ours.
    beside(name): whether a tensor of the file, under our name, is no part of the network, such as LDM's autoencoder.
    notes(shapes): lines for the user, given the shapes of a file.
    config(arguments, shapes): config.json of an exported diffusers folder, given builder arguments and our shapes.
    contradiction(config, shapes, heads): how the config.json beside a file contradicts our shapes and the number of
    attention heads, in one line; None: it does not.
    label_table: our name of the label embedding whose last row is the null label, which a file may not have; "": none.
    """

    name: str
    title: str
    marks: tuple[str, ...]
    store: str = "state dict"
    suffix: str = ".pt"
    inward: Callable[[Shapes, Mapping[str, Any]], Recipes]
    outward: Callable[[Shapes], Recipes]
    beside: Callable[[str], bool] = lambda name: False
    notes: Callable[[Shapes], tuple[str, ...]] = lambda shapes: ()
    config: Callable[[Mapping[str, Any], Shapes], dict[str, Any]] | None = None
    contradiction: Callable[[Mapping[str, Any], Shapes, int | None], str | None] = lambda config, shapes, heads: None
    label_table: str = ""


@dataclass(frozen=True, kw_only=True)
class WeightMap:
    """The layouts of a family. facts(spec, shapes): builder arguments that the shapes of our tensors imply."""

    layouts: tuple[Layout, ...]
    facts: Callable[[BackboneSpec, Shapes], dict[str, Any]] = lambda spec, shapes: {}


@dataclass(frozen=True, kw_only=True)
class Differences:
    """How the tensors of a file differ from those of the network: names of the missing and unexpected ones, wrong shapes."""

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    wrong_shapes: tuple[tuple[str, Shape, Shape], ...] = ()  # name, shape in the file, shape in the network

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.wrong_shapes)

    @property
    def count(self) -> int:
        """Number of differences."""
        return len(self.missing) + len(self.unexpected) + len(self.wrong_shapes)

    def first(self) -> str:
        """The first problem and how many there are, in one line."""
        # names before shapes: if tensors are missing, the size of the network is a guess, and so are expected shapes
        if self.missing:
            text = f"{self.missing[0]} is missing"
            text += f" and {self.unexpected[0]} is unexpected" if self.unexpected else ""
        elif self.unexpected:
            text = f"{self.unexpected[0]} is unexpected"
        else:
            name, found, expected = self.wrong_shapes[0]
            text = f"{name} is {found}, the network's is {expected}"
        parts = (
            (len(self.missing), "missing"),
            (len(self.unexpected), "unexpected"),
            (len(self.wrong_shapes), "of another shape"),
        )
        return f"{text} (in all {', '.join(f'{count} {what}' for count, what in parts if count)})"


def compare(found: Shapes, expected: Shapes, beside: Callable[[str], bool] = lambda name: False) -> Differences:
    """Which tensors are missing, unexpected or of another shape in `found`.

    beside(name): whether a tensor that the network does not have is allowed, so that it does not count as unexpected.
    """
    return Differences(
        missing=tuple(name for name in expected if name not in found),
        unexpected=tuple(name for name in found if name not in expected and not beside(name)),
        wrong_shapes=tuple(
            (name, found[name], expected[name]) for name in expected if name in found and found[name] != expected[name]
        ),
    )


def take_all(shapes: Shapes, known: Mapping[str, Any] | None = None) -> Recipes:
    """Recipes that take every tensor unchanged, under its own name.

    known: not used; with it the function can be both `inward` and `outward` of a `Layout`.
    """
    return {name: Take(name) for name in shapes}
