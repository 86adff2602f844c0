"""Benchmarking and evaluation of generative image backbones.

Public API:

    import harness

    result = harness.run(backbone="dit-xs-2", steps=800)          # train, sample, evaluate, report
    harness.load_records("runs")                                  # a pandas DataFrame, one row per record

    spec = harness.get_backbone("dit-xl-2")
    net = spec.build("torch", input_size=32, in_channels=4, num_classes=1000)

`run`, `train`, `sample`, `evaluate`, `plan`, `report` and `compare` take the flags of the commands of the same names as
keyword arguments and return typed results; `help(harness.run)` lists them. Their messages go to the loggers "harness",
"evaluators", "results" and "reports". Attributes are imported lazily; importing harness imports no framework.
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
    from harness.data.images import ImageSet as ImageSet
    from harness.errors import RunError as RunError
    from harness.errors import UserError as UserError
    from harness.pipeline.compare import Comparison as Comparison
    from harness.pipeline.compare import compare as compare
    from harness.pipeline.evaluate import EvaluateResult as EvaluateResult
    from harness.pipeline.evaluate import evaluate as evaluate
    from harness.pipeline.evaluation_config import EvaluationConfig as EvaluationConfig
    from harness.pipeline.measure import evaluate_images as evaluate_images
    from harness.pipeline.plan import plan as plan
    from harness.pipeline.report import report as report
    from harness.pipeline.run import RunResult as RunResult
    from harness.pipeline.run import run as run
    from harness.pipeline.sample import SampleResult as SampleResult
    from harness.pipeline.sample import sample as sample
    from harness.pipeline.train import TrainResult as TrainResult
    from harness.pipeline.train import train as train
    from harness.planning.plan import Plan as Plan
    from harness.protocols import get_protocol as get_protocol
    from harness.spec import BackboneSpec as BackboneSpec
    from harness.spec import Compute as Compute
    from harness.spec import ComputeRow as ComputeRow
    from reports.report import ReportSummary as ReportSummary
    from results.frame import load_records as load_records
    from results.records import Record as Record

__version__ = VERSION
# The other packages of this distribution. Their names are common, so another distribution may use them, too.
_SIBLINGS = ("backbones", "evaluators", "results", "reports")

_HOMES = {
    # public name: the module that defines it
    "BackboneSpec": "harness.spec",
    "Compute": "harness.spec",
    "Comparison": "harness.pipeline.compare",
    "ComputeRow": "harness.spec",
    "EvaluateResult": "harness.pipeline.evaluate",
    "EvaluationConfig": "harness.pipeline.evaluation_config",
    "ImageSet": "harness.data.images",
    "Plan": "harness.planning.plan",
    "Record": "results.records",
    "ReportSummary": "reports.report",
    "RunError": "harness.errors",
    "RunResult": "harness.pipeline.run",
    "SampleResult": "harness.pipeline.sample",
    "TrainResult": "harness.pipeline.train",
    "UserError": "harness.errors",
    "compare": "harness.pipeline.compare",
    "evaluate": "harness.pipeline.evaluate",
    "evaluate_images": "harness.pipeline.measure",
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
    """Register a `BackboneSpec` for this process; returns its argument.

    It can also decorate a function without arguments that returns one or several specs, which are then registered.
    """
    from harness.registry import backbones

    return backbones.register(spec)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'harness' has no attribute {name!r}")


def _trace(spec: BackboneSpec, *, training: bool = False, **overrides: Any) -> Compute:
    """Compute of a network without a closed form; see `harness.spec.set_tracer`. Imports a framework when it is called."""
    if "torch" in spec.builders:
        from harness.compute.trace_torch import trace
    else:
        from harness.compute.trace_jax import trace
    return trace(spec, training=training, **overrides)


def _check_siblings() -> None:
    """Raise ImportError if one of `_SIBLINGS` is missing, or if another package hides it; the message names the culprit.

    For `python -m harness`, the working folder is first removed from the import path.
    """
    root = Path(__file__).resolve().parent.parent
    # `python -m harness` puts the working folder first on the import path, and a results/ or reports/ in it would hide
    # ours, so the working folder is removed. While Python locates the package for -m, argv[0] is "-m".
    if sys.argv[:1] == ["-m"] and root != Path.cwd() and sys.path[:1] in ([""], [str(Path.cwd())]):
        del sys.path[0]
    for name in _SIBLINGS:
        spec = find_spec(name)
        origin = Path(spec.origin).resolve() if spec is not None and spec.origin else None
        if origin == root / name / "__init__.py":
            continue
        if spec is None:
            raise ImportError(f"the package {name!r} of backbone-harness is missing; install backbone-harness again")
        # A folder without __init__.py is a namespace package, which has no origin.
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
