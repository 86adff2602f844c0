"""Which frameworks are installed, found without importing them."""

from importlib.util import find_spec

from harness.errors import UserError

OPTIONAL = {
    "jax": ("jax", "flax", "optax")
}  # framework: the packages that its extra installs; torch is required anyway


def check_installed(framework: str) -> None:
    """Raise UserError, with the command to install it, if `framework` is not installed. Imports no framework."""
    if missing := [name for name in OPTIONAL.get(framework, ()) if find_spec(name) is None]:
        raise UserError(
            f"--framework {framework} needs {' and '.join(missing)}, not installed here; "
            f"run: pip install 'backbone-harness[{framework}]'"
        )
