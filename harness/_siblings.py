"""Five packages with everyday names: make sure that the other four are the harness's own."""

from __future__ import annotations

import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

SIBLINGS = ("backbones", "evaluators", "results", "reports")


def check() -> None:
    """Raise ImportError naming the package, and the distribution, that stands where a sibling should."""
    root = Path(__file__).resolve().parent.parent
    # `python -m harness` puts the working folder first on the path, where a folder named results/ or reports/ is common
    # and has nothing to do with ours. While the package is being located for -m, argv[0] is "-m".
    if sys.argv[:1] == ["-m"] and root != Path.cwd() and sys.path[:1] in ([""], [str(Path.cwd())]):
        del sys.path[0]
    for name in SIBLINGS:
        spec = find_spec(name)
        origin = Path(spec.origin).resolve() if spec is not None and spec.origin else None
        if origin == root / name / "__init__.py":
            continue
        if spec is None:
            raise ImportError(f"the package {name!r} of backbone-harness is missing; install backbone-harness again")
        where = origin or Path(next(iter(spec.submodule_search_locations or ["?"])))
        owners = metadata.packages_distributions().get(name, [])
        others = [owner for owner in owners if owner != "backbone-harness"]
        culprit = f"the distribution {others[0]!r}" if others else "a folder on the import path"
        raise ImportError(
            f"{culprit} has put another package named {name!r} ({where}) in the way of backbone-harness; "
            f"{f'uninstall {others[0]}' if others else 'rename it'} or use a virtual environment of its own"
        )
