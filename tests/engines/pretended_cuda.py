"""A pretended GPU: the meta device in its place, with a record of what a real one would have to wait for.

Tensors on it have shapes and no numbers. So it shows, on any machine and in seconds, which copies would make the host wait,
which operations mix tensors of two devices, and how many kernels a step launches; not whether the numbers are right.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.optim import optimizer
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import harness
from harness.compute.meta_torch import FusedAttention
from harness.engines.torch import trainer
from harness.frameworks import torch_transfer

DEVICE = torch.device("meta")
ROOT = Path(harness.__file__).parent.parent
SOURCES = (f"{ROOT}/harness/", f"{ROOT}/backbones/")
COPIES = ("aten::_to_copy", "aten::copy_", "aten::to")
# Their result, or its shape, depends on values, which the host has to read.
READS = (
    "aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::masked_select",
    "aten::_unique2", "aten::unique_dim",
)  # fmt: skip
ALLOCATIONS = ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided")
GENERATOR = "harness/randomness/threefry_torch.py"


class PretendedDevice(TorchDispatchMode):
    """While it is active, what happens on DEVICE is counted.

    waits: copies and reads for which the host waits. mixed: operations on tensors of two devices, which fail on a real one.
    Both with file and line. events: how many were waited for. launches: kernels by the file of the project that launches them; views launch nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pinned: set[int] = set()  # addresses of pinned memory
        self.reset()

    def reset(self) -> None:
        self.waits, self.mixed, self.launches = Counter(), Counter(), Counter()
        self.events = 0

    @property
    def random_share(self) -> float:
        """The share of random numbers in all launches."""
        return self.launches[GENERATOR] / self.launches.total()

    def record_event(self) -> SimpleNamespace:
        """As of a stream. Whoever waits for an event when more work has been queued leaves the device busy."""

        def synchronize() -> None:
            self.events += 1

        return SimpleNamespace(synchronize=synchronize)

    def summary(self) -> str:
        random, total = self.launches[GENERATOR], self.launches.total()
        return f"{total} launches, {random} of random numbers; waits {dict(self.waits)}; mixed {dict(self.mixed)}"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, torch.Tensor)]
        target = kwargs.get("device")
        inside = [each for each in tensors if each.device == DEVICE]
        outside = [each for each in tensors if each.device != DEVICE]
        if not inside and (target is None or torch.device(target) != DEVICE):
            return func(*args, **kwargs)
        name = func._schema.name
        file, line = _site()
        where = f"{file}:{line} {name}"
        if name in COPIES:
            return self._copy(func, args, kwargs, where)
        if name in READS or (name in ("aten::index", "aten::index_put_") and _has_mask(args[1])):
            self.waits[where] += 1
            if name == "aten::_local_scalar_dense":
                return torch.ones((), dtype=args[0].dtype).item()
        if inside and outside:
            # A scalar on the host is an argument of the kernel, except for `where`, which copies it.
            if all(each.dim() == 0 for each in outside) and not name.startswith("aten::where"):
                pass
            elif name.startswith(("aten::index", "aten::where")):
                self.waits[where] += 1
            else:
                self.mixed[where] += 1
            args, kwargs = tree_map(
                lambda each: each.to(DEVICE) if isinstance(each, torch.Tensor) else each, (args, kwargs)
            )
        if name not in ALLOCATIONS and not func.is_view:
            self.launches[file] += 1
        # Their shapes, which torch takes a hundred times as long to find.
        if name == "aten::native_group_norm":
            statistics = torch.empty(args[3], args[6], device=DEVICE)
            return torch.empty_like(args[0]), statistics, statistics
        if name == "aten::native_group_norm_backward":
            return tuple(torch.empty_like(args[at]) for at in (1, 4, 4))
        return func(*args, **kwargs)

    def _copy(self, func, args, kwargs, where):
        if func._schema.name == "aten::copy_":
            target, source = args[:2]
            waits = not (len(args) > 2 and args[2])
            to = target.device
        else:
            source, waits = args[0], not kwargs.get("non_blocking", False)
            to = torch.device(kwargs.get("device") or source.device)
        if source.device == DEVICE == to:
            self.launches[where.partition(":")[0]] += 1
            return func(*args, **kwargs)
        if to == DEVICE and source.untyped_storage().data_ptr() not in self.pinned:
            waits = True  # the driver copies to pinned memory first
        if waits:
            self.waits[where] += 1
        if to == DEVICE:
            return func(*args, **kwargs)
        values = torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype)  # there are no numbers to copy
        return args[0].copy_(values) if func._schema.name == "aten::copy_" else values


@contextmanager
def pretended_gpu(monkeypatch) -> Iterator[PretendedDevice]:
    """Context in which the engine takes DEVICE for a GPU."""
    autocast, fused = torch.autocast, optimizer._get_fused_kernels_supported_devices

    def autocast_there(device_type, *arguments, **options):
        return nullcontext() if device_type == DEVICE.type else autocast(device_type, *arguments, **options)

    monkeypatch.setattr(torch, "autocast", autocast_there)
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: [*fused(), DEVICE.type])
    foreach = _foreach_utils._get_foreach_kernels_supported_devices
    monkeypatch.setattr(_foreach_utils, foreach.__name__, lambda: [*foreach(), DEVICE.type])
    monkeypatch.setattr(trainer, "apply_resolved", lambda resolved: DEVICE)
    gpu = PretendedDevice()

    def pinned(tensor):
        gpu.pinned.add(tensor.untyped_storage().data_ptr())
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)
    monkeypatch.setattr(torch_transfer, "pinned_bytes", lambda count: pinned(torch.empty(count, dtype=torch.uint8)))
    for module in (torch_transfer, trainer):
        monkeypatch.setattr(module, "queues_copies", lambda device: device == DEVICE)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: gpu)
    with FusedAttention(), gpu:
        yield gpu


def _has_mask(indices) -> bool:
    return any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in indices)


def _site() -> tuple[str, int]:
    """(file, line) of the project that the operation comes from; of a backward pass, where it was begun."""
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(SOURCES) and not file.endswith("meta_torch.py"):
            return file.removeprefix(f"{ROOT}/"), frame.f_lineno
        frame = frame.f_back
    return "", 0
