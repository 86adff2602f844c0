"""Which part of a checkpoint holds the weights of a network: every place where they can be, raw or averaged.

A checkpoint is a dictionary of dictionaries, and public code writes the moving average under many names and at many
depths: ema, model_ema, state_dict_ema, ema.shadow, ema.module, the prefix ema_model. of names, or the list
ema.shadow_params in the order of the parameters. So nothing is concluded from one name: all dictionaries and lists of
tensors in the file are looked at, and a network is recognised by names of its tensors (marks), under any prefix.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from harness.errors import UserError, shown
from harness.weights.objects import escaped
from harness.weights.pickles import Call
from harness.weights.tensors import Stored

Marks = Collection[str]
"""Names of tensors that identify a network."""

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
MAX_ENTRIES = 100  # of a file; a training keeps averages of a few decays
MAX_SKIPPED = 2  # tensors that a list of averages may leave out because they are not trained, such as positions
ITSELF = "the file itself"  # name of the entry "" in messages, and for --entry
MAX_NAMED = 8  # entries that a message names, and names of one entry


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Weights of a network in a file.

    name: the keys that lead there and the prefix of the names, joined by dots; "": the file itself. tensors: under the
    names behind that prefix. averaged: whether it is a moving average. keys: those of the dictionary alone. is_whole:
    whether these are all tensors of that dictionary, in which case nothing was dropped or added.
    """

    name: str
    tensors: dict[str, Stored]
    averaged: bool
    keys: tuple[str, ...]
    is_whole: bool = True
    notes: tuple[str, ...] = ()
    duplicate: str = ""  # a name that two tensors have
    beside: tuple[str, ...] = ()  # first components of the names of the dictionary's other tensors

    @property
    def places(self) -> tuple[tuple[object, ...], ...]:
        """Where the values are: equal for two entries that hold the very same tensors."""
        return tuple((name, *_place(tensor)) for name, tensor in sorted(self.tensors.items()))


@dataclass(frozen=True, kw_only=True)
class _Holder:
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


def choose_entry(
    value: Mapping[Any, Any], path: Path, markings: Iterable[Marks] = (), wanted: str | None = None
) -> tuple[Entry, tuple[Entry, ...]]:
    """(the entry of the checkpoint `value` to read, all entries with such weights, the chosen one included).

    markings: marks of the networks that are looked for; without any, or if none fits, the largest dictionaries of tensors
    are the entries. A moving average comes before the raw weights. wanted: name of the entry to read; None: the only one
    that fits. UserError if there is none, if several fit equally, or if there is a moving average that cannot be read.
    path: for messages.
    """
    holders, unreadable = _holders(value)
    entries = _marked(holders, [marks for marks in markings if marks]) or _largest(holders)
    if not entries:
        raise UserError(f"{path} holds no tensors by name; save net.state_dict()")
    if len(entries) > MAX_ENTRIES:
        raise UserError(f"{path} holds {len(entries):,} dictionaries of tensors, more than can be told apart; save one")
    entries = [*entries, *_averages_of(entries, holders)]
    entries = [_completed(entry, entries) if entry.averaged else entry for entry in entries]
    if wanted is not None:
        return _named(wanted, entries, path), tuple(entries)
    averages = _distinct([entry for entry in entries if entry.averaged])
    raw = _distinct([entry for entry in entries if not entry.averaged])
    if not averages and (hidden := _unmatched(raw, holders) or unreadable):
        raise UserError(
            f"{path} holds a moving average, {hidden}, that cannot be read by name (its tensors are not those of "
            f"{_quoted(raw)}); choose the weights without averaging with --entry {raw[0].name or repr(ITSELF)}, or save the "
            "average as a state dict"
        )
    fitting = averages or raw
    if len(fitting) > 1:
        raise UserError(
            f"{path} holds {'several moving averages' if averages else 'several entries with such weights'}: "
            f"{_quoted(fitting)}; choose one with --entry NAME, or --entry PART=NAME of a command with several weight files"
        )
    return fitting[0], tuple(entries)


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


# Dictionaries and lists of tensors -----------------------------------------------------------------------------------


