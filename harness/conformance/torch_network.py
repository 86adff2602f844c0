"""A torch network, called with numpy arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.conformance.network import Failure, Inputs, Output
from harness.engines.torch.resolve import autocast
from harness.engines.torch.trainer import build
from harness.spec import BackboneSpec

CPU = torch.device("cpu")


class TorchNetwork:
    """A network on the CPU. Implements `harness.conformance.network.Network`."""

    framework = "torch"

    def __init__(self, spec: BackboneSpec, arguments: dict[str, Any], seed: int = 0):
        self.net = build(spec, arguments, seed)
        self._calls = 0
        if not isinstance(self.net, torch.nn.Module):
            raise Failure(
                f"expected a torch.nn.Module from the builder {spec.builders['torch']}, came {type(self.net).__name__}"
            )

    def call(self, inputs: Inputs, *, training: bool = False, precision: str = "float32") -> Output:
        self.net.train(training)
        tensors = _tensors(inputs)
        with torch.no_grad(), torch.random.fork_rng(devices=[]), autocast(CPU, precision):
            self._calls += 1
            torch.manual_seed(0 if training else self._calls)
            out = _checked(self.net(*tensors.values()))
        written = tuple(name for name, array in inputs.items() if not np.array_equal(tensors[name].numpy(), array))
        return Output(values=out.float().numpy(), dtype=str(out.dtype).removeprefix("torch."), written=written)

    def tensors(self, inputs: Inputs) -> list[Tensor]:
        """The inputs as tensors, for a direct call of `net`."""
        return list(_tensors(inputs).values())

    def gradients(self, inputs: Inputs, images: slice) -> tuple[np.ndarray, dict[str, np.ndarray | None]]:
        self.net.train()
        tensors = _tensors(inputs)
        first = next(iter(tensors))  # x, or z of a generator
        source = tensors[first].requires_grad_(True)
        tensors[first] = source.clone()  # so that a network may write into it
        names, weights = zip(*((n, p) for n, p in self.net.named_parameters() if p.requires_grad), strict=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            out = _checked(self.net(*tensors.values()))
        if not out.requires_grad:
            raise Failure("expected an output with gradients in training mode, came one without: is it detached?")
        probe = torch.from_numpy(np.random.default_rng(1).standard_normal(tuple(out.shape[1:]), np.float32))
        found = torch.autograd.grad((out[images].float() * probe).sum(), [source, *weights], allow_unused=True)
        arrays = [None if each is None else each.float().numpy() for each in found]
        of_input = np.zeros(tuple(source.shape), np.float32) if arrays[0] is None else arrays[0]
        return of_input, dict(zip(names, arrays[1:], strict=True))

    def frozen(self) -> list[str]:
        return [name for name, weight in self.net.named_parameters() if not weight.requires_grad]

    def trained(self) -> list[str]:
        return [name for name, weight in self.net.named_parameters() if weight.requires_grad]

    def weights(self) -> dict[str, np.ndarray]:
        return {name: value.detach().cpu().numpy().copy() for name, value in self.net.state_dict().items()}

    def load(self, weights: Mapping[str, np.ndarray]) -> None:
        self.net.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in weights.items()})


def _tensors(inputs: Inputs) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array.copy()) for name, array in inputs.items()}


def _checked(out: object) -> Tensor:
    if not isinstance(out, Tensor):
        raise Failure(f"expected one tensor from forward, came a {type(out).__name__}: return the tensor alone")
    return out
