"""Pickles read without running them.

A pickle is a program for a small stack machine, whose calls can reach anything that Python can import. Here the program
is interpreted over plain data: a global becomes a `Symbol` (its name; nothing is imported), a call becomes a `Call`
(a record of what would have been called), state and items that the program gives to a `Call` are kept in it and no
method of a real class ever runs. The few calls that weight files are made of (ordered dictionaries, tensors) are carried
out by functions that the caller passes in, and these see data alone.

Opcodes after CPython's pickletools, which also reads them from the stream.
"""

from __future__ import annotations

import pickletools
import struct
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any

Constructors = Mapping[str, Callable[..., Any]]
"""By full name, "module.name": what stands for the call. Raises TypeError or ValueError where the arguments are odd."""


class Malformed(ValueError):
    """The bytes are not a pickle that `read` understands."""


@dataclass(frozen=True)
class Symbol:
    """A class or function that the file names."""

    module: str
    name: str

    @property
    def full(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Call:
    """What the file would have made by calling `function`: a placeholder without behaviour."""

    function: Any  # Symbol or Call
    arguments: Any
    state: Any = None
    items: list[Any] = field(default_factory=list, repr=False)


@dataclass
class Reading:
    """A pickle's value, and every class and function that it names, in order."""

    value: Any
    symbols: dict[str, Symbol]


_PUSHED = frozenset(
    [
        "INT",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG",
        "LONG1",
        "LONG4",
        "FLOAT",
        "BINFLOAT",
        "STRING",
        "BINSTRING",
        "SHORT_BINSTRING",
        "UNICODE",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE8",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
        "BYTEARRAY8",
    ]
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_IGNORED = ("PROTO", "FRAME")


def read(stream: IO[bytes], constructors: Constructors, persistent: Callable[[Any], Any] | None = None) -> Reading:
    """The value of the pickle at the position of `stream`, which ends after it.

    `persistent` turns the persistent identifiers of the file into values. Raises `Malformed`.
    """
    machine = _Machine(constructors, persistent)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of odd escapes in the strings of protocol 0
            for opcode, argument, _ in pickletools.genops(stream):
                if machine.step(opcode.name, argument):
                    return Reading(machine.stack.pop(), machine.symbols)
    except Malformed:
        raise
    except (
        ValueError, TypeError, IndexError, KeyError, AttributeError, OverflowError, MemoryError, struct.error,
    ) as error:  # fmt: skip
        raise Malformed(f"{type(error).__name__}: {error}") from error
    raise Malformed("the pickle ends before its STOP")


class _Machine:
    def __init__(self, constructors: Constructors, persistent: Callable[[Any], Any] | None):
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []  # stacks below the open marks
        self.memo: dict[int, Any] = {}
        self.symbols: dict[str, Symbol] = {}
        self.constructors, self.persistent = constructors, persistent

    def step(self, name: str, argument: Any) -> bool:
        """Carry out one opcode; True at the end."""
        stack = self.stack
        if name in _PUSHED:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self.memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name == "MARK":
            self.outer.append(stack)
            self.stack = []
        elif name in _TUPLES:
            count = _TUPLES[name]
            if len(stack) < count:
                raise Malformed("a tuple of more than there is")
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ("EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"):
            stack.append({"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}[name]())
        elif name == "TUPLE":
            items = self._close()
            self.stack.append(tuple(items))
        elif name in ("LIST", "DICT", "FROZENSET"):
            items = self._close()
            made = {"LIST": list, "DICT": _pairs, "FROZENSET": _keys}[name](items)
            self.stack.append(made)
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            items = [stack.pop()] if name == "APPEND" else self._close()
            _extend(self.stack[-1], items)
        elif name in ("SETITEM", "SETITEMS"):
            if name == "SETITEM":
                value = stack.pop()
                items = [stack.pop(), value]
            else:
                items = self._close()
            _update(self.stack[-1], _pairs(items))
        elif name == "POP":
            if stack:
                stack.pop()
            else:
                self._close()
        elif name == "POP_MARK":
            self._close()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "STOP":
            if len(stack) != 1 or self.outer:
                raise Malformed("the pickle leaves more or less than one value")
            return True
        elif name not in _IGNORED:
            self._call(name, argument)
        return False

    def _call(self, name: str, argument: Any) -> None:
        if name in ("GLOBAL", "INST"):
            module, _, attribute = argument.partition(" ")
            symbol = self._symbol(module, attribute)
            arguments = self._close() if name == "INST" else None
            self.stack.append(symbol if name == "GLOBAL" else self._made(symbol, tuple(arguments)))
        elif name == "STACK_GLOBAL":
            attribute, module = self.stack.pop(), self.stack.pop()
            self.stack.append(self._symbol(module, attribute))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, function = self.stack.pop(), self.stack.pop()
            self.stack.append(self._made(function, arguments))
        elif name == "NEWOBJ_EX":
            named, arguments, function = self.stack.pop(), self.stack.pop(), self.stack.pop()
            self.stack.append(Call(function, (arguments, named)))
        elif name == "OBJ":
            function, *arguments = self._close()
            self.stack.append(self._made(function, tuple(arguments)))
        elif name == "BUILD":
            state = self.stack.pop()
            if isinstance(self.stack[-1], Call):
                self.stack[-1].state = state
            # Anything else keeps its own nature: a dictionary's attributes, or a tensor's, are of no use here.
        elif name in ("PERSID", "BINPERSID"):
            if self.persistent is None:
                raise Malformed("it refers to data outside itself")
            self.stack.append(self.persistent(argument if name == "PERSID" else self.stack.pop()))
        else:  # EXT1, EXT2, EXT4: names by number, from a table of this process; buffers from outside the file
            raise Malformed(f"it uses {name}, which no weight file has")

    def _symbol(self, module: Any, name: Any) -> Symbol:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise Malformed("a class without a name")
        symbol = Symbol(module, name)
        return self.symbols.setdefault(symbol.full, symbol)

    def _made(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, (Symbol, Call)) or not isinstance(arguments, tuple):
            raise Malformed("it calls what is no function")
        known = self.constructors.get(function.full) if isinstance(function, Symbol) else None
        return Call(function, arguments) if known is None else known(*arguments)

    def _close(self) -> list[Any]:
        """The items above the last mark, which goes with them."""
        items = self.stack
        self.stack = self.outer.pop()
        return items


def _pairs(items: list[Any]) -> dict[Any, Any]:
    return dict(zip(_keys(items[::2]), items[1::2], strict=True))


def _keys(items: list[Any]) -> list[Any]:
    """The items, each with a hash that costs nothing: a tuple nested a million deep would overflow the C stack."""
    plain = (str, int, float, bytes, type(None), Symbol, Call)

    def known(item: Any) -> bool:
        return isinstance(item, plain) or (isinstance(item, tuple) and all(isinstance(each, plain) for each in item))

    return [item if known(item) else Call(None, item) for item in items]


def _extend(target: Any, items: list[Any]) -> None:
    if isinstance(target, Call):
        target.items.extend(items)
    elif isinstance(target, set):
        target.update(_keys(items))
    elif isinstance(target, list):
        target.extend(items)
    else:
        raise Malformed("it appends to what is no list")


def _update(target: Any, pairs: dict[Any, Any]) -> None:
    if isinstance(target, Call):
        target.items.extend(pairs.items())
    elif isinstance(target, dict):
        target.update(pairs)
    else:
        raise Malformed("it sets items of what is no dictionary")
