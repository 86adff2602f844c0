"""Plug-ins that are a single file without packaging: `--plugin FILE.py`.

The file is executed, so only files that the user names are loaded, and never one that a run or a record names. Its module
has one attribute for each group of entry points that it adds to, the group's name in capitals: BACKBONES, METRICS, SAMPLERS,
OBJECTIVES, ... (`harness.registry.GROUPS`), each as an entry point's attribute would be. A network of the file itself is
addressed with the module's name:

    BACKBONES = BackboneSpec(name="mine", builders={"torch": f"{__name__}:Mine"}, ...)

The folder of the file is not searched for other modules: the hash of the file stands for all of its code.
"""

from __future__ import annotations

import hashlib
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from harness.errors import UserError, one_line
from harness.io.text import read_paths
from harness.plugins.code import Code
from harness.registry import GROUPS

logger = logging.getLogger(__name__)

MODULE_PREFIX = "harness_plugin_"  # of the names of the files' modules

_loaded: dict[Path, Code] = {}  # by resolved path, those of this process


def read_plugins(value: Any) -> tuple[Path, ...]:
    """The paths of the files, which are loaded (`load_plugin`): the reader of the setting `plugin`."""
    paths = read_paths(value)
    load_plugins(paths)
    return paths


def load_plugins(paths: Sequence[Path]) -> None:
    for path in paths:
        load_plugin(path)


def load_plugin(path: Path) -> Code:
    """Execute the file, register its items, and log one line that says so. Nothing happens if it was loaded before.

    A file that was changed since replaces what it registered. Raises `UserError` in one line if the file cannot be read or
    executed, if it has no attribute of `harness.registry.GROUPS`, and for a name that is taken.
    """
    path = Path(path)
    try:
        source = path.read_bytes()
    except OSError as error:
        raise UserError(f"--plugin {path}: {error.strerror or error}") from error
    if path.suffix != ".py":
        raise UserError(f"--plugin {path}: a plug-in file is Python source, NAME.py")
    code = Code(path.name, "", hashlib.sha256(source).hexdigest(), path.resolve())
    if _loaded.get(path.resolve()) == code:
        return code
    module = _execute(path, source, code)
    for registry in GROUPS.values():
        registry.forget(path.resolve())
    _loaded.pop(path.resolve(), None)
    try:
        names = _register(path, module, code)
    except UserError:
        for registry in GROUPS.values():
            registry.forget(path.resolve())
        del sys.modules[module.__name__]
        raise
    _loaded[path.resolve()] = code
    logger.info(f"plug-in  {path} (sha256 {code.sha256[:12]}): {'; '.join(names)}")
    return code


def _register(path: Path, module: ModuleType, code: Code) -> list[str]:
    """Register what the module's attributes hold. Returns texts such as "backbone mine-s, mine-b"."""
    texts = []
    for name, registry in GROUPS.items():
        if not hasattr(module, name):
            continue
        before = registry.names()
        try:
            registry.register(getattr(module, name), path.name, code)
        except UserError:
            raise
        except (Exception, SystemExit) as error:  # other people's code can raise anything
            raise UserError(f"--plugin {path}: {name}: {one_line(error)}") from error
        texts.append(f"{registry.noun} {', '.join(each for each in registry.names() if each not in before)}")
    if not texts:
        raise UserError(
            f"--plugin {path}: it has none of the attributes {', '.join(GROUPS)}; assign what it adds to one"
        )
    return texts


def _execute(path: Path, source: bytes, code: Code) -> ModuleType:
    """The module of the file, which addresses ("module:attribute") and classes of it find by its name."""
    # Not Python's loader for files: it would leave compiled code beside the user's file, and read the file once more.
    name = f"{MODULE_PREFIX}{re.sub(r'[^0-9A-Za-z_]', '_', path.stem)}_{code.sha256[:8]}"
    module = ModuleType(name)
    module.__file__ = str(path.resolve())
    sys.modules[name] = module
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:  # other people's code can raise anything
        del sys.modules[name]
        raise UserError(f"--plugin {path}: {one_line(error)}") from error
    return module
