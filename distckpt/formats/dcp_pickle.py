"""A pickle that is taken for what it says, and not run: plain data, and what a table has for the few names in it.

Python's own unpickler would call what a pickle names, and can be made to take any amount of memory. This one knows no
name but those it is given, and the opcodes that PyTorch writes; what it builds is no larger than the pickle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

_LONGEST_NUMBER_BYTES = 8
_HIGHEST_PROTOCOL = 5


class Kind:
    """A class that a pickle may name. Nobody makes an object of it: `Made` stands for one."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Made:
    """What stands for an object: of which class it is, and the state that it has in the pickle."""

    __slots__ = ("kind", "state")

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.state: Any = None


@dataclass(frozen=True)
class Table:
    """The names that a pickle may ask for, each with its module.

    Attributes:
        kinds: classes; see `Made`.
        makers: functions of ours that are called in the place of what is named. They check what they are given, which
            may be any plain data, and raise ``ValueError``.
        constants: what names stand for by themselves.
        of_id: what is made of a persistent id; such an id is refused without it.
    """

    kinds: frozenset[str] = frozenset()
    makers: Mapping[str, Callable[..., object]] = field(default_factory=dict)
    constants: Mapping[str, object] = field(default_factory=dict)
    of_id: Callable[[object], object] | None = None


def read_pickle(data: bytes, table: Table) -> tuple[Any, int]:
    """What the pickle at the start of ``data`` holds, and where it ends. None of its names is looked up anywhere but
    in ``table``.

    Raises:
        ValueError: where it asks for another name, is cut off, or is no pickle that PyTorch could have written.
    """
    machine = _Machine(data, table)
    try:
        return machine.run(), machine.at
    except (IndexError, TypeError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"its pickle is cut off or broken at byte {machine.at} ({type(error).__name__})") from error


