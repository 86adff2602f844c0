"""What holds tensors in a checkpoint: dictionaries and lists at any depth, with names as the network without its wrappers
has them, and what the names that lead there say."""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.weights.objects import escaped
from harness.weights.pickles import Call
from harness.weights.tensors import Stored

# Words in the names of entries. A later name decides: ema.online_model of ema-pytorch is not averaged.
AVERAGE_WORDS = frozenset(["ema", "emas", "average", "averaged", "averages", "avg", "shadow", "swa", "polyak"])
RAW_WORDS = frozenset(["online", "raw", "student", "backup", "collected", "non", "no", "without", "current"])
OPTIMIZER_WORDS = frozenset(
    ["opt", "optim", "optimizer", "optimizers", "optimiser", "scheduler", "schedulers", "scaler", "sched"]
)
# Components of names that wrappers of a module add, at any place in a name: torch.compile, FSDP, checkpointing, Fabric.
WRAPPERS_INSIDE = frozenset(
    ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_fpw_module", "_forward_module"]
)
# Prefixes of every name: "module." of DistributedDataParallel and of torch's AveragedModel, and the above.
WRAPPERS = ("module.", *(f"{each}." for each in sorted(WRAPPERS_INSIDE)))
MAX_WRAPPERS = 8  # prefixes that are dropped from a name, at most
# Scalars that an object which averages keeps beside the weights.
COUNTERS = frozenset(
    ["n_averaged", "decay", "num_updates", "updates", "step", "initted", "iteration", "optimization_step"]
)
MAX_DEPTH = 8  # of dictionaries that are searched
MAX_VISITS = 8  # of one object under several names


@dataclass(frozen=True, kw_only=True)
class Holder:
    """A dictionary or a list that directly holds tensors. keys: that lead to it."""

    keys: tuple[str, ...]
    named: dict[str, Stored] = field(default_factory=dict)
    listed: Sequence[Stored] = ()
    duplicate: str = ""
    notes: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Number of its tensors that are no scalars."""
        return sum(len(tensor.shape) > 0 for tensor in (*self.named.values(), *self.listed))


def is_averaged(holder: Holder) -> bool:
    """Whether a dictionary is a moving average: by the keys that lead to it, or by torch's counter in it."""
    return is_average(holder.keys) or "n_averaged" in holder.beside


def find_holders(value: Mapping[Any, Any]) -> tuple[list[Holder], str]:
    """(everything in the file that holds tensors; the name of a moving average that is an object, or "")."""
    holders, unreadable = [], ""
    visited: Counter[int] = Counter()  # a file may hold one object under several names, or within itself
    waiting: deque[tuple[tuple[str, ...], Any]] = deque([((), value)])
    while waiting:
        keys, item = waiting.popleft()
        visited[id(item)] += 1
        if len(keys) > MAX_DEPTH or visited[id(item)] > MAX_VISITS:
            continue
        is_new = visited[id(item)] == 1
        item = _paired(item)
        pairs = list(item.items()) if isinstance(item, dict) else [(str(n), each) for n, each in enumerate(item)]
        tensors = [(escaped_key(key), each) for key, each in pairs if isinstance(each, Stored)]
        if tensors:
            if isinstance(item, dict):
                holders.append(_without_wrappers(keys, tensors))
            else:
                holders.append(Holder(keys=keys, listed=[tensor for _, tensor in tensors]))
        for key, each in pairs if is_new else ():  # an object under a second name is an entry, too
            below = (*keys, escaped_key(key))
            if isinstance(each, (dict, list)):
                waiting.append((below, each))
            elif isinstance(each, Call) and is_average(below) and not is_optimizer(below):
                unreadable = unreadable or ".".join(below)
    return holders, unreadable


def _paired(item: Any) -> Any:
    """The dictionary of a list of (name, tensor), as of state_dict().items(); anything else as it is."""
    if not isinstance(item, list | tuple) or not item:
        return item
    if not all(isinstance(each, list | tuple) and len(each) == 2 for each in item):
        return item
    if not all(isinstance(name, str) and isinstance(each, Stored) for name, each in item):
        return item
    return dict(item) if len({name for name, _ in item}) == len(item) else item


def _without_wrappers(keys: tuple[str, ...], tensors: list[tuple[str, Stored]]) -> Holder:
    """The dictionary of `tensors` with names as the network without its wrappers has them."""
    named = dict(tensors)
    duplicate = ""
    if len(named) < len(tensors):
        counts = Counter(name for name, _ in tensors)
        duplicate = next(name for name, count in counts.items() if count > 1)
    notes: list[str] = []
    prefix = ""
    weights = [name for name in named if name not in COUNTERS]
    for _ in range(MAX_WRAPPERS):
        wrapper = next((each for each in WRAPPERS if all(name.startswith(prefix + each) for name in weights)), None)
        if wrapper is None or not weights:
            break
        prefix += wrapper
    beside: tuple[str, ...] = ()
    if prefix:
        beside = tuple(name for name in named if not name.startswith(prefix))
        notes.append(f"the prefix {prefix!r} was dropped from every name")
        named = {name.removeprefix(prefix): tensor for name, tensor in named.items() if name.startswith(prefix)}
    inner = {name: ".".join(part for part in name.split(".") if part not in WRAPPERS_INSIDE) for name in named}
    # Names that would become equal, or empty, are left as they are.
    if any(inner[name] != name for name in named) and len(set(inner.values())) == len(named) and all(inner.values()):
        dropped = {part for name in named for part in name.split(".") if part in WRAPPERS_INSIDE}
        notes.append(f"{', '.join(repr(part + '.') for part in sorted(dropped))} was dropped from the names")
        named = {inner[name]: tensor for name, tensor in named.items()}
    return Holder(keys=keys, named=named, duplicate=duplicate, notes=tuple(notes), beside=beside)


def entry_words(name: str) -> list[str]:
    """The words of a name, in lower case: "state_dict_ema" and "StateDictEMA" give state, dict, ema."""
    parted = re.sub(r"([a-z0-9])([A-Z])|([A-Z])([A-Z][a-z])", r"\1\3 \2\4", name)
    return re.findall(r"[a-z]+", parted.lower())


def is_average(components: Iterable[str]) -> bool:
    """Whether an entry that these keys lead to is a moving average, by its name."""
    averaged = False
    for component in components:
        words = entry_words(component)
        if RAW_WORDS.intersection(words):
            averaged = False
        elif AVERAGE_WORDS.intersection(words):
            averaged = True
    return averaged


def is_optimizer(components: Iterable[str]) -> bool:
    """Whether an entry that these keys lead to belongs to an optimizer, by its name."""
    return any(OPTIMIZER_WORDS.intersection(entry_words(component)) for component in components)


def escaped_key(key: object) -> str:
    """A key of a dictionary in a file, for messages and records; its type in brackets if it is not text."""
    return escaped(key) if isinstance(key, str) else f"({type(key).__name__})"


def place(tensor: Stored) -> tuple[object, ...]:
    """Where a tensor is: equal for two names of one tensor."""
    return (tensor.file, tensor.start, tensor.shape, tensor.strides)
