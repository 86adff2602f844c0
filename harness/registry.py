"""Registries: objects by name, built-in ones and those of plug-ins, both found through entry points.

A distribution declares, for example,

    [project.entry-points."harness.backbones"]
    my-family = "my_package.spec:SPECS"

The attribute is an item; a tuple, list or dictionary of items; or a function without arguments that returns one of
these. Loading an entry point must not import a framework. A plug-in that fails to load is not fatal: `harness list`
reports it.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterable
from importlib import metadata
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from harness.autoencoders.tokenizer import Tokenizer
from harness.diffusion.auxiliary import LOSSES, AuxiliaryLoss
from harness.diffusion.guidance_rules import GuidanceRule
from harness.errors import LONGEST_SHOWN, UserError, shown
from harness.plugins.code import Code, code_of_package
from harness.plugins.hook import LAUNCHERS, LOGGERS, Hook
from harness.spec import BackboneSpec

if TYPE_CHECKING:
    from pathlib import Path

Item = TypeVar("Item")

MAX_NAMES = 12  # names listed in a message
OWN_DISTRIBUTION = "backbone-harness"


class Problem(NamedTuple):
    """A plug-in that cannot be used: its distribution, its entry point and the reason."""

    distribution: str
    entry_point: str
    reason: str


class Registry(Generic[Item]):
    """Items by name, from one entry-point group and from `register`. A name cannot be registered twice.

    group: of the entry points, which are loaded at first use. noun: what an item is called in messages. of: the type of the
    items; None: that of the first one, which is built in. problems: the plug-ins that failed to load.
    """

    def __init__(self, group: str, noun: str, of: type | None = None, built_in: Iterable[Item] = ()):
        self.group = group
        self.noun = noun
        self.problems: list[Problem] = []
        self._of = of
        self._items: dict[str, Item] = {}
        self._owners: dict[str, str] = {}
        self._codes: dict[str, Code | Callable[[], Code]] = {}  # by name, of items of plug-ins
        self._loaded = False
        self._built_in = built_in  # registered before the entry points

    def register(
        self,
        item: Item | Callable[[], Any],
        owner: str = "this process",
        code: Code | Callable[[], Code] | None = None,
    ) -> Any:
        """Add an item, or the items that a function without arguments returns. Returns `item`, to serve as a decorator.

        owner: the distribution or file that adds it, for messages. code: see the method `code`. Raises `UserError` for an item without a name, of another
        type, or with a name that is taken; the items before that one stay registered.
        """
        self._load()  # first, so that no name of a built-in item can be taken
        for each in _items(item, self._of):
            name = getattr(each, "name", None)
            if not isinstance(name, str) or not name:
                raise UserError(f"{owner}: {each!r} has no name; a {self.noun} needs one")
            self._of = of = self._of or type(each)
            if not issubclass(type(each), of):
                raise UserError(f"{owner}: {name!r} is a {type(each).__name__}, not a {of.__name__}")
            if name in self._items:
                taken = self._owners[name]
                raise UserError(f"{owner}: the {self.noun} name {name!r} is taken by {taken}; choose another")
            self._items[name] = each
            self._owners[name] = owner
            if code is not None:
                self._codes[name] = code
        return item

    def forget(self, file: Path) -> None:
        """Remove the items of a plug-in file, which is loaded anew because it was changed."""
        for name in [name for name in self._codes if self.code_file(name) == file]:
            del self._items[name], self._owners[name], self._codes[name]

    def get(self, name: str) -> Item:
        """The item of that name. Raises `UserError`, which suggests similar names, if there is none."""
        self._load()
        if not isinstance(name, str):
            raise UserError(f"{shown(name)} is no name of a {self.noun}")
        if name not in self._items:
            failed = "; ".join(f"{each.entry_point} of {each.distribution}: {each.reason}" for each in self.problems)
            raise UserError(
                f"{unknown(self.noun, name, self._items)}; one of your own needs pip install -e FOLDER, or --plugin FILE.py"
                + (f"; a plug-in could not be loaded: {failed}" if failed else "")
            )
        return self._items[name]

    def names(self) -> list[str]:
        """All names: built-in ones in the order of their declaration, then those of plug-ins."""
        self._load()
        return list(self._items)

    def owner(self, name: str) -> str:
        """The distribution that registered `name`."""
        self._load()
        return self._owners[name]

    def code(self, name: str) -> Code | None:
        """The code of the plug-in that registered `name`; None for a built-in item, and for one of this process."""
        self._load()
        code = self._codes.get(name)
        return code if code is None or isinstance(code, Code) else code()

    def code_file(self, name: str) -> Path | None:
        """The plug-in file that registered `name`; None: it comes from elsewhere. Hashes nothing."""
        code = self._codes.get(name)
        return code.file if isinstance(code, Code) else None

    def __iter__(self):
        self._load()
        return iter(list(self._items.values()))

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._items

    def _load(self) -> None:
        """Load the entry points, at the first call only."""
        if self._loaded:
            return
        self._loaded = True  # before loading, because an entry point may use this registry while it is loaded
        for item in self._built_in:
            if getattr(item, "name", None) not in self._items:
                self.register(item, OWN_DISTRIBUTION)
        # Built-in entry points come first, so that a plug-in cannot take a built-in name.
        points = sorted(
            _entry_points().select(group=self.group),
            key=lambda point: (_distribution(point) != OWN_DISTRIBUTION, _distribution(point)),
        )
        for point in points:
            owner = _distribution(point)
            try:
                of_package = functools.partial(code_of_package, owner, point.value.partition(":")[0])
                self.register(point.load(), owner, None if owner == OWN_DISTRIBUTION else of_package)
            except (Exception, SystemExit) as error:
                # Third-party code can raise anything, and the other plug-ins must still load.
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                self.problems.append(Problem(owner, f"{point.name} = {point.value}", reason))


@functools.cache
def _entry_points() -> metadata.EntryPoints:
    """The entry points of all installed distributions, read from disk once for all registries."""
    return metadata.entry_points()  # type: ignore[return-value]  # of Python 3.10 and newer


def unknown(noun: str, name: str, known: Iterable[str]) -> str:
    """The message for an unknown name: one line, with similar names or else the known ones."""
    known = list(known)
    # cut, because the time of difflib grows with the square of the length
    near = difflib.get_close_matches(name[:LONGEST_SHOWN].lower(), known, n=3, cutoff=0.5)
    names = ", ".join(known[:MAX_NAMES]) + (f" and {len(known) - MAX_NAMES} more" if len(known) > MAX_NAMES else "")
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {names or 'none'}"
    return f"unknown {noun} {shown(name)}; {hint}"


def _items(thing: object, of: type | None) -> list[Any]:
    """The items in an entry point's attribute: `thing`, its elements, or what it returns (see the module's docstring)."""
    # A class, an instance of `of` and an object with an attribute `name` are items even though they can be called.
    is_item = isinstance(thing, of or type) or hasattr(thing, "name")
    if callable(thing) and not isinstance(thing, type) and not is_item:
        thing = thing()
    if isinstance(thing, dict):
        thing = list(thing.values())
    return list(thing) if isinstance(thing, (tuple, list)) else [thing]


def _distribution(point: metadata.EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "unknown distribution"


backbones: Registry[BackboneSpec] = Registry("harness.backbones", "backbone", BackboneSpec)
protocols: Registry[Any] = Registry("harness.protocols", "protocol")
datasets: Registry[Any] = Registry("harness.datasets", "dataset")
samplers: Registry[Any] = Registry("harness.samplers", "sampler")
objectives: Registry[Any] = Registry("harness.objectives", "objective")
# no rule is built in, of which the type could be taken
guidance_rules: Registry[GuidanceRule] = Registry("harness.guidance", "guidance rule", GuidanceRule)
auxiliary_losses: Registry[AuxiliaryLoss] = Registry(
    "harness.auxiliary_losses", "auxiliary loss", AuxiliaryLoss, LOSSES
)
autoencoders: Registry[Tokenizer] = Registry("harness.autoencoders", "autoencoder", Tokenizer)
features: Registry[Any] = Registry("harness.features", "feature extractor")
metrics: Registry[Any] = Registry("harness.metrics", "metric")
suites: Registry[Any] = Registry("harness.suites", "suite")
systems: Registry[Any] = Registry("harness.systems", "system")
loggers: Registry[Hook] = Registry("harness.loggers", "logger", Hook, LOGGERS)
launchers: Registry[Hook] = Registry("harness.launchers", "launcher", Hook, LAUNCHERS)
figures: Registry[Hook] = Registry("harness.figures", "figure", Hook)

GROUPS: dict[str, Registry[Any]] = {
    each.group.removeprefix("harness.").upper(): each
    for each in (
        backbones,
        protocols,
        datasets,
        samplers,
        objectives,
        guidance_rules,
        auxiliary_losses,
        autoencoders,
        features,
        metrics,
        suites,
        systems,
        loggers,
        launchers,
        figures,
    )  # fmt: skip
}
"""The attributes of a plug-in file (`harness.plugins.files`), and the registries that they add to."""
