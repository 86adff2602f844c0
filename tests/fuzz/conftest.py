"""Makes the helpers beside these tests, and the small suites of tests/harness, importable."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "harness")]