def _holders(value: Mapping[Any, Any]) -> tuple[list[_Holder], str]:
    """(everything in the file that holds tensors; the name of a moving average that is an object, or "")."""
    holders, unreadable = [], ""
    visited: Counter[int] = Counter()  # a file may hold one object under several names, or within itself
    waiting: deque[tuple[tuple[str, ...], Any]] = deque([((), value)])
    while waiting:
        keys, item = waiting.popleft()
        visited[id(item)] += 1
        if len(keys) > MAX_DEPTH or visited[id(item)] > MAX_NAMED:
            continue
        is_new = visited[id(item)] == 1
        item = _paired(item)
        pairs = list(item.items()) if isinstance(item, dict) else [(str(n), each) for n, each in enumerate(item)]
        tensors = [(escaped_key(key), each) for key, each in pairs if isinstance(each, Stored)]
        if tensors:
            if isinstance(item, dict):
                holders.append(_without_wrappers(keys, tensors))
            else:
                holders.append(_Holder(keys=keys, listed=[tensor for _, tensor in tensors]))
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


def _without_wrappers(keys: tuple[str, ...], tensors: list[tuple[str, Stored]]) -> _Holder:
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
    return _Holder(keys=keys, named=named, duplicate=duplicate, notes=tuple(notes), beside=beside)


# Entries -------------------------------------------------------------------------------------------------------------


def _marked(holders: Sequence[_Holder], markings: Sequence[Marks]) -> list[Entry]:
    """The entries with the marks of one network: of the one that has the largest share of its marks in the file.

    Of networks with equal shares it is the one with the shortest prefix, because the names of one may end as another's.
    """
    best: tuple[float, int] = (0.0, 0)
    chosen: list[tuple[_Holder, str]] = []
    for marks in markings:
        found = [(share, holder, prefix) for holder in holders for share, prefix in _prefixes(holder.named, marks)]
        if not found:
            continue
        share = max(each[0] for each in found)
        rank = (share, -min(len(prefix) for each, _, prefix in found if each == share))
        if rank > best or not chosen:
            best, chosen = rank, [(holder, prefix) for each, holder, prefix in found if each == share]
    views = []
    for holder, prefix in chosen:
        views += _views(holder, prefix, {other for same, other in chosen if same is holder and other})
    return views


def _prefixes(names: Mapping[str, Stored], marks: Marks) -> Iterator[tuple[float, str]]:
    """Yields (share of the marks, prefix) for each prefix under which the marks are among `names`.

    Without a prefix one mark is enough, because such a file may be incomplete, which is reported later. A prefix has to
    have all.
    """
    present = sum(mark in names for mark in marks)
    if present:
        yield present / len(marks), ""
    first = next(iter(marks))
    for name in names:
        if name.endswith(f".{first}"):
            prefix = name.removesuffix(first)
            if all(prefix + mark in names for mark in marks):
                yield 1.0, prefix


def _views(holder: _Holder, prefix: str, prefixes: Collection[str]) -> list[Entry]:
    """The entries of a dictionary at one prefix. Names of averages beside the weights (model_ema.*) make more of it.

    prefixes: all under which the network is in this dictionary; each of them has entries of its own.
    """
    components = (*holder.keys, *prefix.split(".")[:-1])
    if prefix:
        tensors = {name.removeprefix(prefix): t for name, t in holder.named.items() if name.startswith(prefix)}
        others = dict.fromkeys(name.partition(".")[0] for name in holder.named if not name.startswith(prefix))
        return [
            Entry(
                name=".".join(components), tensors=tensors, averaged=is_average(components), keys=holder.keys,
                is_whole=False, notes=(*holder.notes, f"the prefix {prefix!r} was dropped from its names"),
                beside=(*holder.beside, *others),
            )
        ]  # fmt: skip
    whole = Entry(
        name=".".join(components), tensors=holder.named, averaged=_is_averaged(holder), keys=holder.keys,
        notes=holder.notes, duplicate=holder.duplicate, beside=holder.beside,
    )  # fmt: skip
    groups: dict[str, dict[str, Stored]] = {}  # the tensors under the first components of names that are averages
    for name, tensor in holder.named.items():
        group, _, rest = name.partition(".")
        if rest and is_average([group]):
            groups.setdefault(group, {})[rest] = tensor
    # a group of counters alone is none
    groups = {group: named for group, named in groups.items() if any(tensor.shape for tensor in named.values())}
    if not groups or whole.averaged:
        return [whole]
    raw = replace(
        whole,
        tensors={name: tensor for name, tensor in holder.named.items() if name.partition(".")[0] not in groups},
        is_whole=False,
    )
    elsewhere = groups.keys() & {each.partition(".")[0] for each in prefixes}
    groups = {group: named for group, named in groups.items() if group not in elsewhere}
    matched = {group: found for group, named in sorted(groups.items()) if (found := _by_name(raw, named))}
    if groups and not matched and not elsewhere:
        # Such averages have the names of a layout (LDM's), which takes them from the whole dictionary.
        return [replace(whole, name=".".join((*components, min(groups))), averaged=True), raw]
    averages = [
        replace(
            raw, name=".".join((*components, group)), tensors=tensors, averaged=True,
            notes=(*whole.notes, _matching_note(raw, "by their names")),
        )
        for group, tensors in matched.items()
    ]  # fmt: skip
    return [*averages, raw]


