"""Which part of a checkpoint holds the weights of a network: every place where they can be, raw or averaged.

A checkpoint is a dictionary of dictionaries, and public code writes the moving average under many names and at many
depths: ema, model_ema, state_dict_ema, ema.shadow, ema.module, the prefix ema_model. of names, or the list
ema.shadow_params in the order of the parameters. So nothing is concluded from one name: all dictionaries and lists of
tensors in the file are looked at, and a network is recognised by names of its tensors (marks), under any prefix.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.errors import UserError, shown
from harness.weights.average_matching import by_name, by_order
from harness.weights.holders import Holder, find_holders, is_average, is_averaged, is_optimizer, place
from harness.weights.tensors import Stored

Marks = Collection[str]
"""Names of tensors that identify a network."""

MAX_ENTRIES = 100  # of a file; a training keeps averages of a few decays
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
    def prefix(self) -> tuple[str, ...]:
        """The part of its name that is the prefix of its tensors' names in the file."""
        return tuple(self.name.split(".")[len(self.keys) :])

    @property
    def places(self) -> tuple[tuple[object, ...], ...]:
        """Where the values are: equal for two entries that hold the very same tensors."""
        return tuple((name, *place(tensor)) for name, tensor in sorted(self.tensors.items()))


def choose_entry(
    value: Mapping[Any, Any], path: Path, markings: Iterable[Marks] = (), wanted: str | None = None
) -> tuple[Entry, tuple[Entry, ...]]:
    """(the entry of the checkpoint `value` to read, all entries with such weights, the chosen one included).

    markings: marks of the networks that are looked for; without any, or if none fits, the largest dictionaries of tensors
    are the entries. A moving average comes before the raw weights. wanted: name of the entry to read; None: the only one
    that fits. UserError if there is none, if several fit equally, or if there is a moving average that cannot be read.
    path: for messages.
    """
    holders, unreadable = find_holders(value)
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


# Entries -------------------------------------------------------------------------------------------------------------


def _marked(holders: Sequence[Holder], markings: Sequence[Marks]) -> list[Entry]:
    """The entries with the marks of one network: of the one that has the largest share of its marks in the file.

    Of networks with equal shares it is the one with the shortest prefix, because the names of one may end as another's.
    """
    best: tuple[float, int] = (0.0, 0)
    chosen: list[tuple[Holder, str]] = []
    own: Marks = ()  # the marks of the network that was chosen
    for marks in markings:
        found = [(share, holder, prefix) for holder in holders for share, prefix in _prefixes(holder.named, marks)]
        if not found:
            continue
        share = max(each[0] for each in found)
        rank = (share, -min(len(prefix) for each, _, prefix in found if each == share))
        if rank > best or not chosen:
            best, chosen = rank, [(holder, prefix) for each, holder, prefix in found if each == share]
            own = marks
    views = []
    for holder, prefix in chosen:
        views += _views(holder, prefix, {other for same, other in chosen if same is holder and other}, own)
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


def _views(holder: Holder, prefix: str, prefixes: Collection[str], marks: Marks) -> list[Entry]:
    """The entries of a dictionary at one prefix. Names of averages beside the weights (model_ema.*) make more of it.

    prefixes: all under which the network is in this dictionary; each of them has entries of its own. marks: of the network,
    which may itself have modules with such names (avg_head.weight).
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
        name=".".join(components), tensors=holder.named, averaged=is_averaged(holder), keys=holder.keys,
        notes=holder.notes, duplicate=holder.duplicate, beside=holder.beside,
    )  # fmt: skip
    groups: dict[str, dict[str, Stored]] = {}  # the tensors under the first components of names that are averages
    for name, tensor in holder.named.items():
        group, _, rest = name.partition(".")
        if rest and is_average([group]):
            groups.setdefault(group, {})[rest] = tensor
    # a group of counters alone is none, and neither is one with weights of the network itself
    inside = {mark.partition(".")[0] for mark in marks}
    groups = {
        group: named
        for group, named in groups.items()
        if group not in inside and any(tensor.shape for tensor in named.values())
    }
    if not groups or whole.averaged:
        return [whole]
    raw = replace(
        whole,
        tensors={name: tensor for name, tensor in holder.named.items() if name.partition(".")[0] not in groups},
        is_whole=False,
    )
    elsewhere = groups.keys() & {each.partition(".")[0] for each in prefixes}
    groups = {group: named for group, named in groups.items() if group not in elsewhere}
    matched = {}
    for group, named in sorted(groups.items()):
        large = 2 * len(named) >= len(raw.tensors)  # as `by_name` asks for; there may be very many small groups
        if large and (found := by_name(raw.tensors, raw.prefix, named)):
            matched[group] = found
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


def _largest(holders: Sequence[Holder]) -> list[Entry]:
    """The dictionaries of tensors that may be a network of unknown names: all but those with less than half as many."""
    named = [holder for holder in holders if holder.named and not is_optimizer(holder.keys)]
    most = max((len(holder.named) for holder in named), default=0)
    return [
        Entry(
            name=".".join(holder.keys), tensors=holder.named, averaged=is_averaged(holder), keys=holder.keys,
            notes=holder.notes, duplicate=holder.duplicate, beside=holder.beside,
        )
        for holder in named
        if 2 * len(holder.named) >= most
    ]  # fmt: skip


# Averages without the names of the network ---------------------------------------------------------------------------


def _averages_of(entries: Sequence[Entry], holders: Sequence[Holder]) -> list[Entry]:
    """Moving averages of the raw entries whose tensors have other names or none, under the names of the raw ones."""
    found = []
    for source in _average_sources(entries, holders):
        for raw in entries:
            if raw.averaged or 2 * source.count < len(raw.tensors):
                continue
            tensors = (
                by_order(raw.tensors, source.listed)
                if source.listed
                else by_name(raw.tensors, raw.prefix, source.named)
            )
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


def _average_sources(entries: Sequence[Entry], holders: Sequence[Holder]) -> Iterator[Holder]:
    """Yields the moving averages that are no entry yet: dictionaries, groups of names in one (model_ema.*), and lists."""
    taken = {entry.name for entry in entries}
    taken_keys = {entry.keys for entry in entries}
    prefixed = {entry.keys for entry in entries if not entry.is_whole}
    for holder in holders:
        if is_averaged(holder) and ".".join(holder.keys) not in taken:
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
                    yield Holder(keys=keys, named=named)


def _unmatched(raw: Sequence[Entry], holders: Sequence[Holder]) -> str:
    """The name of a moving average as large as a network that was not matched with the raw entries; "" if there is none."""
    for source in _average_sources(raw, holders):
        if not is_optimizer(source.keys) and any(2 * source.count >= len(entry.tensors) for entry in raw):
            return ".".join(source.keys)
    return ""


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


def _quoted(entries: Sequence[Entry]) -> str:
    """The names of entries, for a message."""
    names = [entry.name or ITSELF for entry in entries]
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
