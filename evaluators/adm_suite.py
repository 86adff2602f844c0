"""The metrics of suite `adm`: ADM's functions (evaluators/adm.py) applied to a sample set's features."""

from evaluators import adm
from evaluators.intervals import Estimate
from evaluators.metric_inputs import MetricInputs
from harness.errors import UserError


def compute(inputs: MetricInputs) -> dict[str, Estimate]:
    """The metrics "fid", "sfid", "is", "precision" and "recall" in mode `adm`; rows in file order."""
    features, reference = inputs.features, inputs.reference
    alone = not len(reference.images)  # statistics alone, which may lack the spatial ones
    if features.spatial is None or features.logits is None or (reference.spatial_statistics is None and not alone):
        raise UserError("suite adm needs spatial features and logits, which only the 2015 Inception network gives")
    return adm.estimates(
        features.pooled,
        features.spatial,
        features.logits,
        reference_pooled=reference.features.pooled,
        reference_statistics=reference.statistics,
        reference_spatial_statistics=reference.spatial_statistics,
        block=inputs.block,
    )
