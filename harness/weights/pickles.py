"""Reads pickles without running them.

A pickle is a program for a small stack machine, and its calls can reach anything that Python can import. Here the
program is interpreted over plain data: a global becomes a `Symbol` (its name; nothing is imported), and a call becomes a
`Call` (a record of it), which also stores the state and items that the program gives to the result. No method of a real
class ever runs. The few calls that weight files need (ordered dictionaries, tensors) are carried out by functions that
the caller passes in, on plain data.

A small program can ask for much work: to copy one list a hundred thousand times, or to build a dictionary whose keys all
collide. So every step is charged to a `Budget`, and dictionary keys other than text and small integers are replaced by
placeholders.

Opcodes: CPython's pickletools, which also reads them from the stream.
"""

from __future__ import annotations

import pickletools
import struct
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any

Constructors = Mapping[str, Callable[..., Any]]
"""Functions that carry out a call, by full name "module.name". They raise TypeError or ValueError for odd arguments."""


# A unit is about 64 bytes or a third of a microsecond; an opcode costs one, and what it makes or copies costs more.
UNITS = 1_200_000  # budget of a file; the state dict of 1000 tensors costs 50,000
UNITS_A_STORAGE = 80  # added for each storage of a zip file; a tensor costs about 60
MAX_UNITS = 8_000_000  # for any number of storages: enough for 100,000 tensors
LONGEST_NAME = 1000  # characters in the name of a class, function or storage
SMALL_KEY = 1 << 53  # integers below it hash to themselves; larger ones could be chosen to collide


class Malformed(ValueError):
    """The bytes are not a pickle that `read` understands."""


class Unsuitable(Malformed):
    """A valid pickle that is not read; the message continues a sentence that begins with the file's name."""


class Budget:
    """A limit, in units (see UNITS), on the work and memory that the pickles of a file may cause."""

    def __init__(self, units: int = UNITS):
        self.used, self.limit = 0, units

    def spend(self, units: int) -> None:
        """Count `units` as used; `Unsuitable` above the limit."""
        self.used += units
        if self.used > self.limit:
            raise Unsuitable(
                f"asks for more than weights need (over {self.limit:,} steps and objects to describe its tensors) and"
                " is not read; save the state dict alone"
            )

    def grant(self, units: int) -> None:
        """Raise the limit, up to MAX_UNITS."""
        self.limit = min(self.limit + units, MAX_UNITS)


@dataclass(frozen=True)
class Symbol:
    """A class or function that the file names."""

    module: str
    name: str

    @property
    def full(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, slots=True)
class Call:
    """A placeholder for the result of a call of `function`, which is not carried out.

    state: what the pickle sets as the attributes of the result. items: what it appends to the result, or sets in it as
    (key, value) pairs.
    """

    function: Any  # Symbol or Call
    arguments: Any
    state: Any = None
    items: list[Any] = field(default_factory=list, repr=False)


@dataclass
class Reading:
    """The value of a pickle, and every class and function that it names, by full name in their order."""

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
_EMPTY = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}
_IGNORED = ("PROTO", "FRAME")
_CALL_UNITS = 2  # units of a call, a storage or a replaced key, in addition to the opcode's; a name costs twice that


def read(
    stream: IO[bytes],
    constructors: Constructors,
    persistent: Callable[[Any], Any] | None = None,
    budget: Budget | None = None,
) -> Reading:
    """Read the pickle that begins at the position of `stream`, and leave the position at its end.

    constructors: functions for the calls that are carried out; other calls become a `Call`. persistent: makes a value of
    a persistent identifier. budget: may be shared by several pickles; None: a new one. Raises `Malformed`.
    """
    machine = _Machine(constructors, persistent, budget or Budget())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # odd escapes in the strings of protocol 0
            for opcode, argument, _ in pickletools.genops(stream):
                if machine.step(opcode.name, argument):
                    return Reading(machine.stack.pop(), machine.symbols)
    except Malformed:
        raise
    except (
        ValueError, TypeError, IndexError, KeyError, AttributeError, OverflowError, MemoryError, struct.error,
    ) as error:  # fmt: skip
        raise Malformed(f"{type(error).__name__}: {error}"[:LONGEST_NAME]) from error
    raise Malformed("the pickle ends before its STOP")


