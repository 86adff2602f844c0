"""Public checkpoints: read without executing anything in them, identified, loaded, imported and exported.

    harness.weights.load_into(net, path, spec)   load any accepted file into a torch network -> Provenance
    harness.weights.open_weights(path)           the tensors of a file by name, not read yet

`pickles` interprets a pickle without running it; `containers` knows the file formats; `maps` and
backbones/<family>/weights.py know the names of tensors; `identify` finds the backbone; `transfer` inspects, imports and
exports. Only opening a file needs no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["Provenance", "export_file", "import_file", "inspect_file", "load_into", "open_weights"]

_HOMES = {  # public name: the module that defines it
    "load_into": "harness.weights.load",
    "Provenance": "harness.weights.load",
    "open_weights": "harness.weights.files",
    "inspect_file": "harness.weights.transfer",
    "import_file": "harness.weights.transfer",
    "export_file": "harness.weights.transfer",
}


def __getattr__(name: str) -> Any:
    """Imports the module of a public name at its first use, so that `import harness.weights` needs no torch."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'harness.weights' has no attribute {name!r}")
