"""Makes torchvision importable beside a torch build that it was not compiled for.

The torchvision of the package index is built for the CUDA torch of the same version. Beside a CPU build its compiled
operators do not load, and `import torchvision` fails with "operator torchvision::nms does not exist": it registers
shapes for operators that are not declared. diffusers and clean-fid, which import torchvision if it is installed, fail
with it. Declaring the operators' signatures is enough; the operators (box detection) are not used here.
"""

from __future__ import annotations

import contextlib
import importlib.util

MISSING_OPERATOR = "operator torchvision::nms does not exist"
OPERATORS = ("nms", "qnms")

_declared: list[object] = []  # torch keeps a declaration as long as its Library object lives


def make_importable() -> None:
    """Declare torchvision's missing operators, so that it can be imported. Call this before a package may import it.

    Does nothing if torchvision is not installed, can be imported already, or fails for another reason. Never raises.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if MISSING_OPERATOR not in str(error) or _declared:
            return  # a fault that declaring does not repair: the package that imports torchvision will report it
        import torch

        library = torch.library.Library("torchvision", "DEF")
        _declared.append(library)
        for name in OPERATORS:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        with contextlib.suppress(Exception):  # a fault that remains will be reported in the same way
            importlib.import_module("torchvision")
    except (ImportError, OSError):  # a broken installation, which will be reported in the same way
        return
