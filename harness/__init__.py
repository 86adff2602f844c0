"""Benchmarking and evaluation of generative image backbones.

The one public import:

    import harness

    result = harness.run(backbone="dit-xs-2", steps=800)          # train, sample, evaluate, report
    harness.load_records("runs")                                  # a pandas DataFrame, one row per record

    spec = harness.get_backbone("dit-xl-2")
    net = spec.build("torch", input_size=32, in_channels=4, num_classes=1000)

`run`, `train`, `sample`, `evaluate`, `plan`, `report` and `compare` take the flags of the commands of the same names as
keyword arguments and return typed results; `help(harness.run)` lists them. What they say on their way goes to the logger
"harness". Names load what they need when they are first used; importing harness imports no framework.
"""

from __future__ import annotations

import importlib
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness._version import VERSION
from harness.spec import set_tracer

if TYPE_CHECKING:
    from harness.errors import RunError as RunError
    from harness.errors import UserError as UserError
    from harness.pipeline.compare import compare as compare
    from harness.pipeline.evaluate import evaluate as evaluate
    from harness.pipeline.evaluate import evaluate_images as evaluate_images
    from harness.pipeline.plan import plan as plan
    from harness.pipeline.report import report as report
    from harness.pipeline.run import run as run
    from harness.pipeline.sample import sample as sample
    from harness.pipeline.train import train as train
    from harness.protocols import get_protocol as get_protocol
    from harness.spec import BackboneSpec as BackboneSpec
    from harness.spec import Compute as Compute
    from harness.spec import ComputeRow as ComputeRow
    from results.frame import load_records as load_records

__version__ = VERSION
_SIBLINGS = ("backbones", "evaluators", "results", "reports")  # everyday names, which other distributions may use, too

_HOMES = {
    "BackboneSpec": "harness.spec",
    "Compute": "harness.spec",
    "ComputeRow": "harness.spec",
    "RunError": "harness.errors",
    "UserError": "harness.errors",
    "compare": "harness.pipeline.compare",
    "evaluate": "harness.pipeline.evaluate",
    "evaluate_images": "harness.pipeline.evaluate",
    "get_protocol": "harness.protocols",
    "load_records": "results.frame",
    "plan": "harness.pipeline.plan",
    "report": "harness.pipeline.report",
    "run": "harness.pipeline.run",
    "sample": "harness.pipeline.sample",
    "train": "harness.pipeline.train",
}
__all__ = ["__version__", "get_backbone", "list_backbones", "register_backbone", *_HOMES]


def get_backbone(name: str) -> BackboneSpec:
    """The frozen `BackboneSpec` of that name; UserError with the nearest names for an unknown one."""
    from harness.registry import backbones

    return backbones.get(name)


def list_backbones() -> list[str]:
    """The names of all backbones: built-ins, then plug-ins."""
    from harness.registry import backbones

    return backbones.names()


def register_backbone(spec: Any) -> Any:
    """Register a `BackboneSpec` for this process. As a decorator: what a function without arguments returns."""
    from harness.registry import backbones

    return backbones.register(spec)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'harness' has no attribute {name!r}")


def _trace(spec: BackboneSpec, **overrides: Any) -> Compute:
    from harness.compute.trace_torch import trace

    return trace(spec, **overrides)


def _check_siblings() -> None:
    """Raise ImportError naming the package, and the distribution, that stands where a sibling should."""
    root = Path(__file__).resolve().parent.parent
    # `python -m harness` puts the working folder first on the path, where a folder named results/ or reports/ is common
    # and has nothing to do with ours. While the package is being located for -m, argv[0] is "-m".
    if sys.argv[:1] == ["-m"] and root != Path.cwd() and sys.path[:1] in ([""], [str(Path.cwd())]):
        del sys.path[0]
    for name in _SIBLINGS:
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


_check_siblings()
set_tracer(_trace)
