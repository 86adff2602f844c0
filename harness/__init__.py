"""Benchmarking and evaluation of generative image backbones.

The one public import:

    import harness
    spec = harness.get_backbone("dit-xl-2")
    net = spec.build("torch", input_size=32, in_channels=4, num_classes=1000)

Names load what they need when they are first touched; importing harness imports no framework.
"""

from __future__ import annotations

from harness import _siblings
from harness._version import VERSION

__version__ = VERSION
__all__ = [
    "BackboneSpec",
    "Compute",
    "ComputeRow",
    "RunError",
    "UserError",
    "get_backbone",
    "get_protocol",
    "list_backbones",
    "load_records",
    "register_backbone",
]

_siblings.check()

_HOMES = {
    "BackboneSpec": "harness.spec",
    "Compute": "harness.spec",
    "ComputeRow": "harness.spec",
    "RunError": "harness.errors",
    "UserError": "harness.errors",
    "get_protocol": "harness.protocols",
    "load_records": "results.frame",
}


def get_backbone(name: str):
    """The frozen `BackboneSpec` of that name; an unknown name is refused with the nearest ones."""
    from harness.registry import backbones

    return backbones.get(name)


def list_backbones() -> list[str]:
    """The name of every backbone: built-ins, then plug-ins."""
    from harness.registry import backbones

    return backbones.names()


def register_backbone(spec):
    """Register a `BackboneSpec` for this process; as a decorator, what a function without arguments returns."""
    from harness.registry import backbones

    return backbones.register(spec)


def __getattr__(name: str):
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'harness' has no attribute {name!r}")
