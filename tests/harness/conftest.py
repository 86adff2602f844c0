"""Makes the helpers beside these tests importable (pytest's importlib mode leaves sys.path alone), and shares what takes long."""

import hashlib
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
FEATURES = {}  # of the embedded network, by the bytes of the images of a call


@pytest.fixture(autouse=True, scope="module")
def quick_reports_and_features():
    """Reports without drawings, as by `undrawn`; and the embedded network sees the same images once, such as all digits.

    Processes that tests start draw and extract for themselves. tests/reports and tests/evaluators test both.
    """
    from evaluators.features.efficientnet_lite0 import EfficientNetLite0Features

    extract = EfficientNetLite0Features.__call__

    def remembered(self, images):
        key = (self.sha256, self.batch_size, self.device, images.shape, hashlib.sha256(images.tobytes()).hexdigest())
        if key not in FEATURES:
            FEATURES[key] = extract(self, images)
        return FEATURES[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EfficientNetLite0Features, "__call__", remembered)
        patch.setattr("reports.render_pool._processors", lambda: 1)
        patch.setattr("reports.render_pool.draw", lambda figure, styles: {})
        yield