class _Machine:
    """The stack that a pickle is a program for, its memo, and where in it the next opcode is."""

    def __init__(self, data: bytes, table: Table) -> None:
        self.at = 0
        self._data = data
        self._table = table
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._named: dict[str, object] = {}

    def run(self) -> Any:
        data, steps = self._data, _STEPS
        while (opcode := data[self.at]) != _STOP:
            step = steps.get(opcode)
            if step is None:
                raise ValueError(f"its pickle has the opcode {opcode:#04x} at byte {self.at}, which torch never writes")
            self.at += 1
            step(self)
        self.at += 1
        if len(self._stack) != 1:
            raise IndexError
        return self._stack[0]

    # What stands behind an opcode.

    def _take(self, count: int) -> bytes:
        begin, self.at = self.at, self.at + count
        if self.at > len(self._data):
            raise IndexError
        return self._data[begin : self.at]

    def _number(self, count: int) -> int:
        return int.from_bytes(self._take(count), "little")

    def _line(self) -> str:
        end = self._data.find(b"\n", self.at)
        if end < 0:
            raise IndexError
        begin, self.at = self.at, end + 1
        return self._data[begin:end].decode()

    # Opcodes.

    def protocol(self) -> None:
        if (version := self._number(1)) > _HIGHEST_PROTOCOL:
            raise ValueError(f"its pickle is of protocol {version}")

    def frame(self) -> None:
        self._take(8)

    def mark(self) -> None:
        self._marks.append(len(self._stack))

    def none(self) -> None:
        self._stack.append(None)

    def true(self) -> None:
        self._stack.append(True)

    def false(self) -> None:
        self._stack.append(False)

    def int_4(self) -> None:
        self._stack.append(int.from_bytes(self._take(4), "little", signed=True))

    def int_1(self) -> None:
        self._stack.append(self._data[self.at])
        self.at += 1

    def int_2(self) -> None:
        self._stack.append(self._number(2))

    def long_1(self) -> None:
        if (count := self._number(1)) > _LONGEST_NUMBER_BYTES:
            raise ValueError(f"its pickle has a number of {count} bytes")
        self._stack.append(int.from_bytes(self._take(count), "little", signed=True))

    def short_text(self) -> None:
        end = self.at + 1 + self._data[self.at]
        if end > len(self._data):
            raise IndexError
        self._stack.append(self._data[self.at + 1 : end].decode())
        self.at = end

    def text(self) -> None:
        self._stack.append(self._take(self._number(4)).decode())

    def empty_tuple(self) -> None:
        self._stack.append(())

    def tuple_1(self) -> None:
        self._stack[-1] = (self._stack[-1],)

    def tuple_2(self) -> None:
        self._stack[-2:] = [(self._stack[-2], self._stack[-1])]

    def tuple_3(self) -> None:
        self._stack[-3:] = [(self._stack[-3], self._stack[-2], self._stack[-1])]

    def tuple_n(self) -> None:
        self._stack.append(tuple(self._marked()))

    def empty_list(self) -> None:
        self._stack.append([])

    def append(self) -> None:
        value = self._stack.pop()
        self._top(list).append(value)

    def appends(self) -> None:
        values = self._marked()
        self._top(list).extend(values)

    def empty_dict(self) -> None:
        self._stack.append({})

    def set_item(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set(self._top(dict), key, value)

    def set_items(self) -> None:
        values = self._marked()
        if len(values) % 2:
            raise IndexError
        target = self._top(dict)
        for key, value in zip(values[::2], values[1::2], strict=True):
            self._set(target, key, value)

    def get_1(self) -> None:
        self._stack.append(self._memo[self._data[self.at]])
        self.at += 1

    def get_4(self) -> None:
        self._stack.append(self._memo[self._number(4)])

    def put_1(self) -> None:
        self._memo[self._number(1)] = self._stack[-1]

    def memoize(self) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def name(self) -> None:
        module = self._line()
        self._stack.append(self._find(f"{module}.{self._line()}"))

    def name_on_stack(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if type(name) is not str or type(module) is not str:
            raise TypeError
        self._stack.append(self._find(f"{module}.{name}"))

    def new_object(self) -> None:
        arguments, kind = self._stack.pop(), self._stack.pop()
        if type(kind) is not Kind or arguments != ():
            raise ValueError("its pickle makes an object of what is no class, or in a way that PyTorch does not")
        self._stack.append(Made(kind.name))

    def reduce(self) -> None:
        arguments, maker = self._stack.pop(), self._stack.pop()
        if type(maker) is not FunctionType or type(arguments) is not tuple:
            raise ValueError("its pickle calls what is no function")
        self._stack.append(maker(*arguments))

    def build(self) -> None:
        state = self._stack.pop()
        self._top(Made).state = state

    def persistent(self) -> None:
        if self._table.of_id is None:
            raise ValueError("its pickle has a persistent id")
        self._stack.append(self._table.of_id(self._stack.pop()))

    def _find(self, name: str) -> object:
        if name not in self._named:
            table = self._table
            if name in table.kinds:
                self._named[name] = Kind(name)
            elif (found := table.makers.get(name, table.constants.get(name))) is not None:
                self._named[name] = found
            else:
                raise ValueError(f"its pickle asks for {ascii(name)[1:-1][:120]}, which no checkpoint needs")
        return self._named[name]

    def _top(self, kind: type) -> Any:
        if type(self._stack[-1]) is not kind:
            raise TypeError
        return self._stack[-1]

    def _marked(self) -> list[Any]:
        begin = self._marks.pop()
        values = self._stack[begin:]
        del self._stack[begin:]
        return values

    @staticmethod
    def _set(target: dict[Any, Any], key: Any, value: Any) -> None:
        # Nothing else is hashed: the hash of tuples in tuples in tuples ends the process.
        if type(key) not in (str, int, Made):
            raise TypeError
        target[key] = value


_STOP = ord(".")

_STEPS: Mapping[int, Callable[[_Machine], None]] = {
    0x80: _Machine.protocol,
    0x95: _Machine.frame,
    ord("("): _Machine.mark,
    ord("N"): _Machine.none,
    0x88: _Machine.true,
    0x89: _Machine.false,
    ord("J"): _Machine.int_4,
    ord("K"): _Machine.int_1,
    ord("M"): _Machine.int_2,
    0x8A: _Machine.long_1,
    0x8C: _Machine.short_text,
    ord("X"): _Machine.text,
    ord(")"): _Machine.empty_tuple,
    0x85: _Machine.tuple_1,
    0x86: _Machine.tuple_2,
    0x87: _Machine.tuple_3,
    ord("t"): _Machine.tuple_n,
    ord("]"): _Machine.empty_list,
    ord("a"): _Machine.append,
    ord("e"): _Machine.appends,
    ord("}"): _Machine.empty_dict,
    ord("s"): _Machine.set_item,
    ord("u"): _Machine.set_items,
    ord("h"): _Machine.get_1,
    ord("j"): _Machine.get_4,
    ord("q"): _Machine.put_1,
    0x94: _Machine.memoize,
    ord("c"): _Machine.name,
    0x93: _Machine.name_on_stack,
    0x81: _Machine.new_object,
    ord("R"): _Machine.reduce,
    ord("b"): _Machine.build,
    ord("Q"): _Machine.persistent,
}
