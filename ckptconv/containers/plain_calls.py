"""Calls in pickles that only make plain data (OrderedDict, sets, bytes): done here, by hand, at a bounded cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ckptconv.containers.pickled import Global, Namespace, Opaque, Ordered, key

if TYPE_CHECKING:
    from ckptconv.containers.unpickle import Unpickler

Args = tuple[object, ...]
Call = Callable[["Unpickler", Args], object]


def _ordered(u: Unpickler, args: Args) -> object:
    out: Ordered[object, object] = Ordered()
    if args:
        (pairs,) = args
        if not isinstance(pairs, list):
            raise ValueError("an OrderedDict is not made of a list")
        u.charge(len(pairs))
        for name, value in pairs:
            out[key(name)] = value
    return out


def _namespace(u: Unpickler, args: Args) -> object:
    if args:
        raise ValueError("an argparse.Namespace takes no arguments")
    return Namespace()


def _encode(u: Unpickler, args: Args) -> object:
    """Bytes as protocol 2 spells them: text, then "latin1"."""
    text, codec = args
    if not isinstance(text, str) or codec not in ("latin1", "latin-1"):
        raise ValueError("_codecs.encode is not used to spell bytes")
    u.charge(len(text))
    return text.encode("latin-1")


def _set(u: Unpickler, args: Args) -> object:
    (items,) = args or ([],)
    if not isinstance(items, list):
        raise ValueError("a set is not made of a list")
    u.charge(len(items))
    return {key(item) for item in items}


def _frozenset(u: Unpickler, args: Args) -> object:
    made = _set(u, args)
    assert isinstance(made, set)
    return frozenset(made)


def _bytes(u: Unpickler, args: Args) -> object:
    if args:
        raise ValueError("bytes are not spelled so")
    return b""


def _bytearray(u: Unpickler, args: Args) -> object:
    if len(args) == 1 and isinstance(args[0], bytes):
        u.charge(len(args[0]))
        return bytearray(args[0])
    made = _encode(u, args) if args else b""
    assert isinstance(made, bytes)
    return bytearray(made)


def _getattr(u: Unpickler, args: Args) -> object:
    """A member of a class by name, as some Python versions pickle an enum."""
    owner, name = args
    if not isinstance(owner, Global) or not isinstance(name, str) or not name.isidentifier():
        raise ValueError("getattr is not used to name a member of a class")
    u.find(owner.module, f"{owner.name}.{name}")  # refuses what a dotted name would
    return Opaque("builtins", "getattr", args)


PLAIN_CALLS: Mapping[Global, Call] = {
    Global("collections", "OrderedDict"): _ordered,
    Global("argparse", "Namespace"): _namespace,
    Global("_codecs", "encode"): _encode,
    **{
        Global(module, name): call
        for module in ("builtins", "__builtin__")
        for name, call in (
            ("set", _set),
            ("frozenset", _frozenset),
            ("bytes", _bytes),
            ("bytearray", _bytearray),
            ("getattr", _getattr),
        )
    },
}
