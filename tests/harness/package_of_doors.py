"""Installs tests/plugin_doors for this process, as pip leaves it on the path; and the command line in this process."""

import contextlib
import sys
import tomllib
from pathlib import Path

from click.testing import CliRunner

from harness import registry
from harness.cli import group
from harness.errors import RunError, UserError

PACKAGE = Path(__file__).parents[1] / "plugin_doors"
NAME = "backbone-harness-doors"


@contextlib.contextmanager
def installed(folder):
    """Context in which the registries are read anew with the package; afterwards they are as they were."""
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    information = folder / f"{NAME.replace('-', '_')}-{project['version']}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {project['version']}\n")
    lines = [
        f"[{name}]\n" + "".join(f"{key} = {value}\n" for key, value in points.items())
        for name, points in project["entry-points"].items()
    ]
    (information / "entry_points.txt").write_text("".join(lines))
    before = {each: {**vars(each)} for each in registry.GROUPS.values()}
    path = [str(folder), str(PACKAGE / "src")]
    sys.path[:0] = path
    try:
        _read_anew()
        yield project["entry-points"]
    finally:
        for word in path:
            sys.path.remove(word)
        for name in [name for name in sys.modules if name.partition(".")[0] == "all_doors"]:
            del sys.modules[name]
        registry._entry_points.cache_clear()
        for each, fields in before.items():
            vars(each).update(fields)


def _read_anew():
    registry._entry_points.cache_clear()
    for each in registry.GROUPS.values():
        each._items, each._owners, each._codes, each.problems, each._loaded = {}, {}, {}, [], False
    for each in registry.GROUPS.values():
        assert each.names() and not each.problems, each.problems


def harness(*words, code=0):
    """(stdout, stderr) of a command; with a `code` other than 0 (stdout, stderr and the message of its error)."""
    done = CliRunner().invoke(group, [str(each) for each in words])
    if isinstance(done.exception, UserError | RunError):
        assert code == 2, done.exception
        assert "\n" not in str(done.exception)
        return done.stdout, f"{done.stderr}{done.exception}"
    assert done.exit_code == code, (done.exc_info, done.output)
    return done.stdout, done.stderr
