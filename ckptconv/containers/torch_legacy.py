"""Reading torch files of before 1.6: five pickles in a row, then the storages, each behind its number of elements.

No checksums: damage to a name or a payload cannot be seen here; damage to the structure is.
"""

from __future__ import annotations

from ckptconv.containers.ranges import HeaderReader
from ckptconv.containers.torch_tensors import TORCH_CALLS, StorageId, Storages
from ckptconv.containers.unpickle import Truncated, Unpickler
from ckptconv.errors import FormatError
from ckptconv.source import Source

MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # protocol 2 of the long 0x1950a86a20f9469cfc6c
PROTOCOL = 1001
FIRST_READ = 1 << 20
MAX_HEAD = 1 << 28


class _Head:
    """The pickles, parsed once without knowing where the storages are: their offsets follow from what is found here."""

    def __init__(self, data: bytes, where: str) -> None:
        self.data, self.where = data, where
        self.told: dict[str, StorageId] = {}
        protocol, self.pos = self._next(len(MAGIC))
        if protocol != PROTOCOL:
            raise FormatError(where, f"an old torch file of protocol {protocol!r}; only {PROTOCOL} is known")
        system, self.object_at = self._next(self.pos)
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise FormatError(where, "the tensors are big-endian (or the file does not say), which is not supported")
        blind = Storages(self._note)
        _, keys_at = self._parse(self.object_at, blind)
        self.keys, self.end = self._next(keys_at)

    def _note(self, told: StorageId) -> Source:
        self.told[told.key] = told
        return Source("", 0, told.nbytes)

    def _next(self, pos: int) -> tuple[object, int]:
        return self._parse(pos, None)

    def _parse(self, pos: int, storages: Storages | None) -> tuple[object, int]:
        unpickler = Unpickler(self.data, self.where, TORCH_CALLS if storages else {}, storages, pos)
        return unpickler.load(), unpickler.pos

    def value(self, storages: Storages) -> object:
        return self._parse(self.object_at, storages)[0]


def read(reader: HeaderReader) -> tuple[object, tuple[str, ...]]:
    """The object, and the keys of storages that nothing in it refers to (there are none: each must be told of)."""
    head = _head(reader)
    sources = _sources(reader, head)
    return head.value(Storages(lambda told: sources[told.key])), ()


def _head(reader: HeaderReader) -> _Head:
    """Nothing says how long the pickles are, so a first part of the file is tried, then more of it."""
    size, n = reader.source.nbytes, FIRST_READ
    while True:
        n = min(n, size, MAX_HEAD)
        try:
            return _Head(reader.read(0, n, "the pickles"), reader.where)
        except Truncated:
            if n in (size, MAX_HEAD):
                raise
        n *= 4


def _sources(reader: HeaderReader, head: _Head) -> dict[str, Source]:
    """Where each storage lies: they stand in the order of the list of keys, and end with the file."""
    where, keys = reader.where, head.keys
    if not isinstance(keys, list) or not all(isinstance(k, str) for k in keys):
        raise FormatError(where, "its list of storages is damaged")
    if len(set(keys)) != len(keys) or set(keys) != set(head.told):
        raise FormatError(where, "its list of storages is not that of the storages its tensors refer to")
    at, out = head.end, {}
    for key in keys:
        told = head.told[key]
        numel = int.from_bytes(reader.read(at, 8, f"the size of storage {key}"), "little")
        if numel != told.numel:
            raise FormatError(f"{where}!{key}", f"the storage has {numel} elements, the pickle says {told.numel}")
        at += 8
        if at + told.nbytes > reader.source.nbytes:
            raise FormatError(
                f"{where}!{key}", f"the storage of {told.nbytes} bytes runs past the end of the file (truncated)"
            )
        out[key] = reader.source.inside(at, told.nbytes)
        at += told.nbytes
    if at != reader.source.nbytes:
        raise FormatError(where, f"has {reader.source.nbytes - at} bytes after the last storage")
    return out
