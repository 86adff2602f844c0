"""What a backbone is, described without importing a framework.

A `BackboneSpec` holds data and the addresses ("module:attribute") of the code that builds the network; that code is
imported only when `build` is called. The compute convention behind `Compute` is described in `harness.compute`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from harness.errors import RunError, UserError, one_line, shown

KINDS = ("denoiser", "upsampler", "classifier", "generator")
"""Calls by kind: denoiser (x, t, y); upsampler (x, t, y, low_res); classifier (x, t); generator (z, y)."""

FRAMEWORKS = ("torch", "jax")

TIMES = ("timestep", "unit", "log-sigma")
"""Forms of a network's time input (`harness.diffusion.network_times`)."""


class ComputeRow(NamedTuple):
    """Compute of one part of a network: `part` is a module path, `kind` one of linear, conv, attention, fft, norm, and
    custom for declared operations."""

    part: str
    kind: str
    flops: int


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Compute of one forward pass on one image (no guidance, no decoder) and the number of parameters.

    1 multiply-add = 1 flop, plus 1 flop per element of the normalisations that the convention counts. training: of a
    forward pass in training mode, where it differs (`BackboneSpec.masked_training`).
    """

    params: int  # trainable parameters; fixed position tables are not parameters
    rows: tuple[ComputeRow, ...]
    source: str = "closed form"  # or "traced"
    training: Compute | None = None

    @property
    def in_training(self) -> Compute:
        """Of a forward pass in training mode."""
        return self if self.training is None else self.training

    @property
    def flops(self) -> int:
        return sum(row.flops for row in self.rows)

    @property
    def macs(self) -> int:
        """Multiply-adds alone: `flops` without the normalisations."""
        return sum(row.flops for row in self.rows if row.kind != "norm")

    @property
    def gflops(self) -> float:
        return self.flops / 1e9

    @property
    def gmacs(self) -> float:
        return self.macs / 1e9

    @property
    def breakdown(self) -> dict[tuple[str, str], int]:
        """Flops by (part, kind), in the order of the network."""
        table: dict[tuple[str, str], int] = {}
        for row in self.rows:
            table[row.part, row.kind] = table.get((row.part, row.kind), 0) + row.flops
        return table


@dataclass(frozen=True, kw_only=True)
class BackboneSpec:
    """A backbone with its name.

    `defaults` holds all arguments of the builder with their defaults. For a denoiser these are at least input_size
    (side in pixels or latent cells), in_channels, num_classes and out_channels. out_channels None means the number that
    the objective needs: 2 * in_channels (noise and variance) for the paper's objective.
    `null_label` is the label for "no class": an index, or "num_classes" for the index after the last class. None means
    that the backbone has no null label: labels are not dropped, and classifier-free guidance is refused.
    `builders` maps a framework to "module:attribute", a callable that takes the arguments of `defaults` by keyword.
    `closed_form` is a function with the same arguments, or its "module:attribute". It returns a `Compute`, and raises
    `UserError` if the arguments do not fit the architecture. Without it the compute is traced, and marked as traced.
    `uncounted_norms` are glob patterns of module paths; the compute convention does not count their normalisations.
    `masked_training` says that training computes on a part of each image, such as half of its tokens (MDT, MaskDiT): training
    compute is then that of the forward pass in training mode, as traced from the network (torch's, if it has one), or
    stated by the closed form in `Compute.training`.
    `time` is what a denoiser or upsampler is given as t: "timestep", 0 to 999, or what its objective states in continuous
    time; "unit", float32 from 0 (image) to 1 (noise); "log-sigma", float32, the logarithm of the noise level s / a of
    x_t = a x_0 + s eps, within [-10, 10].
    `times` 2 says that a denoiser predicts a step, and is given its end too: t is then float32 (N, 2), the time of x_t and the
    time at which the step ends, both in the form `time`. Such a network is trained by an objective of two times
    (`harness.diffusion.objectives.TwoTimes`).
    """

    name: str
    kind: str = "denoiser"
    family: str = ""
    summary: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    null_label: int | str | None = None
    builders: Mapping[str, str] = field(default_factory=dict)
    closed_form: str | Callable[..., Compute] | None = None
    uncounted_norms: tuple[str, ...] = ()
    masked_training: bool = False
    time: str = "timestep"
    times: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"backbone {self.name!r}: kind {self.kind!r} is not one of {', '.join(KINDS)}")
        if not self.builders:
            raise UserError(f"backbone {self.name!r} has no builder; give builders={{'torch': 'module:attribute'}}")
        if isinstance(self.null_label, str) and self.null_label != "num_classes":
            raise UserError(
                f"backbone {self.name!r}: null_label {self.null_label!r} is neither an index nor 'num_classes'"
            )
        if self.time not in TIMES:
            raise UserError(f"backbone {self.name!r}: time {self.time!r} is not one of {', '.join(TIMES)}")
        if self.time != "timestep" and self.kind not in ("denoiser", "upsampler"):
            raise UserError(f"backbone {self.name!r}: a {self.kind} has no time {self.time!r}; leave it out")
        if self.times not in (1, 2) or (self.times == 2 and self.kind != "denoiser"):
            raise UserError(
                f"backbone {self.name!r}: times is {shown(self.times)}; it is 1, or 2 for a denoiser that is given the end of a step"
            )
        if unknown := sorted(set(self.builders) - set(FRAMEWORKS)):
            raise UserError(
                f"backbone {self.name!r}: builders for {unknown[0]!r}, but only {', '.join(FRAMEWORKS)} exist"
            )

    def arguments(self, **overrides: object) -> dict[str, Any]:
        """The builder's arguments: the defaults, replaced by `overrides`. Raises `UserError` for an unknown name."""
        if unknown := sorted(set(overrides) - set(self.defaults)):
            known = ", ".join(self.defaults)
            raise UserError(f"backbone {self.name!r} has no argument {unknown[0]!r}; it has {known}")
        return {**self.defaults, **overrides}

    def build(self, framework: str = "torch", **overrides: object) -> Any:
        """The initialised network: a torch.nn.Module, or a flax nnx module for "jax", with the weights of seed 0.

        Raises `UserError` if the framework is not there, and, in one line, for any other error of the builder.
        """
        builder = self.builder(framework)
        further = {}
        # The metaclass of nnx.Module hides the signature of a class; that of its __init__ shows.
        signature = inspect.signature(getattr(builder, "__init__") if isinstance(builder, type) else builder)  # noqa: B009
        if framework == "jax" and "rngs" in signature.parameters:
            from backbones.flax_layers import initial_rngs

            further = {"rngs": initial_rngs(0)}
        return self.call_builder(builder, **self.arguments(**overrides), **further)

    def call_builder(self, builder: Callable[..., Any], **arguments: Any) -> Any:
        """What the builder returns. Raises `UserError` in one line for every error of it."""
        try:
            return builder(**arguments)
        except (UserError, RunError, MemoryError):
            raise
        except Exception as error:  # other people's code can raise anything
            raise UserError(f"backbone {self.name!r}: its builder failed: {one_line(error)}") from error

    def builder(self, framework: str) -> Callable[..., Any]:
        """The callable that builds the network from all arguments; for "jax" it also takes `rngs` (flax.nnx.Rngs).

        Raises `UserError` if the backbone has no network in that framework, or if the callable cannot be imported.
        """
        if not isinstance(framework, str) or framework not in self.builders:
            have = ", ".join(self.builders)
            raise UserError(f"backbone {self.name!r} is not implemented for {framework!r}; it is for {have}")
        return load_attribute(self.builders[framework], f"builder of backbone {self.name!r}")

    def count(self, **overrides: object) -> Compute:
        """Compute and parameters: by the closed form if there is one, else by tracing (imports torch, or JAX if there is no torch network)."""
        compute = self._count(**overrides)
        if not self.masked_training or compute.training is not None:
            return compute
        return replace(compute, training=_traced(self, training=True, **overrides))

    def _count(self, **overrides: object) -> Compute:
        """As `count`, for `masked_training` only what a closed form states."""
        if self.closed_form is None:
            return _traced(self, **overrides)
        function = self.closed_form
        if isinstance(function, str):
            function = load_attribute(function, f"closed form of backbone {self.name!r}")
        try:
            compute = function(**self.arguments(**overrides))
        except (UserError, RunError):
            raise
        except Exception as error:  # other people's code can raise anything
            raise UserError(f"backbone {self.name!r}: its closed form failed: {one_line(error)}") from error
        if not isinstance(compute, Compute):
            raise UserError(
                f"backbone {self.name!r}: its closed form gave a {type(compute).__name__}, not a harness.spec.Compute"
            )
        return compute

    def null_index(self, num_classes: int) -> int | None:
        """The label that means "no class" in a network of `num_classes` classes; None: there is none."""
        # The only text that is allowed is "num_classes".
        return num_classes if isinstance(self.null_label, str) else self.null_label


_tracer: Callable[..., Compute] | None = None


def _traced(spec: BackboneSpec, **options: object) -> Compute:
    assert _tracer is not None, "importing harness sets the tracer"
    return _tracer(spec, **options)


def set_tracer(trace: Callable[..., Compute]) -> None:
    """Set the function that counts a network without a closed form: (spec, training=False, **build arguments) -> Compute.

    That function needs torch and imports this module, so this module cannot import it; `harness` sets it.
    """
    global _tracer
    _tracer = trace


def load_attribute(address: str, what: str) -> Any:
    """The object at "module:attribute"; `what` names it in the error."""
    module, _, attribute = address.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        missing = (getattr(error, "name", None) or "").partition(".")[0]  # top-level package that was not found
        remedy = "; run: pip install 'backbone-harness[jax]'" if missing in ("jax", "jaxlib", "flax") else ""
        raise UserError(f"{what} cannot be loaded from {address!r}: {error}{remedy}") from error