def _matching_note(raw: Entry, how: str) -> str:
    """The note of an average that has the names of `raw`."""
    return f"its tensors are matched with those of {raw.name or ITSELF!r} {how}"


def _is_averaged(holder: _Holder) -> bool:
    """Whether a dictionary is a moving average: by the keys that lead to it, or by torch's counter in it."""
    return is_average(holder.keys) or "n_averaged" in holder.beside


def _largest(holders: Sequence[_Holder]) -> list[Entry]:
    """The dictionaries of tensors that may be a network of unknown names: all but those with less than half as many."""
    named = [holder for holder in holders if holder.named and not is_optimizer(holder.keys)]
    most = max((len(holder.named) for holder in named), default=0)
    return [
        Entry(
            name=".".join(holder.keys), tensors=holder.named, averaged=_is_averaged(holder), keys=holder.keys,
            notes=holder.notes, duplicate=holder.duplicate, beside=holder.beside,
        )
        for holder in named
        if 2 * len(holder.named) >= most
    ]  # fmt: skip


# Averages without the names of the network ---------------------------------------------------------------------------


def _averages_of(entries: Sequence[Entry], holders: Sequence[_Holder]) -> list[Entry]:
    """Moving averages of the raw entries whose tensors have other names or none, under the names of the raw ones."""
    found = []
    for source in _average_sources(entries, holders):
        for raw in entries:
            if raw.averaged or 2 * source.count < len(raw.tensors):
                continue
            tensors = _by_order(raw, source.listed) if source.listed else _by_name(raw, source.named)
            if tensors is not None:
                how = "by the order of the parameters" if source.listed else "by their names"
                found.append(
                    Entry(
                        name=".".join(source.keys), tensors=tensors, averaged=True, keys=source.keys, is_whole=False,
                        notes=(*raw.notes, _matching_note(raw, how)),
                    )
                )  # fmt: skip
                break
    return found


def _average_sources(entries: Sequence[Entry], holders: Sequence[_Holder]) -> Iterator[_Holder]:
    """Yields the moving averages that are no entry yet: dictionaries, groups of names in one (model_ema.*), and lists."""
    taken = {entry.name for entry in entries}
    taken_keys = {entry.keys for entry in entries}
    prefixed = {entry.keys for entry in entries if not entry.is_whole}
    for holder in holders:
        if _is_averaged(holder) and ".".join(holder.keys) not in taken:
            if holder.keys not in taken_keys:
                yield holder
        elif holder.keys in prefixed:
            groups: dict[str, dict[str, Stored]] = {}
            for name, tensor in holder.named.items():
                group, dot, rest = name.partition(".")
                if dot and is_average([group]):
                    groups.setdefault(group, {})[rest] = tensor
            for group, named in groups.items():
                keys = (*holder.keys, group)
                name = ".".join(keys)
                if not any(each == name or each.startswith(f"{name}.") for each in taken):
                    yield _Holder(keys=keys, named=named)


def _unmatched(raw: Sequence[Entry], holders: Sequence[_Holder]) -> str:
    """The name of a moving average as large as a network that was not matched with the raw entries; "" if there is none."""
    for source in _average_sources(raw, holders):
        if not is_optimizer(source.keys) and any(2 * source.count >= len(entry.tensors) for entry in raw):
            return ".".join(source.keys)
    return ""


