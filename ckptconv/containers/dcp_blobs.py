"""The blobs of a .distcp file: each a whole torch file of one tensor, somewhere in the middle, its bytes found without reading them.

A checkpoint has tens of thousands of blobs and few shapes. The first blob of a shape is parsed like any torch file; after
that a blob whose every byte outside the data is the same, checksums apart, needs no parsing to be known to be as good.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import replace
from itertools import groupby, pairwise
from typing import NamedTuple

from ckptconv.containers import torch_file
from ckptconv.containers.ranges import HeaderReader, locate
from ckptconv.containers.zipdir import Archive, Record, open_archive
from ckptconv.dtypes import DType
from ckptconv.errors import FormatError
from ckptconv.nodes import View
from ckptconv.source import Source
from ckptconv.tensor import Shape, Tensor

MAX_EDGES = 1 << 16  # bytes before and after the data that are worth keeping for comparison
SERIAL = "/.data/serialization_id"  # made from all checksums, so it differs like them


class Blob(NamedTuple):
    """A byte range and the tensor that must be in it; `key` is for messages."""

    item: Source
    dtype: DType
    shape: Shape
    key: str


class _Free(NamedTuple):
    """Bytes in which blobs may differ: those of a small record, and where the CRC32 of a record stands (if there is one)."""

    content: tuple[int, int] | None
    crc_at: tuple[int, ...]


class _Pattern(NamedTuple):
    """A blob that was parsed: its tensor, relative to it, and what another must have in common with it."""

    tensor: View
    head: int  # bytes before the data
    tail: int  # where the bytes after the data begin
    fixed: tuple[tuple[int, int, bytes], ...]
    free: tuple[_Free, ...]

    def fits(self, edges: bytes) -> bool:
        """Whether head and tail of another blob, put together, say the same of it and keep their checksums."""
        if any(edges[start:stop] != content for start, stop, content in self.fixed):
            return False
        for content, places in self.free:
            crcs = {edges[at : at + 4] for at in places}
            if len(crcs) > 1:
                return False
            if content and crcs and crcs != {zlib.crc32(edges[slice(*content)]).to_bytes(4, "little")}:
                return False
        return True


def where_is(item: Source) -> str:
    """How messages name a blob."""
    return f"{item.path}!{item.offset}+{item.nbytes}"


def tensors(blobs: Iterable[Blob], problems: list[str], *, check: bool = False) -> dict[Source, Tensor]:
    """The tensor of each blob by its byte range; what is wrong with a blob goes into `problems`.

    Files are opened once each and read from front to back. `check` reads the data too, to verify every checksum.
    """
    out: dict[Source, Tensor] = {}
    patterns: dict[tuple[int, DType, Shape], _Pattern | None] = {}
    in_order = sorted(blobs, key=lambda b: b.item)
    for path, inside in groupby(in_order, key=lambda b: b.item.path):
        with HeaderReader(locate(path), path) as reader:
            for blob in inside:
                kind = (blob.item.nbytes, blob.dtype, blob.shape)
                pattern = patterns.get(kind)
                if pattern and not check and pattern.fits(_edges(reader, blob.item, pattern)):
                    out[blob.item] = _moved(pattern.tensor, blob.item)
                    continue
                try:
                    tensor = out[blob.item] = _parsed(blob, check)
                except FormatError as error:
                    problems.append(f"{error} ({blob.key})")
                    continue
                if pattern or kind not in patterns:  # else it was tried in vain
                    patterns[kind] = _pattern(blob.item, tensor)
    return out


def _parsed(blob: Blob, check: bool) -> Tensor:
    """The tensor of a blob, read as the torch file it is."""
    where = where_is(blob.item)
    found = torch_file.inspect(blob.item, check=check, where=where)
    value = found.value
    if not isinstance(value, Tensor):
        raise FormatError(where, f"holds {value!r:.80}, not a tensor")
    if (value.shape, value.dtype) != (blob.shape, blob.dtype):
        problem = f"holds {value.dtype} of shape {value.shape}, .metadata says {blob.dtype} of shape {blob.shape}"
        raise FormatError(where, problem)
    if found.unused:
        raise FormatError(where, f"holds {len(found.unused)} storages that are not the tensor's: {found.unused[0]}")
    return value


def _moved(tensor: View, item: Source) -> Tensor:
    source = tensor.source
    return replace(tensor, source=Source(item.path, item.offset + source.offset, source.nbytes))


def _edges(reader: HeaderReader, item: Source, pattern: _Pattern) -> bytes:
    head = reader.read(item.offset, pattern.head, "a blob")
    return head + reader.read(item.offset + pattern.tail, item.nbytes - pattern.tail, "the end of a blob")


def _pattern(item: Source, tensor: Tensor) -> _Pattern | None:
    """What other blobs must have in common with this one; nothing where that is not simply told."""
    if not isinstance(tensor, View):
        return None
    with HeaderReader(locate(item), where_is(item)) as reader:
        archive = open_archive(reader)
        body = tensor.source
        head, tail = body.offset - item.offset, body.offset - item.offset + body.nbytes
        if head + item.nbytes - tail > MAX_EDGES:
            return None
        free = [
            _free(record, archive, head, body.nbytes)
            for record in archive.records.values()
            if record.source == body or record.name.endswith(SERIAL)
        ]
        edges = reader.read(0, head, "a blob") + reader.read(tail, item.nbytes - tail, "the end of a blob")
    holes = sorted([(at, at + 4) for f in free for at in f.crc_at] + [f.content for f in free if f.content])
    borders = [0, *(n for hole in holes for n in hole), len(edges)]
    fixed = tuple((lo, hi, edges[lo:hi]) for lo, hi in list(pairwise(borders))[::2])
    local = replace(tensor, source=Source("", head, body.nbytes))
    return _Pattern(local, head, tail, fixed, tuple(free))


def _free(record: Record, archive: Archive, head: int, nbytes: int) -> _Free:
    """Places are counted in the edges, where the data is left out."""

    def outside(at: int) -> int:
        return at if at < head else at - nbytes

    start = outside(record.source.offset - archive.source.offset)
    own = (start, start + record.source.nbytes) if record.name.endswith(SERIAL) else None
    return _Free(own, tuple(outside(at) for at in record.crc_at) if archive.checksums else ())
