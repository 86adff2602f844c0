"""The package that `harness new` writes: files with $placeholders, and the function that fills them in."""

from __future__ import annotations

import keyword
import re
from importlib import resources
from pathlib import Path
from string import Template

from harness.errors import UserError
from harness.io import files
from harness.spec import FRAMEWORKS

FILES = {
    # file of the package: (template in this folder, the framework that it is for; None: every package has it)
    "pyproject.toml": ("pyproject.toml.txt", None),
    "README.md": ("README.md.txt", None),
    "src/$package/__init__.py": ("init.py.txt", None),
    "src/$package/spec.py": ("spec.py.txt", None),
    "src/$package/torch_model.py": ("torch_model.py.txt", "torch"),
    "src/$package/jax_model.py": ("jax_model.py.txt", "jax"),
    "tests/test_$package.py": ("test.py.txt", None),
}
NAME_FORM = "letters, digits and '-', beginning with a letter, as in my-mixer"


def write_package(name: str, frameworks: tuple[str, ...], folder: Path) -> list[Path]:
    """Write the package of a backbone `name` into `folder`, which must not exist. Returns the files, as they were written.

    frameworks: of `harness.spec.FRAMEWORKS`. Raises `UserError` for a name that cannot name a package, and for a folder
    that exists.
    """
    package = name.lower().replace("-", "_")
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9]*(-[A-Za-z0-9]+)*", name) or keyword.iskeyword(package):
        raise UserError(f"{name!r} cannot name a package: give {NAME_FORM}")
    if folder.exists():
        raise UserError(f"{folder} exists already; choose another name, or --out")
    wanted = [each for each in FRAMEWORKS if each in frameworks]
    values = {
        "name": name,
        "package": package,
        "class_name": _class(package),
        "builders": ", ".join(f'"{each}": "{package}.{each}_model:{_class(package)}"' for each in wanted),
        "frameworks": " and ".join(wanted),
        "framework": "" if "torch" in wanted else f" --framework {wanted[0]}",
        "extra": "[jax]" if "jax" in wanted else "",
        "checked": ", ".join(f'"{each}"' for each in wanted),
    }
    written = []
    with files.explained(folder):
        for path, (template, framework) in FILES.items():
            if framework in (None, *wanted):
                target = folder / Template(path).substitute(values)
                target.parent.mkdir(parents=True, exist_ok=True)
                text = resources.files(__name__).joinpath(template).read_text(encoding="utf-8")
                target.write_text(Template(text).substitute(values), encoding="utf-8")
                written.append(target)
    return written


def _class(package: str) -> str:
    return "".join(part.capitalize() for part in package.split("_"))
