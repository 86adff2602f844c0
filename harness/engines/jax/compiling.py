"""How the engine compiles: jax.jit, with what XLA should be told."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import jax

# On CPUs the XLA of jaxlib 0.10 hands products and convolutions to the library YNNPACK, one thread each. Its own Eigen
# routines train a U-Net faster: adm-xs at 0.98 of torch's speed instead of 0.63, by benchmarks/frameworks.py.
CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": ""}


def jit(function: Callable[..., Any], platform: str, **settings: Any) -> Any:
    """`jax.jit` for a platform ("cpu", "gpu", "tpu"); `settings` are jax.jit's."""
    return jax.jit(function, compiler_options=_options(platform), **settings)


@cache
def _options(platform: str) -> dict[str, str] | None:
    """The options that this version of XLA knows."""
    if platform != "cpu":
        return None
    try:
        jax.jit(lambda: 0, compiler_options=CPU_OPTIONS).lower().compile()
    except jax.errors.JaxRuntimeError:  # another version, without that option
        return None
    return CPU_OPTIONS
