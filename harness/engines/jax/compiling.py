"""`jax.jit` with the options of XLA that the engine needs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TypedDict, Unpack

import jax
from jax.stages import Wrapped

# On a CPU, the XLA of jaxlib 0.10 runs each matrix product and convolution in the library YNNPACK, on one thread. XLA's
# Eigen routines, which it takes if no fusion is left to YNNPACK (""), train a U-Net faster: adm-xs at 0.98 of torch's speed
# instead of 0.63, by benchmarks/frameworks.py.
CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": ""}


class JitSettings(TypedDict, total=False):
    """The settings of jax.jit that the engine uses."""

    out_shardings: object  # a tree of shardings
    static_argnums: int | tuple[int, ...]
    donate_argnums: int | tuple[int, ...]


def jit(function: Callable[..., object], platform: str, **settings: Unpack[JitSettings]) -> Wrapped:
    """`jax.jit` for a platform ("cpu", "gpu", "tpu"); `settings` are jax.jit's."""
    return jax.jit(function, compiler_options=_options(platform), **settings)


@cache
def _options(platform: str) -> dict[str, str] | None:
    """The compiler options for a platform; None if there are none, or if this version of XLA does not know them.

    A trial compilation shows whether it does. The result is cached.
    """
    if platform != "cpu":
        return None
    try:
        jax.jit(lambda: 0, compiler_options=CPU_OPTIONS).lower().compile()
    except jax.errors.JaxRuntimeError:  # another version, without that option
        return None
    return CPU_OPTIONS
