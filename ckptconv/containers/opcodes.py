"""The pickle opcodes that the data-only unpickler follows, each a function of it; all others are refused.

BININT1 and those that store in the memo and get from it are not here but in its loop.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from ckptconv.containers.pickled import key

if TYPE_CHECKING:
    from ckptconv.containers.unpickle import Unpickler

Op = Callable[["Unpickler"], None]
MAX_LONG = 255  # bytes of an integer: RNG states need 16


def _number(u: Unpickler, width: int) -> int:
    """An unsigned argument. It may run past the end into the padding: the loop finds out before the next opcode."""
    at = u.pos
    u.pos = at + width
    return u.data[at] if width == 1 else int.from_bytes(u.data[at : at + width], "little")


def _proto(u: Unpickler) -> None:
    version = _number(u, 1)
    if u.pos != u.start + 2 or not 2 <= version <= 5:
        raise ValueError(f"protocol {version} is not one of 2 to 5, or stands in the middle")


def _stop(u: Unpickler) -> None:
    if len(u.stack) != 1 or u.marks:
        raise ValueError(f"stops with {len(u.stack)} values and {len(u.marks)} marks on the stack")
    u.done = True


def _frame(u: Unpickler) -> None:
    size = _number(u, 8)
    u.require(size)


def _mark(u: Unpickler) -> None:
    u.marks.append(u.stack)
    u.stack = []


def _push(value: object) -> Op:
    return lambda u: u.stack.append(value)


def _make(kind: Callable[[], object]) -> Op:
    return lambda u: u.stack.append(kind())


def _natural(width: int) -> Op:
    return lambda u: u.stack.append(_number(u, width))


def _int(u: Unpickler) -> None:
    u.stack.append(int.from_bytes(u.take(4), "little", signed=True))


def _long(width: int) -> Op:
    def op(u: Unpickler) -> None:
        size = _number(u, width)
        if size > MAX_LONG:
            raise ValueError(f"an integer of {size} bytes")
        u.stack.append(int.from_bytes(u.take(size), "little", signed=True))

    return op


def _float(u: Unpickler) -> None:
    u.stack.append(struct.unpack(">d", u.take(8))[0])


def _text(width: int) -> Op:
    def op(u: Unpickler) -> None:
        start = u.pos + width
        end = start + int.from_bytes(u.data[u.pos : start], "little")
        if end > u.end:
            u.require(end - u.pos)
        u.pos = end
        u.stack.append(u.data[start:end].decode())

    return op


def _raw(width: int) -> Op:
    return lambda u: u.stack.append(u.take(_number(u, width)))


def _mutable_raw(u: Unpickler) -> None:
    u.stack.append(bytearray(u.take(_number(u, 8))))


def _string(width: int) -> Op:
    """A str of Python 2: text where it is ASCII, bytes where it is not."""

    def op(u: Unpickler) -> None:
        raw = u.take(_number(u, width))
        u.stack.append(raw.decode() if raw.isascii() else raw)

    return op


def _tuple1(u: Unpickler) -> None:
    u.stack[-1] = (u.stack[-1],)


def _tuple2(u: Unpickler) -> None:
    last = u.stack.pop()
    u.stack[-1] = (u.stack[-1], last)


def _tuple3(u: Unpickler) -> None:
    last, middle = u.stack.pop(), u.stack.pop()
    u.stack[-1] = (u.stack[-1], middle, last)


def _from_mark(kind: Callable[[Iterable[object]], object]) -> Op:
    def op(u: Unpickler) -> None:
        items = u.since_mark()
        u.stack.append(kind(items))

    return op


def _frozen(u: Unpickler) -> None:
    items = u.since_mark()
    u.stack.append(frozenset(map(key, items)))


def _dict(u: Unpickler) -> None:
    items, out = u.since_mark(), dict[object, object]()
    u.set_items(out, items)
    u.stack.append(out)


def _setitem(u: Unpickler) -> None:
    value, name = u.stack.pop(), u.stack.pop()
    u.set_items(u.stack[-1], [name, value])


def _setitems(u: Unpickler) -> None:
    items = u.since_mark()
    u.set_items(u.stack[-1], items)


def _append(u: Unpickler) -> None:
    item = u.stack.pop()
    u.append(u.stack[-1], [item])


def _appends(u: Unpickler) -> None:
    items = u.since_mark()
    u.append(u.stack[-1], items)


def _additems(u: Unpickler) -> None:
    items = u.since_mark()
    target = u.stack[-1]
    if not isinstance(target, set):
        raise ValueError(f"adds to a {type(target).__name__}")
    target.update(map(key, items))


def _global(u: Unpickler) -> None:
    names = []
    for _ in range(2):
        end = u.data.find(b"\n", u.pos, u.pos + 1024)
        if end < 0:
            u.take(1024)  # more bytes may bring the end of the line, but not beyond this
            raise ValueError("the name of a global does not end")
        names.append(u.data[u.pos : end].decode())
        u.pos = end + 1
    u.stack.append(u.find(*names))


def _stack_global(u: Unpickler) -> None:
    name, module = u.stack.pop(), u.stack.pop()
    u.stack.append(u.find(module, name))


def _reduce(u: Unpickler) -> None:
    args, callee = u.stack.pop(), u.stack.pop()
    u.stack.append(u.reduce(callee, args, new=False))


def _newobj(u: Unpickler) -> None:
    args, callee = u.stack.pop(), u.stack.pop()
    u.stack.append(u.reduce(callee, args, new=True))


def _newobj_ex(u: Unpickler) -> None:
    named = u.stack.pop()
    if named != {}:
        raise ValueError("makes an object with named arguments, which is not understood")
    _newobj(u)


def _build(u: Unpickler) -> None:
    state = u.stack.pop()
    u.build(u.stack[-1], state)


def _pop(u: Unpickler) -> None:
    if u.stack:
        u.stack.pop()
    else:
        u.since_mark()


def _pop_mark(u: Unpickler) -> None:
    u.since_mark()


def _dup(u: Unpickler) -> None:
    u.stack.append(u.stack[-1])


def _persistent_id(u: Unpickler) -> None:
    u.stack.append(u.persistent(u.stack.pop()))


def _refused(code: int) -> Op:
    def op(u: Unpickler) -> None:
        why = "runs registered code" if code in (0x82, 0x83, 0x84) else "is not one that torch writes"
        raise ValueError(f"opcode {code:#04x} {why}")

    return op


def _table() -> tuple[Op, ...]:
    known: dict[int | str, Op] = {
        0x80: _proto, ".": _stop, 0x95: _frame, "(": _mark, "0": _pop, "1": _pop_mark, "2": _dup, "N": _push(None),
        0x88: _push(True), 0x89: _push(False), ")": _push(()), "]": _make(list), "}": _make(dict), 0x8F: _make(set),
        "M": _natural(2), "J": _int, "G": _float, 0x8A: _long(1), 0x8B: _long(4),
        "X": _text(4), 0x8C: _text(1), 0x8D: _text(8), "B": _raw(4), "C": _raw(1), 0x8E: _raw(8), 0x96: _mutable_raw,
        "T": _string(4), "U": _string(1), 0x85: _tuple1, 0x86: _tuple2, 0x87: _tuple3, "t": _from_mark(tuple),
        "l": _from_mark(list), "d": _dict, 0x91: _frozen, "s": _setitem, "u": _setitems, "a": _append, "e": _appends,
        0x90: _additems, "c": _global, 0x93: _stack_global, "R": _reduce, 0x81: _newobj, 0x92: _newobj_ex, "b": _build,
        "Q": _persistent_id,
    }  # fmt: skip
    by_code = {ord(code) if isinstance(code, str) else code: op for code, op in known.items()}
    return tuple(by_code.get(code) or _refused(code) for code in range(256))


OPCODES = _table()
