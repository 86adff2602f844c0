"""The metrics of suite `adm` from evidence: ADM's functions (evaluators/adm.py) given what was seen in the images."""

from evaluators import adm
from evaluators.evidence import Evidence
from evaluators.intervals import Estimate
from harness.errors import UserError


def compute(evidence: Evidence) -> dict[str, Estimate]:
    """The metrics "fid", "sfid", "is", "precision" and "recall" in mode `adm`; rows in file order."""
    own, reference = evidence.features, evidence.reference
    if own.spatial is None or own.logits is None or reference.spatial_statistics is None:
        raise UserError("suite adm needs an Inception's spatial features and logits; its network alone gives them")
    return adm.estimates(
        own.pooled,
        own.spatial,
        own.logits,
        reference_pooled=reference.features.pooled,
        reference_statistics=reference.statistics,
        reference_spatial_statistics=reference.spatial_statistics,
        block=evidence.block,
    )
