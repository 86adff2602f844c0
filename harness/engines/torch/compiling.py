"""torch.compile: whether it is available on a machine, which modules are compiled, and whether it saves time."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import nn

from harness.errors import UserError

logger = logging.getLogger(__name__)

CHOICES = ("auto", "on", "off")
WORTH_SECONDS = 3600.0  # a shorter run is neither compiled nor measured compiled
MARGIN = 0.97  # a compiled run must take at most this share of the time uncompiled, its compilation included


class Choice(NamedTuple):
    """The decision whether to compile, by `choose`."""

    mode: str  # "on" or "off"
    reason: str
    seconds: float | None = None  # of training on one image in one process, compiled; None: not measured


def unavailable_reason(device: torch.device) -> str | None:
    """Why torch.compile is not available on this machine, and the fix. None: it is available."""
    if device.type not in ("cpu", "cuda"):
        return f"torch.compile is not used on {device.type}; leave out --compile"
    # The compiler's variable and language: on a GPU triton builds its launchers in C; on a CPU the kernels are C++.
    if device.type == "cuda":
        variable, language, compilers = "CC", "C", ["gcc", "cc", "clang"]
    elif sys.platform == "darwin":
        variable, language, compilers = "CXX", "C++", ["g++", "clang++"]
    else:
        variable, language, compilers = "CXX", "C++", ["g++"]  # what torch calls unless CXX names another
    if named := os.environ.get(variable):
        compilers = [named]
    if not any(map(shutil.which, compilers)):
        return f"torch.compile needs a {language} compiler and there is no {' or '.join(compilers)}; install one (apt install g++)"
    if device.type == "cuda" and find_spec("triton") is None:
        return "torch.compile needs triton on a GPU; run: pip install triton"
    return None


def units(net: nn.Module) -> list[nn.Module]:
    """The modules to compile one by one: the equal blocks of a ModuleList that holds most of the weights, else [net].

    Blocks are equal if they have one class and the same shapes of weights: compiled code is then shared.
    """
    total = sum(weight.numel() for weight in net.parameters())
    for module in net.modules():
        if not isinstance(module, nn.ModuleList) or len(module) < 2:
            continue
        first, *others = (
            (type(block), [tuple(weight.shape) for weight in block.parameters()]) for block in module.children()
        )
        list_total = sum(weight.numel() for weight in module.parameters())
        if all(other == first for other in others) and 2 * list_total > total:
            return list(module)
    return [net]


def _configure_compiler() -> None:
    """Set what holds for all networks that this process compiles from now on.

    Compiled dropout draws the masks of uncompiled dropout. In DistributedDataParallel a block is compiled whole: torch would
    split it where a bucket of gradients ends, for an overlap that blocks compiled one by one have anyway.
    """
    from torch import _dynamo, _inductor

    _inductor.config.fallback_random = True
    _dynamo.config.optimize_ddp = False


def compile_network(net: nn.Module) -> None:
    """Set `net` to be compiled, in place; it compiles at its first call with each shape.

    Names of weights and masks of dropout stay the same.
    """
    _configure_compiler()
    for unit in units(net):
        unit.compile(dynamic=False)


def compile_sampler(net: nn.Module, device: torch.device) -> Callable[..., torch.Tensor]:
    """A function that calls the compiled network, for sampling, where every call has the same shapes.

    On a CPU it is `net` itself, compiled in place.

    On a GPU the network becomes one CUDA graph, so that a small one does not wait for Python. If the graph fails, the same
    kernels are launched one by one from then on.
    """
    if device.type != "cuda":
        compile_network(net)
        return net
    _configure_compiler()
    graph = torch.compile(net, mode="reduce-overhead", dynamic=False)
    plain = torch.compile(net, dynamic=False)
    usable = True

    def call(*inputs: torch.Tensor) -> torch.Tensor:
        nonlocal usable
        if usable:
            try:
                torch.compiler.cudagraph_mark_step_begin()
                return graph(*inputs).clone()  # the next call of the graph overwrites its output
            except torch.cuda.OutOfMemoryError:  # a RuntimeError that `plain` would raise as well
                raise
            except RuntimeError:
                usable = False
        return plain(*inputs)

    return call


def undo(net: nn.Module) -> None:
    """Undo `compile_network`, in place: `net` runs uncompiled again."""
    for unit in units(net):
        unit._compiled_call_impl = None


def check_available(device: torch.device) -> None:
    """Raise UserError, for `--compile on`, if torch.compile is not available on `device`."""
    if reason := unavailable_reason(device):
        raise UserError(f"--compile on: {reason}, or leave it out")


def choose(
    wanted: str,  # of CHOICES
    net: nn.Module,
    *,
    unavailable: str | None,  # from `unavailable_reason`; None, or not None, in all processes alike
    seconds: float,  # of training on one image in one process, uncompiled
    images: int,  # that one process trains on in the whole run
    measure: Callable[[], float],  # seconds of training on one image in this process, with `net` as it is
    all_max: Callable[[float], float] = lambda value: value,  # the largest value of all processes
) -> Choice:
    """Whether to compile. "auto" compiles if the whole run would be faster by measurement, its compilation included.

    `net` is left uncompiled. An error of the compiler means "off" under "auto", and a UserError under "on". Each process
    measures alone, because any of them may fail: `measure` must not wait for other processes. Then all agree. After a
    UserError of `measure` in one of them all raise one. If the compiler has failed in one, none compiles. Otherwise the
    slowest decides.
    """
    if wanted == "off":
        return Choice("off", "not asked for")
    if unavailable is not None:
        if wanted == "on":
            raise UserError(f"--compile on: {unavailable}, or leave it out")
        return Choice("off", unavailable)
    if wanted == "auto" and seconds * images < WORTH_SECONDS:
        return Choice("off", f"a run of {seconds * images:.0f} s is over before compiling pays off")
    logger.info("compiling, and measuring what it gains ...")
    begin = time.perf_counter()
    compiled_seconds = 0.0  # of training on one image in one process, compiled
    # Unless this process fails (cause), a failure is another process's.
    reason, cause = "torch.compile failed in another process", None
    refusal: UserError | None = None  # of `measure`; not raised at once, because the others wait in `all_max`
    try:
        compile_network(net)
        measure()  # the passes that compile are slow, and may end a measurement early; its result is not used
        compiled_seconds = measure()
    except UserError as error:
        refusal = error
    except Exception as error:  # the compiler's are of many kinds
        text = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        reason, cause = f"torch.compile failed here ({text})", error
    finally:
        undo(net)
    cost = time.perf_counter() - begin  # seconds of compilation, about: the measurement is included
    failure = all_max(2.0 if refusal else float(cause is not None))  # the worst of all processes; 0: none, 2: UserError
    if refusal is not None:
        raise refusal
    if failure == 2:
        raise UserError("a training step cannot be measured in another process; its message says why")
    if failure:
        if wanted == "on":
            raise UserError(f"--compile on: {reason}; leave it out") from cause
        return Choice("off", reason)
    compiled_seconds, cost = all_max(compiled_seconds), all_max(cost)
    gain = f"{seconds / compiled_seconds:.2f} times as fast, {cost:.0f} s to compile"
    if wanted == "on" or cost + compiled_seconds * images < MARGIN * seconds * images:
        return Choice("on", gain, compiled_seconds)
    return Choice("off", f"it does not pay off: {gain}", compiled_seconds)
