"""Reading a torch distributed checkpoint: a folder of `.metadata` and .distcp files, as Megatron-Core and torch write it.

`read` opens `.metadata` alone and holds it against the sizes of the files; `interpret` does so with files that lie
elsewhere, such as in an archive. `tensors` and `value` then open blobs.
Byte layout: docs/formats/torch_dist.md.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from ckptconv.assemble import Box, assemble
from ckptconv.collecting import no_collecting
from ckptconv.containers import dcp_blobs, dcp_tiling, torch_file
from ckptconv.containers.dcp_metadata import MAX_SIZE, NAME, Metadata, Piece, Place, Told, read_metadata
from ckptconv.containers.folder import listed, located
from ckptconv.containers.problems import fail
from ckptconv.dtypes import BY_TORCH, DType
from ckptconv.errors import FormatError
from ckptconv.leaves import full
from ckptconv.source import Source
from ckptconv.tensor import Shape, Tensor

SUFFIX = ".distcp"
MISSING = -1  # stands for the size of a file that is named and not there

Item = Source  # the bytes of one blob: what torch.save wrote
Files = Mapping[str, Source]


class Chunk(NamedTuple):
    """A box of a tensor, and the blob that holds it."""

    offset: Shape
    shape: Shape
    item: Item


class Entry(NamedTuple):
    """A tensor; its chunks, by offset, tile it."""

    dtype: DType
    shape: Shape
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class Dcp:
    """What a set of named files holds. Nothing in it contradicts `.metadata`, as far as can be told without opening a blob.

    `reformulated`: the shapes that tensors had before Megatron-Core (up to 0.15) flattened them; such a tensor's entry
    has one more axis. `unused`: bytes of .distcp files that `.metadata` does not speak of.
    """

    where: str
    tensors: dict[str, Entry]
    objects: dict[str, Item]
    reformulated: dict[str, Shape]
    unused: tuple[Source, ...]


def read(folder: Path) -> Dcp:
    """The checkpoint in a folder. All that is wrong with it is listed in one error."""
    problems: list[str] = []
    return _sound(*_interpret(str(folder), _files(folder, problems), problems))


def examine(folder: Path) -> tuple[Dcp, list[str]]:
    """What is sound in a folder, and all that is wrong with the rest."""
    problems: list[str] = []
    return _interpret(str(folder), _files(folder, problems), problems)


def interpret(where: str, files: Files) -> Dcp:
    """The checkpoint that files with these names make, be they of a folder or an archive; errors as of `read`."""
    return _sound(*_interpret(where, files, []))


def _sound(found: Dcp, problems: list[str]) -> Dcp:
    fail(f"{found.where}/{NAME}", problems)
    return found


def _interpret(where: str, files: Files, problems: list[str]) -> tuple[Dcp, list[str]]:
    """What is sound; what is wrong is added to `problems`."""
    name = f"{where}/{NAME}"
    if NAME not in files:
        raise FormatError(name, "is missing: not a torch distributed checkpoint, or one whose save did not finish")
    with no_collecting():
        told = read_metadata(files[NAME], name)
        files = _chunk_files(where, files, told)
        ranges = _ranges(told)
        problems += told.problems
        problems += _wrong_ranges(files, ranges)
        problems += [f"{key}: has bytes stored, but is not described" for key in told.places if key not in told.keys]
        objects = {key: item for key in told.objects if (item := _object(files, told, key, problems))}
        tensors = {
            key: entry for key, value in told.tensors.items() if (entry := _entry(files, told, key, value, problems))
        }
    return Dcp(where, tensors, objects, told.reformulated, tuple(_unused(files, ranges))), problems


def tensors(dcp: Dcp, keys: Collection[str] | None = None, *, check: bool = False) -> dict[str, Tensor]:
    """Lazy tensors by key, all or those named. The headers of their blobs are read and checked, the data with `check` alone."""
    entries = {key: dcp.tensors[key] for key in (dcp.tensors if keys is None else keys)}
    wanted = (
        dcp_blobs.Blob(chunk.item, entry.dtype, chunk.shape, key)
        for key, entry in entries.items()
        for chunk in entry.chunks
    )
    problems: list[str] = []
    with no_collecting():
        found = dcp_blobs.tensors(wanted, problems, check=check)
        fail(dcp.where, problems)
        return {key: _assembled(entry, found) for key, entry in entries.items()}


def value(item: Item, *, check: bool = False) -> object:
    """The object in a blob, just as it was given to torch.save: Megatron-Core wraps each in a list of one. `check` verifies
    the checksums of what it holds.
    """
    return torch_file.read(item, check=check, where=dcp_blobs.where_is(item))


def _assembled(entry: Entry, found: dict[Source, Tensor]) -> Tensor:
    if 0 in entry.shape:  # there may be no chunk, or many that are empty
        return full(entry.shape, entry.dtype, 0)
    return assemble(entry.shape, [(chunk.offset, found[chunk.item]) for chunk in entry.chunks])


def _object(files: Files, told: Metadata, key: str, problems: list[str]) -> Item | None:
    places = told.places.get(key, [])
    if len(places) == 1 and places[0].offset is None:
        return _item(files, places[0])
    found = f"in {len(places)} places" if len(places) > 1 else "as a chunk of a tensor" if places else "nowhere"
    problems.append(f"{key}: is an object, yet stored {found}")
    return None


def _entry(files: Files, told: Metadata, key: str, value: Told, problems: list[str]) -> Entry | None:
    """A tensor, its pieces held against its shape and matched with their places."""
    dtype = BY_TORCH.get(value.dtype)
    wrong = [] if dtype else [f"is of type torch.{value.dtype}, which is not supported"]
    if math.prod(value.shape) > MAX_SIZE // 8:
        wrong.append(f"has shape {value.shape}, which overflows")
    pieces = sorted(value.pieces)
    wrong += dcp_tiling.problems(value.shape, [_box(p) for p in pieces])
    places = sorted(told.places.get(key, []), key=lambda p: (p.offset is not None, p.offset or ()))
    wrong += _unmatched([p.offset for p in pieces], [p.offset for p in places])
    problems += [f"{key}: {problem}" for problem in wrong]
    if wrong or dtype is None:
        return None
    matched = zip(pieces, places, strict=True)
    return Entry(dtype, value.shape, tuple(Chunk(*piece, _item(files, place)) for piece, place in matched))


def _unmatched(described: Sequence[Shape], stored: Sequence[Shape | None]) -> list[str]:
    """Chunks without bytes and bytes without chunk, both lists being sorted (no hashing: offsets may be crafted)."""
    if described == stored:
        return []
    wrong, left = [], list(reversed(stored))
    for offset in described:
        while left and (left[-1] is None or left[-1] < offset):
            wrong.append(f"has bytes at offset {_offset(left.pop())}, where no chunk is described")
        if left and left[-1] == offset:
            left.pop()
        else:
            wrong.append(f"has no bytes for its chunk at offset {_offset(offset)}")
    return wrong + [f"has bytes at offset {_offset(o)}, where no chunk is described" for o in reversed(left)]


def _offset(offset: Shape | None) -> str:
    return "none (as an object)" if offset is None else str(list(offset))


def _box(piece: Piece) -> Box:
    return tuple((o, o + n) for o, n in zip(piece.offset, piece.shape, strict=True))


def _item(files: Files, place: Place) -> Item:
    return files[place.file].inside(place.start, place.nbytes)


# -- files ------------------------------------------------------------------------------------------------------------


def _files(folder: Path, problems: list[str]) -> Files:
    """The regular files of a folder; of `.metadata`, if there is one, it is an error to be anything else."""
    if not (folder / NAME).exists():
        return {}
    found = {NAME: located(folder, NAME)}
    for item in listed(folder):
        try:
            if item.is_file():
                found[item.name] = located(folder, item.name)
        except (OSError, FormatError) as error:
            problems.append(str(error))
    return found


def _chunk_files(where: str, files: Files, told: Metadata) -> Files:
    """Each file that is named or has the suffix. One that is not there has the size MISSING."""
    names = {place.file for places in told.places.values() for place in places}
    names |= {name for name in files if name.endswith(SUFFIX)}
    return {name: files.get(name) or Source(f"{where}/{name}", 0, MISSING) for name in sorted(names)}


def _ranges(told: Metadata) -> dict[str, list[tuple[int, int, str]]]:
    """What lies in each file, from front to back: (start, stop, key)."""
    by_file: dict[str, list[tuple[int, int, str]]] = {}
    for key, places in told.places.items():
        for place in places:
            by_file.setdefault(place.file, []).append((place.start, place.start + place.nbytes, key))
    return {name: sorted(ranges) for name, ranges in sorted(by_file.items())}


def _wrong_ranges(files: Files, ranges: dict[str, list[tuple[int, int, str]]]) -> list[str]:
    problems = []
    for name, inside in ranges.items():
        size = files[name].nbytes
        if size == MISSING:
            keys = ", ".join(dict.fromkeys(key for _, _, key in inside[:3]))
            problems.append(f"{name}: is missing or not a regular file; {len(inside)} chunks lie in it, such as {keys}")
            continue
        for start, stop, key in inside:
            if start < 0 or stop <= start or stop > size:
                problems.append(f"{key}: lies at {start}..{stop} of {name}, which has {size} bytes (truncated?)")
        for (_, end, first), (start, _, second) in pairwise(inside):
            if start < end:
                problems.append(f"{first} and {second}: share bytes {start}..{end} of {name}")
    return problems


def _unused(files: Files, ranges: dict[str, list[tuple[int, int, str]]]) -> list[Source]:
    out = []
    for name, file in files.items():
        at = 0
        for start, stop, _ in [*ranges.get(name, []), (max(file.nbytes, 0), 0, "")]:
            if start > at:
                out.append(file.inside(at, start - at))
            at = stop
    return out
