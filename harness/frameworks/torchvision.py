"""torchvision beside a torch that it was not built for.

The torchvision of the package index is built for the CUDA torch of the same version. Beside a CPU build its compiled
operators do not load, and `import torchvision` fails with "operator torchvision::nms does not exist", for it registers
shapes of operators that nobody declared; with it fails whatever imports it when it is there, as diffusers and clean-fid
do. Declaring those operators' signatures is enough: the operators themselves, which find boxes, are not used here.
"""

from __future__ import annotations

import contextlib
import importlib.util

ABSENT = "operator torchvision::nms does not exist"
OPERATORS = ("nms", "qnms")

_declared: list[object] = []  # a declaration lives as long as its object


def make_importable() -> None:
    """Call before importing what may import torchvision. Does nothing where it is absent, or imports by itself."""
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if ABSENT not in str(error) or _declared:
            return  # some other fault, which its user will meet and name
        import torch

        _declared.append(library := torch.library.Library("torchvision", "DEF"))
        for name in OPERATORS:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        with contextlib.suppress(Exception):  # likewise
            importlib.import_module("torchvision")
    except (ImportError, OSError):
        return
