"""The conformance suite of the harness, on small networks."""

import pytest
from u_vit.spec import SPECS

from harness.conformance.suite import check_backbone

SMALL = {"input_size": 8, "in_channels": 1, "num_classes": 10}


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_it_does_what_the_harness_relies_on(spec):
    found = list(check_backbone(spec, ["torch"], SMALL))
    assert [finding for finding in found if finding.status == "failed"] == []
