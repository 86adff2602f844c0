"""Who may import whom, and what is packaged: held against the tree."""

import ast
import functools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from harness import registry as registries

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("harness", "backbones", "evaluators", "results", "reports")
HEAVY = {"torch", "jax", "flax", "tensorflow", "diffusers", "sklearn", "pandas", "matplotlib", "seaborn", "fvcore"}


def sources(room):
    return sorted((ROOT / room).rglob("*.py"))


def imports(path):
    """Top-level names that a file imports anywhere, and the dotted modules."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
    return found


def loaded_by(module):
    code = f"import sys, {module}; print(' '.join(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_the_package_list_is_the_tree():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    holding = {
        path.parent for room in ROOMS for path in (ROOT / room).rglob("*") if path.suffix in (".py", ".toml", ".csv")
    }
    found = sorted(".".join(folder.relative_to(ROOT).parts) for folder in holding if "__pycache__" not in folder.parts)
    assert sorted(listed) == sorted({*found, "results.measured", "results.reference_points"})


@pytest.mark.parametrize("room", ["evaluators"])
def test_evaluators_import_no_backbone_and_no_engine(room):
    for path in sources(room):
        for name in imports(path):
            assert not name.startswith(("backbones", "harness.engines", "harness.cli")), f"{path}: {name}"


def test_reports_import_no_network_framework():
    for path in sources("reports"):
        tops = {name.partition(".")[0] for name in imports(path)}
        assert not tops & {"torch", "jax", "flax", "tensorflow"}, path


def test_nobody_imports_the_command_line():
    for room in ROOMS:
        for path in sources(room):
            if path.is_relative_to(ROOT / "harness" / "cli") or path.name == "__main__.py":
                continue
            assert not any(name.startswith("harness.cli") for name in imports(path)), path


ADDRESS = re.compile(r"((?:harness|backbones|evaluators|results|reports)(?:\.\w+)+)(:\w+)?")
GROUPS = {
    f"harness.{registry.group.partition('.')[2]}"
    for registry in vars(registries).values()
    if hasattr(registry, "group")
}


@functools.cache
def modules():
    """Module name -> file, of the five packages."""
    found = {}
    for room in ROOMS:
        for path in sources(room):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name):
    """Modules that a module imports anywhere: by statements, or by addresses in strings ("module:attribute", or the name of
    a module). Imports for type checkers alone are none."""
    tree = ast.parse(modules()[name].read_text(encoding="utf-8"))
    for_types = {
        id(below)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for statement in node.body
        for below in ast.walk(statement)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {each if each in modules() else node.module for each in names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            match = ADDRESS.fullmatch(node.value)
            if match and node.value not in GROUPS:
                found.add(match[1])
    return (found & modules().keys()) - {name}


def circles(graph):
    """The sets of modules that can be reached from each other, by repeatedly leaving out what leads nowhere."""
    left = {name: set(below) for name, below in graph.items()}
    while ends := {name for name, below in left.items() if not below & left.keys()}:
        left = {name: below - ends for name, below in left.items() if name not in ends}
    while starts := left.keys() - set().union(*left.values(), set()):
        left = {name: below for name, below in left.items() if name not in starts}
    return sorted(left)


def test_no_circle_of_imports():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == ["b", "c"]
    graph = {name: imported(name) for name in modules()}
    assert "backbones.dit.torch_model" in graph["backbones.dit.spec"]  # by an address in a string
    assert "harness.pipeline.run" in graph["harness"] and len(graph) > 250
    assert circles(graph) == []


def test_no_command_imports_another():
    from harness.cli import COMMANDS

    commands = {f"harness.cli.{module}" for module, _ in COMMANDS.values()}
    assert commands <= modules().keys()
    for name in modules():
        if name.startswith("harness.cli."):
            assert not imported(name) & commands, name


def test_the_public_surface_is_few_files():
    files = [path.name for path in (ROOT / "harness").iterdir() if path.is_file()]
    assert len(files) <= 8, sorted(files)


def test_results_need_only_the_standard_library():
    allowed = set(sys.stdlib_module_names) | {"results", "harness", "numpy"}
    late = {
        "experiments.py": {"scipy"},
        "simultaneous.py": {"scipy"},
        "frame.py": {"pandas"},
        "variances.py": {"scipy"},
    }  # imported by the functions that need them
    for path in sources("results"):
        assert {name.partition(".")[0] for name in imports(path)} <= allowed | late.get(path.name, set()), path
    for module in ("results.compare", "results.frame"):
        assert not loaded_by(module) & {"scipy", "pandas"}, module


def test_specs_need_only_the_standard_library():
    allowed = set(sys.stdlib_module_names) | {"harness", "backbones"}
    for path in sorted((ROOT / "backbones").glob("*/spec.py")):
        assert {name.partition(".")[0] for name in imports(path)} <= allowed, path


@pytest.mark.parametrize(
    "module",
    ["harness", "harness.registry", "harness.spec", "harness.protocols", "harness.compute", "harness.planning.plan"]
    + ["harness.diffusion.samplers", "harness.data", "evaluators.suites", "evaluators.features", "results.records"]
    + [
        "results.store",
        "reports",
        "reports.report",
        "backbones.dit.spec",
        "harness.cli",
        "harness.planning.matching",
        "harness.studies",
    ]
    + [
        "harness.systems.read",
        "harness.systems.paper",
        "harness.autoencoders.load",
        "harness.weights",
        "harness.weights.containers",
    ]
    + [
        f"backbones.{family}.{part}"
        for family in ("adm", "ldm", "biggan", "autoencoders")
        for part in ("spec", "compute")
    ]
    + [f"backbones.{family}.weights" for family in ("dit", "adm", "ldm", "biggan")],
)
def test_light_modules_load_nothing_heavy(module):
    assert not loaded_by(module) & HEAVY


def test_a_model_file_needs_one_framework():
    """The file's name says which; specs, layouts, compute and weight maps need none."""
    found = set()
    for path in sources("backbones"):
        tops = {name.partition(".")[0] for name in imports(path)} & {"torch", "jax", "flax"}
        allowed = {"torch"} if "torch" in path.stem else {"jax", "flax"} if "flax" in path.stem else set()
        assert tops <= allowed, path
        found |= tops
    assert "torch" in found


def test_source_is_ascii_and_names_no_machine():
    for room in (*ROOMS, "tests", "benchmarks"):
        for path in sources(room):
            text = path.read_bytes()
            assert text.isascii(), path
            assert b"/ro" + b"ot/" not in text and b"/wo" + b"rk/" not in text, path
