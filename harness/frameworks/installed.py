"""Whether the packages of a framework are installed."""

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
