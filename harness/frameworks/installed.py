"""Which frameworks are installed, found without importing them."""

from importlib.util import find_spec

from harness.errors import UserError

# Framework: the packages that its extra installs. torch is not among them, because it is installed in any case.
OPTIONAL = {"jax": ("jax", "flax", "optax")}


def check_installed(framework: str) -> None:
    """Raise UserError, with the command to install it, if `framework` is not installed. Imports no framework.

    An unknown framework passes: `harness.engines.backend.get_backend` refuses it.
    """
    if missing := [name for name in OPTIONAL.get(framework, ()) if find_spec(name) is None]:
        raise UserError(
            f"--framework {framework} needs {' and '.join(missing)}, not installed here; "
            f"run: pip install 'backbone-harness[{framework}]'"
        )
