"""Auxiliary losses in torch: heads on tapped activations, with a frozen encoder (`harness.diffusion.auxiliary`)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harness import registry
from harness.compute.meta_torch import build_on_meta, example_inputs, neutral_state
from harness.compute.trace_torch import OperatorCounter, follow_functions
from harness.diffusion.auxiliary import Auxiliary, AuxiliaryCompute
from harness.errors import RunError, UserError, one_line
from harness.randomness import Purpose, bits
from harness.spec import BackboneSpec, load_attribute

CPU = torch.device("cpu")


class AuxiliaryHeads:
    """The heads and the encoder of one training. Call `loss` after a forward pass of the network within `tapping`.

    heads: the module, whose parameters are trained. weight: of the loss. image: (channels, side) of the encoder's images.
    """

    def __init__(
        self,
        wanted: Auxiliary,
        spec: BackboneSpec,
        arguments: Mapping[str, Any],
        image: tuple[int, int],
        *,
        seed: int,
        device: torch.device = CPU,
    ):
        self.wanted = wanted
        loss = registry.auxiliary_losses.get(wanted.name)
        self.weight = loss.weight if wanted.weight is None else wanted.weight
        self._tapped: dict[str, Tensor] = {}
        self._encode = _load_encoder(wanted, device)
        channels, side = image
        with torch.no_grad():
            tokens = None if self._encode is None else self.tokens(torch.zeros(1, channels, side, side, device=device))
        builder = load_attribute(loss.builders["torch"], f"heads of auxiliary loss {loss.name!r}")
        shapes = tapped_shapes(spec, arguments, wanted)
        # The network has position 0 of this purpose (`trainer.build`).
        high, low = (int(word) for word in bits(seed, Purpose.INITIALISATION, np.ones(1, np.int64), 0, 2)[0])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(high << 31 | low >> 1)
            try:
                self.heads: nn.Module = builder(shapes, None if tokens is None else tuple(tokens.shape[1:]))
            except (UserError, RunError):
                raise
            except Exception as error:  # other people's code can raise anything
                raise UserError(
                    f"auxiliary loss {loss.name!r}: its heads cannot be built: {one_line(error)}"
                ) from error
        self.heads = self.heads.to(device).train()

    @contextlib.contextmanager
    def tapping(self, net: nn.Module) -> Iterator[None]:
        """Context in which calls of `net` leave the outputs of the tapped modules here."""
        handles = [_tap(net, tap).register_forward_hook(self._keeper(tap)) for tap in self.wanted.taps]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keeper(self, tap: str) -> Callable[..., None]:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            self._tapped[tap] = output[0] if isinstance(output, tuple) else output

        return keep

    def tokens(self, images: Tensor) -> Tensor:
        """The encoder's tokens, float32 (N, T, D), of images float32 (N, C, H, W) in [-1, 1]."""
        assert self._encode is not None
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            tokens = self._encode(images)
        if not isinstance(tokens, Tensor) or tokens.dim() != 3 or len(tokens) != len(images):
            raise UserError(f"features {self.wanted.encoder}: expected tokens (N, T, D), came {_shape(tokens)}")
        return tokens.float()

    def loss(self, images: Tensor) -> Tensor:
        """The loss of each image, float32 (N,), from the outputs that the last call of the network has left.

        images: those that the batch was made of, float32 (N, C, H, W) in [-1, 1]; latents where there is no encoder.
        """
        tokens = None if self._encode is None else self.tokens(images)
        tapped = {tap: self._tapped.pop(tap).float() for tap in self.wanted.taps}
        values = self.heads(tapped, tokens)
        if not isinstance(values, Tensor) or values.shape != (len(images),):
            raise UserError(
                f"auxiliary loss {self.wanted.name!r}: expected the loss of each image ({len(images)},), came {_shape(values)}"
            )
        return values.float()


def count(
    spec: BackboneSpec, arguments: Mapping[str, Any], wanted: Auxiliary, image: tuple[int, int]
) -> AuxiliaryCompute:
    """The compute of the auxiliary loss on one image (channels, side), counted by the convention of `harness.compute`."""
    heads = AuxiliaryHeads(wanted, spec, arguments, image, seed=0)
    channels, side = image
    pixels = torch.zeros(1, channels, side, side)

    def flops(call: Callable[[], object]) -> int:
        counter = OperatorCounter(f"{wanted.name} of {spec.name}", ())
        with torch.no_grad(), follow_functions(counter), counter:
            call()
        return sum(row.flops for row in counter.rows)

    tokens = None if not wanted.encoder else heads.tokens(pixels)
    tapped = {tap: torch.zeros(1, *shape) for tap, shape in tapped_shapes(spec, arguments, wanted).items()}
    return AuxiliaryCompute(
        encoder=flops(lambda: heads.tokens(pixels)) if wanted.encoder else 0,
        heads=flops(lambda: heads.heads(tapped, tokens)),
        params=sum(weight.numel() for weight in heads.heads.parameters() if weight.requires_grad),
    )


def tapped_shapes(spec: BackboneSpec, arguments: Mapping[str, Any], wanted: Auxiliary) -> dict[str, tuple[int, ...]]:
    """Tap -> shape of its output without the batch. Raises `UserError` for a tap that the network does not have."""
    shapes: dict[str, tuple[int, ...]] = {}
    arguments = dict(arguments)
    with neutral_state(), torch.no_grad(), contextlib.ExitStack() as stack:
        net = build_on_meta(spec, arguments).eval()
        for tap in wanted.taps:

            def keep(module: nn.Module, inputs: Any, output: Any, tap: str = tap) -> None:
                out = output[0] if isinstance(output, tuple) else output
                if not isinstance(out, Tensor) or out.dim() < 2 or len(out) != 1:
                    raise UserError(
                        f"auxiliary loss {wanted.name!r}: {tap} of {spec.name} gives no tensor with a batch"
                    )
                shapes[tap] = tuple(out.shape[1:])

            stack.callback(_tap(net, tap, spec.name).register_forward_hook(keep).remove)
        net(*example_inputs(spec, spec.arguments(**arguments)))
    if unused := [tap for tap in wanted.taps if tap not in shapes]:
        raise UserError(f"auxiliary loss {wanted.name!r}: {unused[0]} of {spec.name} is never called")
    return shapes


def _tap(net: nn.Module, tap: str, name: str = "the network") -> nn.Module:
    try:
        return net.get_submodule(tap)
    except AttributeError:
        near = registry.unknown("module", tap, [path for path, _ in net.named_modules() if path])
        raise UserError(f"recipe: auxiliary: {name} has no such tap: {near}") from None


def _load_encoder(wanted: Auxiliary, device: torch.device) -> Callable[[Tensor], Tensor] | None:
    """The frozen encoder: images float32 (N, C, H, W) in [-1, 1] -> tokens (N, T, D)."""
    if not wanted.encoder:
        return None
    encoder = registry.features.get(wanted.encoder).load_tokens(str(device))
    if isinstance(encoder, nn.Module):
        encoder = encoder.eval().requires_grad_(False)
    return encoder


def _shape(thing: object) -> str:
    return str(tuple(thing.shape)) if isinstance(thing, Tensor) else f"a {type(thing).__name__}"
