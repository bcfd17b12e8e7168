"""A data-only unpickler: an interpreter of pickle opcodes that builds inert values and imports, calls and sets nothing.

Written by hand rather than as a subclass of pickle.Unpickler: that one calls whatever `find_class` returns, runs
__setstate__ and extension codes, and says nothing of bounds. Here an opcode that is not in the table is an error, every
length is held against the bytes there are, and the finished object against limits on depth and expansion.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from reprlib import repr as short_repr

from ckptconv.collecting import no_collecting
from ckptconv.containers.opcodes import OPCODES
from ckptconv.containers.pickled import (
    MAX_DEPTH,
    MAX_EXPANDED,
    TORCH_DTYPES,
    Global,
    Known,
    Namespace,
    Opaque,
    Ordered,
    TorchDType,
    key,
    refusal,
)
from ckptconv.containers.plain_calls import PLAIN_CALLS, Call
from ckptconv.errors import FormatError

PROTO, MEMOIZE, BININT1, BINPUT, LONG_BINPUT, BINGET, LONG_BINGET = 0x80, 0x94, *b"Kqrhj"
PADDING = b"\0" * 8
_DAMAGE = (ValueError, TypeError, LookupError, OverflowError, RecursionError, struct.error)


class Truncated(FormatError):
    """The pickle goes on beyond the bytes given: a caller that holds only the first part may come back with more."""


class Unpickler:
    """One pickle in `data` from `pos` on. `calls` rebuild known objects, `persistent` resolves persistent ids."""

    def __init__(
        self,
        data: bytes,
        where: str,
        calls: Mapping[Global, Call] | None = None,
        persistent: Callable[[object], object] | None = None,
        pos: int = 0,
    ) -> None:
        self.data = data + PADDING  # so that a fixed-width argument is read without a check of its own
        self.end, self.where, self.pos, self.start = len(data), where, pos, pos
        self.calls = {**PLAIN_CALLS, **(calls or {})}
        self.persistent = persistent or _no_persistent
        self.stack: list[object] = []
        self.marks: list[list[object]] = []
        self.memo: dict[int, object] = {}
        self.globals: dict[tuple[str, str], Global | TorchDType] = {}
        self.handlers: dict[int, Call] = {}  # calls by the id of their one marker: no hashing of names for every tensor
        self.budget = 2 * (len(data) - pos) + 1024
        self.done = False

    def load(self) -> object:
        """The object; `pos` is then behind its STOP."""
        if self.pos < self.end and self.data[self.pos] != PROTO:
            raise FormatError(
                self.where, "the pickle does not begin with a protocol number: torch writes protocol 2 and up"
            )
        try:
            with no_collecting():
                self._follow()
        except FormatError:
            raise
        except _DAMAGE as error:
            text = "stack underflow" if isinstance(error, IndexError) else str(error)
            text = f"memo entry {error} was never stored" if isinstance(error, KeyError) else text
            raise FormatError(self.where, f"the pickle is damaged at byte {self.pos - self.start}: {text}") from None
        value = self.stack.pop()
        check_bounds(value, self.where)
        return value

    def _follow(self) -> None:
        """Opcode after opcode. The memo's are half of all in a file of many tensors, hence the shortcut for them."""
        data, end, memo, stack, pos = self.data, self.end, self.memo, self.stack, self.pos
        while not self.done:
            if pos >= end:
                raise Truncated(self.where, "the pickle ends before its STOP (truncated)")
            code = data[pos]
            if code == BINPUT:
                memo[data[pos + 1]] = stack[-1]
                pos += 2
            elif code == LONG_BINPUT:
                memo[int.from_bytes(data[pos + 1 : pos + 5], "little")] = stack[-1]
                pos += 5
            elif code == BINGET:
                stack.append(memo[data[pos + 1]])
                pos += 2
            elif code == LONG_BINGET:
                stack.append(memo[int.from_bytes(data[pos + 1 : pos + 5], "little")])
                pos += 5
            elif code == MEMOIZE:
                memo[len(memo)] = stack[-1]
                pos += 1
            elif code == BININT1:
                stack.append(data[pos + 1])
                pos += 2
            else:
                self.pos = pos + 1
                OPCODES[code](self)
                pos, stack = self.pos, self.stack

    def take(self, n: int) -> bytes:
        """The next n bytes."""
        at = self.pos
        if n > self.end - at:
            self.require(n)
        self.pos = at + n
        return self.data[at : at + n]

    def require(self, n: int) -> None:
        """See that n more bytes are there."""
        left = self.end - self.pos
        if n > left:
            raise Truncated(self.where, f"the pickle asks for {n} bytes where {max(left, 0)} are left (truncated)")

    def charge(self, n: int) -> None:
        """Pay for a copy of n values or bytes: a shared value copied again and again would grow without bound."""
        self.budget -= n
        if self.budget < 0:
            raise ValueError("copies the same values over and over (a bomb)")

    def find(self, module: object, name: object) -> Global | TorchDType:
        """The marker of a global."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a global is not named by two strings")
        found = self.globals.get((module, name))
        if found is None:
            problem = refusal(module, name)
            if problem is not None:
                raise FormatError(self.where, f"the pickle {problem}")
            found = TorchDType(name) if module == "torch" and name in TORCH_DTYPES else Global(module, name)
            self.globals[module, name] = found
            if isinstance(found, Global) and found in self.calls:
                self.handlers[id(found)] = self.calls[found]
        return found

    def since_mark(self) -> list[object]:
        items = self.stack
        self.stack = self.marks.pop()
        return items

    def reduce(self, callee: object, args: object, new: bool) -> object:
        if not isinstance(callee, Global) or not isinstance(args, tuple):
            raise ValueError(f"calls {short_repr(callee)}, which is not a function with arguments")
        call = self.handlers.get(id(callee))
        return call(self, args) if call is not None else Opaque(callee.module, callee.name, args, new=new)

    def open(self, target: Opaque) -> Opaque:
        """An object that may still change: once it is the key of a dict it may not."""
        if target.sealed:
            raise ValueError("changes an object that is the key of a dict")
        return target

    def set_items(self, target: object, flat: list[object]) -> None:
        if len(flat) % 2:
            raise ValueError("a key without a value")
        if isinstance(target, dict):
            for i in range(0, len(flat), 2):
                target[key(flat[i])] = flat[i + 1]
        elif isinstance(target, Opaque):
            self.open(target).pairs += zip(flat[::2], flat[1::2], strict=True)
        else:
            raise ValueError(f"sets items of a {type(target).__name__}")

    def append(self, target: object, items: list[object]) -> None:
        if isinstance(target, list):
            target += items
        elif isinstance(target, Opaque):
            self.open(target).items += items
        else:
            raise ValueError(f"appends to a {type(target).__name__}")

    def build(self, target: object, state: object) -> None:
        if isinstance(target, Opaque):
            if target.state is not None:
                raise ValueError(f"sets the state of a {target.module}.{target.name} twice")
            self.open(target).state = state
        elif isinstance(target, Known):
            if target.state is not None:
                raise ValueError(f"sets the state of a {target.cls} twice")
            target.state = state
        elif (
            isinstance(target, (Namespace, Ordered)) and isinstance(state, dict) and all(type(k) is str for k in state)
        ):
            self.charge(len(state))
            if isinstance(target, Namespace):
                target.__dict__.update(state)
            else:
                target.attributes = {**(target.attributes or {}), **state}
        else:
            raise ValueError(f"sets the state of a {type(target).__name__}")


def _no_persistent(pid: object) -> object:
    raise ValueError(f"has a persistent id, {short_repr(pid)}, where none belongs")


# -- limits on the finished object -------------------------------------------------------------------------------


def _inside(value: object) -> Iterable[object]:
    """The values directly within a value."""
    if isinstance(value, Ordered):
        return [*value, *value.values(), value.attributes]
    if isinstance(value, dict):
        return [*value, *value.values()]
    if isinstance(value, (list, tuple, set, frozenset)):
        return value
    if isinstance(value, Opaque):
        return [value.args, value.state, value.items, value.pairs]
    return value.__dict__.values() if isinstance(value, Namespace) else ()


_HOLDERS = (dict, list, tuple, set, frozenset, Opaque, Namespace)


def check_bounds(root: object, where: str) -> None:
    """Refuse what contains itself, is nested too deeply or unfolds into far too many values; no recursion here."""
    seen: dict[int, tuple[int, int]] = {}  # finished values: height, and size with shared parts counted each time
    todo: list[tuple[object, bool]] = [(root, False)]
    unfinished: set[int] = set()
    while todo:
        value, closing = todo.pop()
        here = id(value)
        if not closing:
            if here in seen:
                continue
            if here in unfinished:
                raise FormatError(where, "the pickle holds an object that contains itself")
            unfinished.add(here)
            if len(unfinished) > MAX_DEPTH:  # these are the values around this one
                break
            todo.append((value, True))
            todo += [(v, False) for v in _inside(value) if isinstance(v, _HOLDERS) and id(v) not in seen]
            continue
        height = size = 1
        for v in _inside(value):
            h, s = seen.get(id(v), (0, 1)) if isinstance(v, _HOLDERS) else (0, 1)
            height, size = max(height, h + 1), size + s
        if height > MAX_DEPTH:
            break
        if size > MAX_EXPANDED:
            raise FormatError(where, f"the pickle unfolds into more than {MAX_EXPANDED} values (a bomb)")
        unfinished.discard(here)
        seen[here] = (height, size)
    else:
        return
    raise FormatError(where, f"the pickle is nested deeper than {MAX_DEPTH}")