def _by_order(raw: Entry, averages: Sequence[Stored]) -> dict[str, Stored] | None:
    """The averages under the names of `raw`, matched in the order of the parameters; None where they do not fit.

    Objects that average keep a list of the parameters, most of them only of the trained ones; the others, such as a table
    of positions, are those of `raw`. It must be certain which: shapes allow one match only.
    """
    places: dict[tuple[object, ...], str] = {}  # a parameter that a network has twice is averaged once
    alias: dict[str, str] = {}
    for name, tensor in raw.tensors.items():
        alias[name] = places.setdefault(_place(tensor), name)
    names = list(places.values())
    skipped = len(names) - len(averages)
    if not 0 <= skipped <= MAX_SKIPPED:
        return None
    shapes = [raw.tensors[name].shape for name in names]
    # ways[s]: in how many ways (at most 2) the averages so far match the names so far with s names left out
    history = [[1] + [0] * skipped]
    for position, shape in enumerate(shapes):
        before, ways = history[-1], [0] * (skipped + 1)
        for left_out in range(skipped + 1):
            index = position - left_out  # of the average that would be this one's
            if 0 <= index < len(averages) and averages[index].shape == shape:
                ways[left_out] = before[left_out]
            if left_out:
                ways[left_out] = min(2, ways[left_out] + before[left_out - 1])
        history.append(ways)
    if history[-1][skipped] != 1:
        return None
    matched: dict[str, Stored] = {}
    left_out = skipped
    for position in range(len(names) - 1, -1, -1):
        index = position - left_out
        fits = 0 <= index < len(averages) and averages[index].shape == shapes[position]
        if fits and history[position][left_out]:
            matched[names[position]] = averages[index]
        else:
            left_out -= 1
    return {name: matched.get(alias[name], tensor) for name, tensor in raw.tensors.items()}


def _by_name(raw: Entry, averages: Mapping[str, Stored]) -> dict[str, Stored] | None:
    """The averages under the names of `raw`; None where they do not fit. LDM's LitEma writes names without their dots.

    The average may be of the module that holds the network, so its names may begin with parts of the prefix of `raw`.
    """
    prefix = raw.name.split(".")[len(raw.keys) :]
    for begin in range(len(prefix) + 1):
        for dot in (".", ""):
            named = {name: dot.join((*prefix[begin:], *name.split("."))) for name in raw.tensors}
            matched = {
                name: averages[named[name]]
                for name, tensor in raw.tensors.items()
                if named[name] in averages and averages[named[name]].shape == tensor.shape
            }
            if 2 * len(matched) >= len(raw.tensors):
                return matched
    return None


def _completed(average: Entry, entries: Sequence[Entry]) -> Entry:
    """The average with the tensors that it leaves out, because they are not trained, taken from the raw weights."""
    candidates = [
        entry
        for entry in entries
        if not entry.averaged
        and len(average.tensors) < len(entry.tensors) <= 2 * len(average.tensors)
        and all(name in entry.tensors and entry.tensors[name].shape == t.shape for name, t in average.tensors.items())
    ]
    if len(_distinct(candidates)) != 1:
        return average
    raw = candidates[0]
    missing = [name for name in raw.tensors if name not in average.tensors]
    more = f" and {len(missing) - MAX_NAMED} more" if len(missing) > MAX_NAMED else ""
    return replace(
        average,
        tensors={name: average.tensors.get(name, tensor) for name, tensor in raw.tensors.items()},
        is_whole=False,
        notes=(
            *average.notes,
            f"not in the average, and taken from {raw.name or ITSELF!r}: {', '.join(missing[:MAX_NAMED])}{more}",
        ),
    )


# The choice ----------------------------------------------------------------------------------------------------------


def _named(wanted: str, entries: Sequence[Entry], path: Path) -> Entry:
    """The entry of that name, or the only one below it; UserError, with all names, if there is none."""
    exact = [entry for entry in entries if (entry.name or ITSELF) == wanted]
    fitting = exact or _distinct([entry for entry in entries if entry.name.startswith(f"{wanted}.")])
    if len(fitting) != 1:
        what = "no entry" if not fitting else "several entries below"
        raise UserError(f"{path} has {what} {shown(wanted)}; it has {_quoted(entries)}")
    return fitting[0]


def _distinct(entries: Sequence[Entry]) -> list[Entry]:
    """The entries without those that hold the very same tensors as one before."""
    found: dict[tuple[tuple[object, ...], ...], Entry] = {}
    for entry in entries:
        found.setdefault(entry.places, entry)
    return list(found.values())


def _place(tensor: Stored) -> tuple[object, ...]:
    """Where a tensor is: equal for two names of one tensor."""
    return (tensor.file, tensor.start, tensor.shape, tensor.strides)


def _quoted(entries: Sequence[Entry]) -> str:
    """The names of entries, for a message."""
    names = [entry.name or ITSELF for entry in entries]
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
