"""Looks up a framework's `Backend`, and joins the processes that a launcher started."""

from __future__ import annotations

import os

from harness.distributed.group import SINGLE_PROCESS, ProcessGroup
from harness.distributed.launch import is_distributed
from harness.engines.interfaces import Backend
from harness.errors import UserError
from harness.frameworks.installed import check_installed
from harness.registry import unknown

FRAMEWORKS = ("torch", "jax")


def get_backend(framework: str) -> Backend:
    """Import and return the backend of a framework. Raises UserError if the framework is unknown or not installed."""
    check_installed(framework)
    if framework == "torch":
        from harness.engines.torch import backend as torch_backend

        return torch_backend
    if framework == "jax":
        from harness.engines.jax import backend as jax_backend
        from harness.engines.jax.compiling import keep_compiled_programs

        keep_compiled_programs()
        return jax_backend
    raise UserError(unknown("framework", framework, FRAMEWORKS))


def join_processes(framework: str) -> ProcessGroup:
    """Join the processes that a launcher of the framework started for this run, and return their group.

    Without such a launcher, the group of a single process.
    """
    check_installed(framework)
    if framework == "jax" and "JAX_NUM_PROCESSES" in os.environ:
        from harness.engines.jax.process_group import JaxProcessGroup

        return JaxProcessGroup()
    if framework == "torch" and is_distributed(os.environ):
        from harness.engines.torch.process_group import TorchProcessGroup

        return TorchProcessGroup()
    return SINGLE_PROCESS
