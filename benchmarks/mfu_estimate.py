"""Where the time of a training step goes on a GPU, as reckoned: no GPU is needed, and nothing is measured.

    python benchmarks/mfu_estimate.py [--backbone dit-xl-2] [--batch 32] [--out FILE.json]

The step runs on tensors without storage, in bfloat16 autocast. Every operation is put into a part, and takes the longer of
its multiply-adds at a share of the peak and of its bytes at a share of the bandwidth. "fused" is what a compiler leaves of
element-wise operations at best: between products, tensors that only element-wise operations read are never written,
except those that the backward pass needs. Peak and bandwidth are an H200's data sheet's; the shares are assumptions, and
named in the output. A measurement (`harness bench`) replaces all of this.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from harness import registry
from harness.compute import TRAINING_FACTOR
from harness.engines.torch.resolve import inputs_of

PEAK, BANDWIDTH = 989.4e12, 4.8e12  # of an H200 SXM: dense bfloat16 operations and bytes a second, by its data sheet
PRODUCT_SHARE = 0.75  # of the peak that large matrix products reach
ATTENTION_SHARE = {"forward": 0.5, "backward": 0.4}  # that fused attention reaches with heads of 72 channels
BANDWIDTH_SHARE = 0.85  # of the bandwidth that element-wise kernels reach
LAUNCH_SECONDS = 4e-6  # an operation takes at least this

PARTS = ("matrix products", "attention", "element-wise", "optimiser", "random numbers", "copies")
VIEWS = ("view", "t", "transpose", "permute", "expand", "slice", "split", "chunk", "unsqueeze", "squeeze", "select", "detach",
         "alias", "_unsafe_view", "_reshape_alias", "unbind", "as_strided", "unflatten")  # fmt: skip
EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
COPIES = ("_to_copy", "copy_", "clone", "cat", "stack")


class Trace(TorchDispatchMode):
    """Operations by part: their number, multiply-adds as operations, bytes, and seconds as reckoned.

    phase: of the step, set by the caller: "forward", "backward" or "optimiser".
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = "forward"
        self.count: Counter[str] = Counter()
        self.operations: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        # By tensor: (part that wrote it, phase, bytes); and whether anything but an element-wise operation of its phase read it.
        self._written: Any = WeakIdKeyDictionary()
        self._kept: set[int] = set()
        self._elementwise: list[
            tuple[int, int]
        ] = []  # (number of the tensor, bytes) that element-wise operations wrote
        self._read_bytes = 0  # that fused kernels read
        self._read: set[int] = (
            set()
        )  # the tensors that element-wise operations have read since the last other operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in EMPTY:
            return out
        if name in VIEWS or func.is_view:
            self._follow(args, out)
            return out
        inputs = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, torch.Tensor)]
        outputs = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        part = self._part(name, func)
        size = sum(map(nbytes, inputs)) + sum(map(nbytes, outputs))
        operations = 0
        if func.overloadpacket in flop_registry:
            operations = flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        self.add(part, operations, size, PRODUCT_SHARE)
        self._fuse(part, inputs, outputs)
        return out

    def add(self, part: str, operations: float, size: int, share: float) -> None:
        """Count one kernel. share: of the peak."""
        self.count[part] += 1
        self.operations[part] += operations
        self.bytes[part] += size
        self.seconds[part] += max(operations / (PEAK * share), size / (BANDWIDTH * BANDWIDTH_SHARE), LAUNCH_SECONDS)

    def _part(self, name: str, func: Any) -> str:
        if self.phase == "optimiser":
            return "optimiser"
        if func.overloadpacket in flop_registry:
            return "matrix products"
        return "copies" if name in COPIES else "element-wise"

    def _follow(self, args: Any, out: Any) -> None:
        """A view is the tensor it shows."""
        base = next((x for x in tree_leaves(args) if isinstance(x, torch.Tensor)), None)
        for view in tree_leaves(out):
            if isinstance(view, torch.Tensor) and base is not None and base in self._written:
                self._written[view] = self._written[base]

    def _fuse(self, part: str, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        """Note what a fused kernel would read and write."""
        fusible = part in ("element-wise", "copies")
        if not fusible:
            self._read.clear()
        for tensor in inputs:
            number, writer, phase = self._written.get(tensor, (None, "input", ""))
            inside = writer == "fusible" and phase == self.phase
            if number is not None and not (fusible and inside):
                self._kept.add(number)  # a product, or the backward pass, reads it: it is written
            if fusible and not inside and number not in self._read:
                self._read_bytes += nbytes(tensor)
                if number is not None:
                    self._read.add(number)
        for tensor in outputs:
            number = self.count.total() * 100 + len(self._elementwise)
            self._written[tensor] = (number, "fusible" if fusible else part, self.phase)
            if fusible:
                self._elementwise.append((number, nbytes(tensor)))

    def fused_bytes(self) -> int:
        """Bytes of element-wise operations and copies, as a compiler leaves them at best."""
        return self._read_bytes + sum(size for number, size in self._elementwise if number in self._kept)


def fused_attention(found: Trace) -> Any:
    """Stands for torch's attention, which without a GPU would be traced as products that keep their scores."""

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            context.save_for_backward(q, k, v)
            out = torch.empty_like(v)
            _count(found, "forward", 2, q, k, (q, k, v, out))
            return out

        @staticmethod
        def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
            q, k, v = context.saved_tensors
            found_gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
            _count(found, "backward", 5, q, k, (q, k, v, v, gradient, *found_gradients))  # scores are computed again
            return found_gradients

    return lambda q, k, v, *_, **__: Attention.apply(q, k, v)


def _count(found: Trace, phase: str, products: int, q: torch.Tensor, k: torch.Tensor, moved: Any) -> None:
    """Count a kernel of attention: so many products of (N, C) with (C, M) for each of its heads."""
    operations = 2 * products * q.numel() * k.shape[-2]
    found.add("attention", operations, sum(map(nbytes, moved)), ATTENTION_SHARE[phase])


def nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def trace(name: str, batch: int) -> tuple[Trace, int]:
    """The traced step of a backbone on `batch` images, and the multiply-adds of a forward pass on one."""
    spec = registry.backbones.get(name)
    arguments = spec.arguments(out_channels=2 * spec.arguments()["in_channels"])
    with torch.device("meta"):
        net = spec.build("torch", **arguments).train()
    inputs = tuple(tensor.to("meta") for tensor in inputs_of(spec.kind, batch, arguments, torch.device("cpu")))
    weights = [weight for weight in net.parameters() if weight.requires_grad]
    state = [
        torch.empty_like(weight, requires_grad=False) for weight in weights for _ in range(3)
    ]  # two moments and the EMA
    found = Trace()
    attention = torch.nn.functional.scaled_dot_product_attention
    torch.nn.functional.scaled_dot_product_attention = fused_attention(found)
    with found:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = net(*inputs).float().square().mean()
        found.phase = "backward"
        loss.backward()
    torch.nn.functional.scaled_dot_product_attention = attention
    moved = sum(map(nbytes, state)) + sum(map(nbytes, weights))  # read and written; gradients are read
    size = 2 * moved + sum(nbytes(weight.grad) for weight in weights if weight.grad is not None)
    found.count["optimiser"], found.bytes["optimiser"] = 2, size  # fused AdamW, and the average's own pass
    found.seconds["optimiser"] = size / (BANDWIDTH * BANDWIDTH_SHARE)
    words = inputs[0].numel() + 2 * batch  # noise; times and flips
    size = words * (
        20 * 3 * 12 + 40
    )  # threefry's 20 rounds of three int32 operations, unfused, then Box-Muller in float32
    found.count["random numbers"], found.bytes["random numbers"] = 80, size
    found.seconds["random numbers"] = max(80 * LAUNCH_SECONDS, size / (BANDWIDTH * BANDWIDTH_SHARE))
    return found, spec.count(**arguments).macs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="dit-xl-2")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found, macs = trace(options.backbone, options.batch)
    useful = 2 * TRAINING_FACTOR * macs * options.batch
    fused = found.fused_bytes() / (BANDWIDTH * BANDWIDTH_SHARE)
    eager, compiled = found.seconds.total(), 0.0
    print(
        f"{options.backbone}, batch {options.batch}, bfloat16, reckoned for an H200 ({PEAK / 1e12:.0f} TFLOP/s, {BANDWIDTH / 1e12} TB/s)"
    )
    print(f"{'part':<16}{'launches':>9}{'TFLOP':>9}{'GB':>9}{'eager ms':>10}{'fused ms':>10}")
    rows = []
    for part in PARTS:
        seconds = found.seconds[part]
        best = {"element-wise": fused, "copies": 0.0}.get(part, seconds)
        compiled += best
        rows.append(
            {
                "part": part, "launches": found.count[part], "tflop": found.operations[part] / 1e12,
                "gigabytes": found.bytes[part] / 1e9, "eager_ms": 1e3 * seconds, "fused_ms": 1e3 * best,
            }
        )  # fmt: skip
        print(
            f"{part:<16}{found.count[part]:>9}{rows[-1]['tflop']:>9.1f}{rows[-1]['gigabytes']:>9.1f}{1e3 * seconds:>10.1f}{1e3 * best:>10.1f}"
        )
    mfu = {"eager": useful / eager / PEAK, "fused": useful / compiled / PEAK}
    print(f"{'sum':<16}{'':>27}{1e3 * eager:>10.1f}{1e3 * compiled:>10.1f}")
    print(f"MFU, reckoned: eager {mfu['eager']:.0%}, fused {mfu['fused']:.0%}")
    assumptions = {
        "product_share": PRODUCT_SHARE, "attention_share": ATTENTION_SHARE, "bandwidth_share": BANDWIDTH_SHARE,
        "launch_seconds": LAUNCH_SECONDS, "peak": PEAK, "bandwidth": BANDWIDTH,
    }  # fmt: skip
    print(f"assumed: {assumptions}")
    if options.out:
        options.out.write_text(
            json.dumps(
                {
                    "backbone": options.backbone,
                    "batch": options.batch,
                    "rows": rows,
                    "mfu": mfu,
                    "assumed": assumptions,
                },
                indent=2,
            )
        )


if __name__ == "__main__":
    main()
