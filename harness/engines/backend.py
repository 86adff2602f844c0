"""Engines: what trains and samples a network, one folder a framework.

Each has a module `workbench` with the same functions, which is all that the stages know of it:

    measure(request, device=, precision=, micro_batch=, mesh=, compile=, say=) -> (network at its initialisation, Measured)
    make_engine(request, run, data, network or None, mesh) -> harness.pipeline.training_loop.Engine
    make_sampler(request, run, snapshot, plan, precision=, batch=, compile=, decoder=) -> harness.pipeline.sampling_loop.Sampler
    resolve_device(device) -> Place
    make_chain(bound, decoder, place, seed=, precision=, batch=, compile=) -> harness.pipeline.sampling_loop.Sampler, of a system
"""

import os
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

from harness.distributed.group import SINGLE_PROCESS, ProcessGroup
from harness.distributed.launch import launched
from harness.errors import UserError
from harness.frameworks.installed import check_installed


class DeviceInfo(NamedTuple):
    """Where a system is sampled."""

    target: Any  # the framework's own: a torch.device, a mesh of jax's
    platform: str  # "cpu", "cuda:1", as --device takes it
    name: str  # what a person calls it; of processors with the threads that are used


def check_torch_only(precision: str = "float32", compile: str = "off") -> None:
    """Refuse, in jax, the options that are torch's."""
    if precision == "tf32":
        raise UserError("precision tf32 belongs to --framework torch; jax has float32 and bfloat16")
    if compile == "on":
        raise UserError("--compile belongs to --framework torch; jax always compiles")


def get_backend(framework: str) -> ModuleType:
    """The `workbench` of a framework, imported."""
    check_installed(framework)
    return import_module(f"harness.engines.{framework}.backend")


def join_processes(framework: str) -> ProcessGroup:
    """The processes of this run: those that a launcher started for the framework, or this one alone."""
    check_installed(framework)
    if framework == "jax" and "JAX_NUM_PROCESSES" in os.environ:
        return import_module("harness.engines.jax.process_group").JaxProcessGroup()
    if framework == "torch" and launched(os.environ):
        return import_module("harness.engines.torch.process_group").TorchProcessGroup()
    return SINGLE_PROCESS
