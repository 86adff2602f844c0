"""The backbone that is checked, and what a check finds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from harness.conformance.network import Inputs, Network, make_inputs, move_weights
from harness.spec import BackboneSpec

IMAGES = 3  # in a batch


class Finding(NamedTuple):
    """The result of one check."""

    status: str  # "ok", "note" (it works, with a limitation) or "failed"
    framework: str
    check: str
    message: str = ""


@dataclass
class Subject:
    """The backbone under test in one framework: its spec, its builder's arguments and how to make a network."""

    spec: BackboneSpec
    framework: str
    arguments: dict[str, Any]  # all of them
    make: Callable[[BackboneSpec, dict[str, Any], int], Network]  # of (spec, arguments, seed)

    @functools.cached_property
    def moved(self) -> Network:
        """The network with moved weights: built once, and never changed after."""
        network = self.build()
        move_weights(network)
        return network

    def build(self, seed: int = 0, **changes: Any) -> Network:
        """A new network. `changes` replace arguments."""
        return self.make(self.spec, {**self.arguments, **changes}, seed)

    def inputs(self, images: int = IMAGES, **changes: Any) -> Inputs:
        """Random inputs for the network, with `changes` of its arguments."""
        return make_inputs(self.spec, {**self.arguments, **changes}, images)

    def output_shape(self, images: int = IMAGES, **changes: Any) -> tuple[int, ...] | None:
        """What the network must give; None: not known (a generator)."""
        arguments = {**self.arguments, **changes}
        if self.spec.kind == "classifier":
            return images, arguments["num_classes"]
        if self.spec.kind == "generator":
            return None
        return images, arguments["out_channels"], arguments["input_size"], arguments["input_size"]
