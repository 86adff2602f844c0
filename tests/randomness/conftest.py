"""Makes the helper modules of these tests importable: pytest's importlib mode does not change sys.path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
