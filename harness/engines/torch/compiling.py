"""torch.compile: whether it can be had on a machine, what of a network is compiled, and whether it repays."""

from __future__ import annotations

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

CHOICES = ("auto", "on", "off")
WORTH_SECONDS = 3600.0  # a run that is done sooner is not worth compiling for, nor worth measuring
MARGIN = 0.97  # of the time without: by so much less it must be done, compiling included


class Choice(NamedTuple):
    """What became of `--compile`: "on" or "off", why, and seconds an image when it was measured."""

    mode: str
    reason: str
    seconds: float | None = None


def lacking(device: torch.device) -> str | None:
    """What torch.compile misses on this machine, with the remedy; None: nothing."""
    if device.type not in ("cpu", "cuda"):
        return f"torch.compile is not used on {device.type}; leave out --compile"
    compilers = ["g++", "clang++"] if device.type == "cpu" else ["gcc", "cc", "clang"]
    variable = "CXX" if device.type == "cpu" else "CC"
    if device.type == "cpu" and sys.platform != "darwin":
        compilers = ["g++"]  # what torch calls unless CXX names another
    if named := os.environ.get(variable):
        compilers = [named]
    if not any(map(shutil.which, compilers)):
        language = "C++" if device.type == "cpu" else "C"
        return f"torch.compile needs a {language} compiler and there is no {' or '.join(compilers)}; install one (apt install g++)"
    if device.type == "cuda" and find_spec("triton") is None:
        return "torch.compile needs triton on a GPU; run: pip install triton"
    return None


def units(net: nn.Module) -> list[nn.Module]:
    """What is compiled by itself: the equal blocks that hold most of a network, which share one code, or all of it."""
    everything = sum(each.numel() for each in net.parameters())
    for module in net.modules():
        if not isinstance(module, nn.ModuleList) or len(module) < 2:
            continue
        first, *others = (
            (type(each), [tuple(weight.shape) for weight in each.parameters()]) for each in module.children()
        )
        held = sum(each.numel() for each in module.parameters())
        if all(each == first for each in others) and 2 * held > everything:
            return list(module)
    return [net]


def _same_masks() -> None:
    from torch._inductor import config

    config.fallback_random = True  # dropout draws what it draws uncompiled


def compile_network(net: nn.Module) -> None:
    """Compile `net` in place, at its first call for each shape; weights keep their names and masks of dropout their bits."""
    _same_masks()
    for unit in units(net):
        unit.compile(dynamic=False)


def compile_sampler(net: nn.Module, device: torch.device) -> Callable[..., torch.Tensor]:
    """The compiled network for sampling, where the same shapes come again and again.

    On a GPU all of it becomes one CUDA graph, so that small networks do not wait for Python. Where that cannot be had the
    kernels are launched one by one; they are the same.
    """
    if device.type != "cuda":
        compile_network(net)
        return net
    _same_masks()
    graph = torch.compile(net, mode="reduce-overhead", dynamic=False)
    plain = torch.compile(net, dynamic=False)
    usable = True

    def call(*inputs: torch.Tensor) -> torch.Tensor:
        nonlocal usable
        if usable:
            try:
                torch.compiler.cudagraph_mark_step_begin()  # what the call before returned has been used
                return graph(*inputs).clone()
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError:
                usable = False
        return plain(*inputs)

    return call


def undo(net: nn.Module) -> None:
    """Back to the network as it was."""
    for unit in units(net):
        unit._compiled_call_impl = None


def check(device: torch.device) -> None:
    """Refuse to compile where it cannot be had."""
    if reason := lacking(device):
        raise UserError(f"--compile on: {reason}, or leave it out")


def choose(
    wanted: str,  # of CHOICES
    net: nn.Module,
    *,
    lacking: str | None,  # what `lacking` found
    seconds: float,  # of training on one image, without
    images: int,  # of the whole run
    measure: Callable[[], float],  # seconds of training on one image with `net` as it is, in this process
    say: Callable[[str], None],
    most: Callable[[float], float] = lambda value: value,  # the largest of all processes' values
) -> Choice:
    """What to freeze. auto compiles where it was measured to be faster over the whole run, compiling included.

    `net` is left uncompiled. Whatever goes wrong in the compiler leaves `auto` without it; under `on` it is a refusal.
    Processes measure each by itself, as any of them may fail, and then agree: one that failed decides for all, else the
    slowest. `measure` waits for no other process.
    """
    if wanted == "off":
        return Choice("off", "not asked for")
    if lacking is not None:
        if wanted == "on":
            raise UserError(f"--compile on: {lacking}, or leave it out")
        return Choice("off", lacking)
    if wanted == "auto" and seconds * images < WORTH_SECONDS:
        return Choice("off", f"a run of {seconds * images:.0f} s is over before it repays")
    say("compiling, and measuring what it gains ...")
    begin = time.perf_counter()
    compiled, reason, cause = 0.0, "torch.compile failed in another process", None
    try:
        compile_network(net)
        measure()  # compiles, which may take longer than a measurement waits for
        compiled = measure()
    except UserError:
        raise
    except Exception as error:  # the compiler's are of many kinds
        text = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        reason, cause = f"torch.compile failed here ({text})", error
    finally:
        undo(net)
    cost = time.perf_counter() - begin
    if most(float(cause is not None)):
        if wanted == "on":
            raise UserError(f"--compile on: {reason}; leave it out") from cause
        return Choice("off", reason)
    compiled, cost = most(compiled), most(cost)
    gain = f"{seconds / compiled:.2f} times as fast, {cost:.0f} s to compile"
    if wanted == "on" or cost + compiled * images < MARGIN * seconds * images:
        return Choice("on", gain, compiled)
    return Choice("off", f"it does not repay: {gain}", compiled)
