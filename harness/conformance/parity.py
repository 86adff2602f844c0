"""A torch network against the Flax network of the same backbone, with the same weights."""

from __future__ import annotations

import numpy as np

from harness.conformance.network import move_weights
from harness.conformance.subject import Finding, Subject
from harness.errors import UserError

OUTPUTS = 1e-5  # largest difference relative to the output's standard deviation
GRADIENTS = 1e-4  # root mean square difference relative to that of the gradient, of each weight
FLOOR = 1e-3  # of the largest gradient: a smaller one is compared with this share


def parity(torch_subject: Subject, jax_subject: Subject) -> Finding:
    """Outputs and gradients of both, from weights that are mapped by their names (`backbones.flax_weights`)."""
    where = "torch and jax"
    ours, theirs = torch_subject.build(), jax_subject.build()
    move_weights(ours)
    try:
        theirs.load(ours.weights())
    except UserError as error:
        return Finding("failed", where, "the same network", f"the weights cannot be mapped by their names: {error}")
    inputs = torch_subject.inputs()
    one, other = ours.call(inputs).values, theirs.call(inputs).values
    difference = float(np.abs(one - other).max()) / (float(one.std()) or 1.0)
    if difference > OUTPUTS:
        return Finding(
            "failed", where, "the same network",
            f"expected outputs within {OUTPUTS:g} of their standard deviation, came a difference of {difference:.2g} from the "
            "same weights",
        )  # fmt: skip
    if torch_subject.spec.masked_training:
        return Finding(
            "note", where, "the same network",
            "outputs agree; gradients are not compared, because each framework draws the part of an image that is trained on",
        )  # fmt: skip
    _, by_torch = ours.gradients(inputs, slice(None))
    _, by_jax = theirs.gradients(inputs, slice(None))
    # A gradient that is nothing but rounding, such as that of a bias before a norm, is measured against all others.
    floor = FLOOR * max(_size(value) for value in by_torch.values() if value is not None)
    for name, expected in by_torch.items():
        found = by_jax.get(name)
        if expected is None or found is None:
            continue  # the check of gradients has said so
        distance = _size(found - expected) / max(_size(expected), floor)
        if distance > GRADIENTS:
            return Finding(
                "failed", where, "the same network",
                f"expected gradients within {GRADIENTS:g}, came a difference of {distance:.2g} for {name} from the same weights",
            )  # fmt: skip
    return Finding("ok", where, "the same network")


def _size(array: np.ndarray) -> float:
    """The root mean square."""
    return float(np.sqrt(np.mean(np.square(array, dtype=np.float64)))) or 1e-30
