"""The result of one stage."""

from __future__ import annotations

from dataclasses import dataclass

OK = "ok"
FAULT = "fault"
SUSPECT = "suspect"  # it differs from what is expected, and whether that matters could not be measured
UNKNOWN = "not told"  # something that the stage needs is not at hand
ABSENT = "not used"  # such as the decoder of a run in pixels


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What was measured at a stage, what was expected, and the verdict.

    status: one of the words above. mended: the distance that the samples have, or would have, with this stage as expected,
    everything else left as it is; None: not measured. share: of the gap that goes away then, filled in when the gap is
    known. follows: the name of the earlier stage whose fault explains this one.
    """

    stage: str
    status: str
    measured: str
    expected: str = ""
    mended: float | None = None
    share: float | None = None
    follows: str = ""
