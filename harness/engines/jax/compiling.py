"""`jax.jit` with the options of XLA that the engine needs, and the cache of compiled programs."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TypedDict, Unpack

import jax
from jax.stages import Wrapped

from harness.data.cache_dir import compiled

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


CACHE_BYTES = 4 << 30  # the programs that were not used for the longest time are removed beyond this
WRITING_SECONDS = 60.0  # an incomplete program that is older is no longer being written


def keep_compiled_programs() -> None:
    """Let JAX keep what it compiles for more than a second in the user's cache, from where the next process takes it.

    Does nothing if the user has chosen a folder (JAX_COMPILATION_CACHE_DIR), or if the cache cannot be written.
    """
    if getattr(jax.config, "jax_compilation_cache_dir", None) is not None:
        return
    folder = compiled(_machine())
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # it only saves time
        return
    if os.access(folder, os.W_OK):
        remove_incomplete(folder)
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)


def remove_incomplete(folder: Path) -> None:
    """Remove programs that a killed process, or a full disk, left in part: with one of them JAX adds no program, and warns.

    JAX writes the time of use, a file of its own, after the program.
    """
    for program in folder.glob("*-cache"):
        with suppress(OSError):  # such as of another process that removes it
            age = time.time() - program.stat().st_mtime
            if age > WRITING_SECONDS and not program.with_name(program.name.removesuffix("cache") + "atime").exists():
                program.unlink()


def _machine() -> str:
    """A name for machines with the same processor: a home that several of them share holds programs of each kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux, where homes are seldom shared
        lines = []
    told = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:12]