class _Machine:
    """The stack machine; `step` carries out one opcode."""

    def __init__(self, constructors: Constructors, persistent: Callable[[Any], Any] | None, budget: Budget):
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []  # for each open mark, the stack below it
        self.memo: dict[int, Any] = {}
        self.symbols: dict[str, Symbol] = {}
        self.constructors, self.persistent, self.budget = constructors, persistent, budget

    def step(self, name: str, argument: Any) -> bool:
        """Carry out one opcode; returns True at STOP. The most frequent opcodes come first.

        name, argument: as pickletools.genops gives them.
        """
        stack, budget = self.stack, self.budget  # `_pop_mark` replaces self.stack: after it, `stack` is out of date
        budget.used += 1  # as budget.spend(1), but faster: this is done for each opcode
        if budget.used > budget.limit:
            budget.spend(0)  # raises
        if name in _PUSHED:
            if isinstance(argument, (str, bytes, bytearray)):
                budget.spend(len(argument) >> 6)  # a unit for 64 bytes
            stack.append(argument)
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self.memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            index = len(self.memo) if name == "MEMOIZE" else argument
            if index >= 1 << 32:  # protocol 0 may write any number
                raise Malformed("an index of its memo is out of reach")
            self.memo[index] = stack[-1]
        elif name == "MARK":
            self.outer.append(stack)
            self.stack = []
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            count = _TUPLES[name]
            if len(stack) < count:
                raise Malformed("a tuple of more than there is")
            stack[-count:] = [tuple(stack[-count:])]
        elif name == "TUPLE":
            items = self._pop_mark()
            self.stack.append(tuple(items))
        elif name == "LIST":
            items = self._pop_mark()
            self.stack.append(items)
        elif name == "DICT":
            items = self._pop_mark()
            self.stack.append(to_dict(items, budget))
        elif name in ("EMPTY_SET", "FROZENSET"):
            items = [] if name == "EMPTY_SET" else self._pop_mark()
            budget.spend(3)  # an empty set takes about 200 bytes
            self.stack.append(set(_keys(items, budget)))
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            items = [stack.pop()] if name == "APPEND" else self._pop_mark()
            self._extend(self.stack[-1], items)
        elif name in ("SETITEM", "SETITEMS"):
            if name == "SETITEM":
                value = stack.pop()
                items = [stack.pop(), value]
            else:
                items = self._pop_mark()
            budget.spend(1)
            self._update(self.stack[-1], items)
        elif name == "POP":
            if stack:
                stack.pop()
            else:  # as in CPython: what is on top is the mark
                self._pop_mark()
        elif name == "POP_MARK":
            self._pop_mark()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "STOP":
            if len(stack) != 1 or self.outer:
                raise Malformed("the pickle leaves more or less than one value")
            return True
        elif name not in _IGNORED:
            self._rare_step(name, argument)
        return False

    def _rare_step(self, name: str, argument: Any) -> None:
        """Carry out an opcode for a name, a call, an object's state or a persistent identifier; `Malformed` for others."""
        if name in ("GLOBAL", "INST"):
            module, _, attribute = argument.partition(" ")
            symbol = self._symbol(module, attribute)
            if name == "GLOBAL":
                self.stack.append(symbol)
            else:
                items = self._pop_mark()
                self.stack.append(self._call_function(symbol, tuple(items)))
        elif name == "STACK_GLOBAL":
            attribute, module = self.stack.pop(), self.stack.pop()
            self.stack.append(self._symbol(module, attribute))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, function = self.stack.pop(), self.stack.pop()
            self.stack.append(self._call_function(function, arguments))
        elif name == "NEWOBJ_EX":
            named, arguments, function = self.stack.pop(), self.stack.pop(), self.stack.pop()
            self.budget.spend(_CALL_UNITS)
            self.stack.append(Call(function, (arguments, named)))
        elif name == "OBJ":
            function, *arguments = self._pop_mark()
            self.stack.append(self._call_function(function, tuple(arguments)))
        elif name == "BUILD":
            state = self.stack.pop()
            if isinstance(self.stack[-1], Call):
                self.stack[-1].state = state
            # of other values, such as dictionaries and tensors, the attributes are not needed
        elif name in ("PERSID", "BINPERSID"):
            if self.persistent is None:
                raise Malformed("it refers to data outside itself")
            self.budget.spend(_CALL_UNITS)
            self.stack.append(self.persistent(argument if name == "PERSID" else self.stack.pop()))
        else:  # EXT1, EXT2, EXT4: names by number, from a table of the process; buffers that are not in the file
            raise Malformed(f"it uses {name}, which no weight file has")

    def _symbol(self, module: Any, name: Any) -> Symbol:
        """Record the class or function `module`.`name`; the same name gives the same Symbol."""
        if not (isinstance(module, str) and isinstance(name, str)):
            raise Malformed("a class without a name")
        if len(module) + len(name) > LONGEST_NAME:
            raise Malformed("a class with a name of more than a line")
        symbol = Symbol(module, name)
        self.budget.spend(2 * _CALL_UNITS)
        return self.symbols.setdefault(symbol.full, symbol)

    def _call_function(self, function: Any, arguments: Any) -> Any:
        """The result of a call: by its constructor if there is one, otherwise a `Call`."""
        if not isinstance(function, (Symbol, Call)) or not isinstance(arguments, tuple):
            raise Malformed("it calls what is no function")
        self.budget.spend(_CALL_UNITS)
        constructor = self.constructors.get(function.full) if isinstance(function, Symbol) else None
        if constructor is None:
            return Call(function, arguments)
        self.budget.spend(len(arguments))  # a call may copy its arguments and their items
        for each in arguments:
            if isinstance(each, (tuple, list, dict)):
                self.budget.spend(len(each))
            elif isinstance(each, (str, bytes)):
                self.budget.spend(len(each) >> 6)  # a unit for 64 bytes
        return constructor(*arguments)

    def _pop_mark(self) -> list[Any]:
        """Remove the last mark and return the items above it."""
        items = self.stack
        self.stack = self.outer.pop()
        return items

    def _extend(self, target: Any, items: list[Any]) -> None:
        """Append the items to a list, set or placeholder, in place."""
        if isinstance(target, Call):
            target.items.extend(items)
        elif isinstance(target, set):
            target.update(_keys(items, self.budget))
        elif isinstance(target, list):
            target.extend(items)
        else:
            raise Malformed("it appends to what is no list")

    def _update(self, target: Any, items: list[Any]) -> None:
        """Set items of a dictionary or placeholder, in place. items: alternating keys and values."""
        if isinstance(target, Call):
            target.items.extend(to_dict(items, self.budget).items())
        elif isinstance(target, dict):
            target.update(to_dict(items, self.budget))
        else:
            raise Malformed("it sets items of what is no dictionary")


def to_dict(items: list[Any], budget: Budget | None = None) -> dict[Any, Any]:
    """The dictionary of `items`, alternating keys and values. budget: charged for keys that are replaced; None: a new one."""
    return dict(zip(_keys(items[::2], budget or Budget()), items[1::2], strict=True))


def _keys(items: list[Any], budget: Budget) -> list[Any]:
    """The items as keys of a dictionary or members of a set.

    Text, bytes, small integers, None, symbols and calls stay as they are; every other item becomes a new `Call`, which is
    hashed by identity. Hashing a tuple nested a million deep would overflow the C stack, and large integers can be chosen
    to have equal hashes, so that building a dictionary of them takes quadratic time.
    """
    keys = []
    for item in items:
        if not isinstance(item, (str, bytes, type(None), Symbol, Call)) and not (
            isinstance(item, int) and -SMALL_KEY < item < SMALL_KEY
        ):
            budget.spend(_CALL_UNITS)
            item = Call(None, item)
        keys.append(item)
    return keys
