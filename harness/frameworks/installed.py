"""Engines: what trains and samples a network, one folder a framework.

Each has a module `workbench` with the same functions, which is all that the stages know of it:

    measure(request, device=, precision=, micro_batch=, mesh=, compile=, say=) -> (network at its initialisation, Measured)
    make_engine(request, run, data, network or None, mesh) -> harness.pipeline.training_loop.Engine
    make_sampler(request, run, snapshot, plan, precision=, batch=, compile=, decoder=) -> harness.pipeline.sampling_loop.Sampler
    resolve_device(device) -> Place
    make_chain(bound, decoder, place, seed=, precision=, batch=, compile=, say=) -> harness.pipeline.sampling_loop.Sampler, of a system
"""

from importlib.util import find_spec

from harness.errors import UserError

OPTIONAL = {"jax": ("jax", "flax", "optax")}  # packages of the extra of that name; torch is always there


def check_installed(framework: str) -> None:
    """Refuse a framework that is not installed, with the command that installs it. Imports nothing."""
    if lacking := [name for name in OPTIONAL.get(framework, ()) if find_spec(name) is None]:
        raise UserError(
            f"--framework {framework} needs {' and '.join(lacking)}, not installed here; "
            f"run: pip install 'backbone-harness[{framework}]'"
        )
