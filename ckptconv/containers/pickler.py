"""A data-only pickler, protocol 2: plain data, inert values and lazy tensors become the bytes torch.load understands.

Deterministic: the same object gives the same bytes in every process. No object is asked how to be pickled.
"""

from __future__ import annotations

import operator
import struct
from collections.abc import Callable, Collection
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

from ckptconv.containers.pickled import (
    MAX_DEPTH,
    Global,
    Known,
    Namespace,
    Opaque,
    Ordered,
    Storage,
    TorchDType,
    may_write,
)
from ckptconv.dtypes import UINT8, DType
from ckptconv.errors import FormatError
from ckptconv.leaves import contiguous
from ckptconv.tensor import Shape, Tensor

_MARK, _STOP, _REDUCE, _NEWOBJ, _BUILD, _TUPLE, _PERSID = b"(", b".", b"R", b"\x81", b"b", b"t", b"Q"
_TUPLES = {1: b"\x85", 2: b"\x86", 3: b"\x87"}


class Body(NamedTuple):
    """A storage the pickle refers to by its place in the list: where in the object it was met, and its content."""

    path: str
    tensor: Tensor


class Pickler:
    """One pickle. `bodies` is filled with the storages in the order of their keys, "0", "1", …"""

    def __init__(self, where: str, allowed: Collection[str] = ()) -> None:
        self.where, self.allowed = where, allowed
        self.out: list[bytes] = []
        self.bodies: list[Body] = []
        self.memo: dict[int, bytes] = {}  # by the id of a shared object: how to get it again
        self.kept: list[object] = []  # values made here: the memo goes by id, so they must not die before it
        self.texts: dict[object, bytes] = {}  # strings and globals, by value
        self.alike: dict[tuple[DType, Shape], tuple[bytes, bytes]] = {}  # what stands around the key of such a tensor
        self.count = 0
        self.depth = 0

    def dump(self, value: object) -> bytes:
        self.out.append(b"\x80\x02")
        self.save(value, "")
        self.out.append(_STOP)
        return b"".join(self.out)

    def save(self, value: object, path: str) -> None:
        got = self.memo.get(id(value))
        if got is not None:
            self.out.append(got)
            return
        save = _SAVERS.get(type(value))
        if save is None:
            if not isinstance(value, Tensor):
                kind = f"{type(value).__module__}.{type(value).__qualname__}"
                raise FormatError(
                    self.where, f"{path or 'the object'} is a {kind}, which cannot be written as plain data"
                )
            save = Pickler._tensor
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise FormatError(self.where, f"{path[:200]} is nested deeper than {MAX_DEPTH}, or contains itself")
        save(self, value, path)
        self.depth -= 1

    def _remember(self) -> bytes:
        """Put what is on the stack into the memo; how to get it from there again."""
        n = self.count
        self.count = n + 1
        self.out.append(b"q%c" % n if n < 256 else b"r" + n.to_bytes(4, "little"))
        return b"h%c" % n if n < 256 else b"j" + n.to_bytes(4, "little")

    def _shared(self, value: object) -> None:
        self.memo[id(value)] = self._remember()

    def _none(self, value: None, path: str) -> None:
        self.out.append(b"N")

    def _bool(self, value: bool, path: str) -> None:
        self.out.append(b"\x88" if value else b"\x89")

    def _int(self, value: int, path: str) -> None:
        self.out.append(_int(value))

    def _float(self, value: float, path: str) -> None:
        self.out.append(b"G" + struct.pack(">d", value))

    def _str(self, value: str, path: str = "") -> None:
        got = self.texts.get(value)
        if got is None:
            try:
                raw = value.encode()
            except UnicodeEncodeError:
                raise FormatError(self.where, f"{path} is text that UTF-8 cannot spell") from None
            self.out += (b"X", len(raw).to_bytes(4, "little"), raw)
            self.texts[value] = self._remember()
        else:
            self.out.append(got)

    def _bytes(self, value: bytes, path: str) -> None:
        """As Python does at protocol 2, which has no bytes: text, encoded when it is loaded."""
        self.global_(Global("_codecs", "encode"))
        self._str(value.decode("latin-1"), path)
        self._str("latin1")
        self.out.append(b"\x86" + _REDUCE)
        self._shared(value)

    def _bytearray(self, value: bytearray, path: str) -> None:
        self.global_(Global("__builtin__", "bytearray"))
        self.kept.append(content := bytes(value))
        self._bytes(content, path)
        self.out.append(b"\x85" + _REDUCE)
        self._shared(value)

    def _tuple(self, value: tuple[object, ...], path: str) -> None:
        if not value:
            self.out.append(b")")
            return
        if len(value) > 3:
            self.out.append(_MARK)
        for i, item in enumerate(value):
            self.save(item, f"{path}/{i}")
        self.out.append(_TUPLES.get(len(value), _TUPLE))
        self._shared(value)

    def _list(self, value: list[object], path: str) -> None:
        self.out.append(b"]")
        self._shared(value)
        self._items(value, path)

    def _items(self, items: list[object], path: str) -> None:
        if items:
            self.out.append(_MARK)
            for i, item in enumerate(items):
                self.save(item, f"{path}/{i}")
            self.out.append(b"e")

    def _dict(self, value: dict[object, object], path: str) -> None:
        self.out.append(b"}")
        self._shared(value)
        self._pairs(value.items(), path)

    def _pairs(self, pairs: Collection[tuple[object, object]], path: str) -> None:
        if pairs:
            self.out.append(_MARK)
            for name, item in pairs:
                at = f"{path}/{name}" if path else str(name)
                if type(name) is str:  # most: they need no looking up by id
                    self._str(name, at)
                else:
                    self.save(name, at)
                self.save(item, at)
            self.out.append(b"u")

    def _ordered(self, value: Ordered[object, object], path: str) -> None:
        self.global_(_ORDERED)
        self.out.append(b")" + _REDUCE)
        self._shared(value)
        self._pairs(value.items(), path)
        if value.attributes:
            self.save(value.attributes, f"{path}/")
            self.out.append(_BUILD)

    def _set(self, value: set[object] | frozenset[object], path: str) -> None:
        """In the order of their texts: a set's own order differs between processes."""
        self.global_(Global("__builtin__", type(value).__name__))
        self.kept.append(items := sorted(value, key=repr))
        self.save(items, path)
        self.out.append(b"\x85" + _REDUCE)
        self._shared(value)

    def _namespace(self, value: Namespace, path: str) -> None:
        self.global_(Global("argparse", "Namespace"))
        self.out.append(b")" + _NEWOBJ)
        self._shared(value)
        self.save(value.__dict__, path)
        self.out.append(_BUILD)

    def _opaque(self, value: Opaque, path: str) -> None:
        self._checked_global(value.module, value.name, path)
        self.save(value.args, path)
        self.out.append(_NEWOBJ if value.new else _REDUCE)
        self._shared(value)
        self._items(value.items, path)
        self._pairs(value.pairs, path)
        if value.state is not None:
            self.save(value.state, path)
            self.out.append(_BUILD)

    def _known(self, value: Known, path: str) -> None:
        if value.cls in self.texts:
            self.global_(value.cls)
        else:
            self._checked_global(value.cls.module, value.cls.name, path)
        self.out.append(b")" + _NEWOBJ)
        self._shared(value)
        if value.state is not None:
            self.save(value.state, path)
            self.out.append(_BUILD)

    def _torch_dtype(self, value: TorchDType, path: str) -> None:
        self.global_(Global("torch", value.name))

    def _named(self, value: Global, path: str) -> None:
        self._checked_global(value.module, value.name, path)

    def _checked_global(self, module: str, name: str, path: str) -> None:
        if not may_write(module, name, self.allowed):
            problem = (
                f"{path or 'the object'} names {module}.{name}, which is not known to be harmless when it is loaded"
            )
            raise FormatError(self.where, f"{problem}; drop it or allow it by name")
        self.global_(Global(module, name))

    def global_(self, value: Global) -> None:
        got = self.texts.get(value)
        if got is None:
            self.out.append(f"c{value.module}\n{value.name}\n".encode("ascii"))
            self.texts[value] = self._remember()
        else:
            self.out.append(got)

    def _tensor(self, value: Any, path: str) -> None:
        """As any other of its dtype and shape but for the key, once all that they share is in the memo."""
        kind = (value.dtype, value.shape)
        if (around := self.alike.get(kind)) is not None:
            self.out += (around[0], self._key(path, value), around[1])
        else:
            start, count = len(self.out), self.count
            key = self._rebuilt(value, path)
            if self.count == count:
                self.alike[kind] = b"".join(self.out[start:key]), b"".join(self.out[key + 1 :])
        self._shared(value)

    def _rebuilt(self, value: Tensor, path: str) -> int:
        """`_rebuild_tensor_v2` (v3 for types without a storage class) of a row-major storage of the tensor's own.

        Returns where in `out` the storage's key stands.
        """
        typed = value.dtype.storage and not value.dtype.name.startswith("fp8")
        self.global_(_REBUILD_V2 if typed else _REBUILD_V3)
        self.out.append(_MARK)
        key = self._persistent(path, value, value.dtype if typed else None)
        self.out += (b"K\0", _geometry(value.shape), b"\x89")
        self.global_(_ORDERED)
        self.out.append(b")" + _REDUCE)
        if not typed:
            self.global_(Global("torch", value.dtype.torch))
        self.out.append(_TUPLE + _REDUCE)
        return key

    def _storage(self, value: Storage, path: str) -> None:
        dtype = value.dtype or UINT8
        self._persistent(path, contiguous(value.source, (value.source.nbytes // dtype.itemsize,), dtype), value.dtype)
        self._shared(value)

    def _persistent(self, path: str, body: Tensor, dtype: DType | None) -> int:
        """A storage's persistent id; returns where in `out` its key stands."""
        name = Global("torch", dtype.storage) if dtype else Global("torch.storage", "UntypedStorage")
        numel = body.nbytes // dtype.itemsize if dtype else body.nbytes
        self.out.append(_MARK)
        self._str("storage")
        self.global_(name)
        key = len(self.out)
        self.out.append(self._key(path, body))
        self._str("cpu")
        self.out.append(_int(numel) + _TUPLE + _PERSID)
        return key

    def _key(self, path: str, body: Tensor) -> bytes:
        """The next storage's key."""
        key = b"%d" % len(self.bodies)
        self.bodies.append(Body(path, body))
        return b"X" + len(key).to_bytes(4, "little") + key


def _int(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K%c" % value
    if 0 <= value < 65536:
        return b"M" + value.to_bytes(2, "little")
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + value.to_bytes(4, "little", signed=True)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return (b"\x8a%c" % len(raw) if len(raw) < 256 else b"\x8b" + len(raw).to_bytes(4, "little")) + raw


def _ints(values: tuple[int, ...]) -> bytes:
    """A tuple of numbers, without a memo entry: nobody asks whether two shapes are one object."""
    body = b"".join(map(_int, values))
    if not values:
        return b")"
    return body + _TUPLES[len(values)] if len(values) <= 3 else _MARK + body + _TUPLE


@lru_cache
def _geometry(shape: Shape) -> bytes:
    """A shape and its row-major strides, counted in elements."""
    strides = accumulate(reversed(shape[1:]), operator.mul, initial=1)
    return _ints(shape) + _ints(tuple(strides)[::-1][: len(shape)])


_ORDERED = Global("collections", "OrderedDict")
_REBUILD_V2, _REBUILD_V3 = Global("torch._utils", "_rebuild_tensor_v2"), Global("torch._utils", "_rebuild_tensor_v3")

_SAVERS: dict[type, Callable[..., None]] = {
    type(None): Pickler._none, bool: Pickler._bool, int: Pickler._int, float: Pickler._float, str: Pickler._str,
    bytes: Pickler._bytes, bytearray: Pickler._bytearray, tuple: Pickler._tuple, list: Pickler._list,
    dict: Pickler._dict, Ordered: Pickler._ordered, set: Pickler._set, frozenset: Pickler._set,
    Namespace: Pickler._namespace, Opaque: Pickler._opaque, Known: Pickler._known, TorchDType: Pickler._torch_dtype,
    Global: Pickler._named, Storage: Pickler._storage,
}  # fmt: skip
