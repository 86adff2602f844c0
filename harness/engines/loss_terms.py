"""The loss terms that the log holds for each step, by kind of backbone."""

from __future__ import annotations

from collections.abc import Mapping

from harness.errors import UserError
from harness.spec import BackboneSpec

LOSS_TERMS: Mapping[str, Mapping[str, float]] = {
    # kind: {term: weight in the loss}; a term of weight 0 is only logged
    "denoiser": {"mse": 1.0, "vb": 1.0},
    "upsampler": {"mse": 1.0, "vb": 1.0},
    "classifier": {"cross_entropy": 1.0, "accuracy": 0.0},
}


def loss_terms_of(spec: BackboneSpec) -> Mapping[str, float]:
    """The loss terms of a backbone, with their weights. Raises UserError for a kind that is not trained here."""
    if spec.kind not in LOSS_TERMS:
        raise UserError(f"backbone {spec.name!r} is a {spec.kind}, which the harness samples and does not train")
    return LOSS_TERMS[spec.kind]
