"""Folders of zarr v2 arrays, as Megatron-Core up to 0.15 wrote them: one folder per tensor, its chunks as files.

Objects lie among them as `<key>/shard_<index>_<of>.pt`. Only `.zarray` files are read here; of all others, names and sizes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Literal

import numpy as np

from ckptconv import coding
from ckptconv.assemble import Part, assemble
from ckptconv.containers import zarr2_header
from ckptconv.containers.folder import listed, located
from ckptconv.containers.zarr2_header import HEADER, Header
from ckptconv.dtypes import DType
from ckptconv.errors import FormatError
from ckptconv.leaves import view
from ckptconv.nodes import Fill
from ckptconv.source import Source
from ckptconv.tensor import Shape, Tensor

ATTRIBUTES = ".zattrs"  # of an array: says nothing of its values
LOCKS = ".sync"
SHOWN = 1000
_INDEX = re.compile(r"\d{1,19}(?:[./]\d{1,19})*", re.ASCII)
_OBJECT = re.compile(r"shard_[\d.]+(?:_[\d.]+)?\.pt", re.ASCII)


@dataclass(frozen=True, slots=True)
class Entry:
    """One array: its header, and the file of each chunk that is there, by the chunk's place in the grid."""

    header: Header
    present: dict[Shape, Source]

    @property
    def dtype(self) -> DType:
        return self.header.dtype

    @property
    def shape(self) -> Shape:
        return self.header.shape

    @property
    def chunks(self) -> Shape:
        """The shape of a chunk."""
        return self.header.chunks

    @property
    def missing(self) -> int:
        """How many chunks are not there."""
        return math.prod(self.header.grid) - len(self.present)

    def missing_names(self, most: int) -> list[str]:
        grid = self.header.grid  # perhaps an endless one: never listed
        every = (tuple(map(int, np.unravel_index(i, grid))) for i in range(math.prod(grid)))
        return [self.header.name_of(index) for index in islice((i for i in every if i not in self.present), most)]


@dataclass(frozen=True, slots=True)
class Zarr:
    """Arrays by key, objects by key (`<key>/shard_0_4`), and the files beside their folders (`common.pt`)."""

    where: str
    tensors: dict[str, Entry]
    objects: dict[str, Source]
    others: dict[str, Source]


def read(folder: Path) -> Zarr:
    """What a folder holds; all that is wrong with it is in one FormatError."""
    return _sound(*examine(folder))


def examine(folder: Path) -> tuple[Zarr, list[str]]:
    """What is sound in a folder, and all that is wrong with the rest."""
    problems: list[str] = []
    files = dict(_walk(folder, "", problems))
    return _interpret(str(folder), files, problems)


def interpret(where: str, files: Mapping[str, Source]) -> Zarr:
    """What files with these names make, be they of a folder or an archive; all that is wrong is in one FormatError."""
    return _sound(*_interpret(where, files, []))


def _sound(zarr: Zarr, problems: list[str]) -> Zarr:
    if problems:
        raise FormatError(zarr.where, _listed("is no sound folder of zarr arrays", problems))
    return zarr


def _interpret(where: str, files: Mapping[str, Source], problems: list[str]) -> tuple[Zarr, list[str]]:
    folders: dict[str, dict[str, Source]] = {}
    others: dict[str, Source] = {}
    for path, source in files.items():
        key, inside, name = path.partition("/")
        if inside:
            folders.setdefault(key, {})[name] = source
        else:
            others[key] = source
    tensors: dict[str, Entry] = {}
    objects: dict[str, Source] = {}
    for key, held in folders.items():
        try:
            if _is_locks(key, held, folders):
                continue
            if HEADER in held:
                tensors[key] = _entry(held, f"{where}/{key}", problems)
            else:
                objects |= _objects(key, held)
        except FormatError as error:
            problems.append(str(error))
    return Zarr(where, tensors, objects, others), problems


def tensors(
    zarr: Zarr, keys: Collection[str] | None = None, *, missing: Literal["fill", "zero"] = "fill"
) -> dict[str, Tensor]:
    """Every array, or those named, as a lazy tensor.

    A chunk that is not there is the fill value; where there is none either, it is an error, or 0 if that is wished.
    """
    entries = {key: zarr.tensors[key] for key in (zarr.tensors if keys is None else keys)}
    lost = [
        f"{key}: {entry.missing:,} of {math.prod(entry.header.grid):,} chunks are not there "
        f"({', '.join(entry.missing_names(3))}{', …' if entry.missing > 3 else ''}) and no fill_value stands for them"
        for key, entry in entries.items()
        if entry.missing and entry.header.fill is None and missing != "zero"
    ]
    if lost:
        advice = "was the checkpoint copied whole? To take zeros for them: --loader.zarr-missing zero"
        raise FormatError(zarr.where, f"{_listed('lacks values', lost)}\n{advice}")
    if any(entry.header.codec for entry in entries.values()):
        coding.require()
    return {key: _tensor(entry) for key, entry in entries.items()}


def _tensor(entry: Entry) -> Tensor:
    hole = Fill(entry.shape, entry.dtype, entry.header.fill or 0)
    return assemble(entry.shape, list(_parts(entry, hole, (), sorted(entry.present)))) if entry.present else hole


def _parts(entry: Entry, hole: Tensor, prefix: Shape, chunks: list[Shape]) -> Iterator[Part]:
    """The chunks whose place begins with `prefix`; `hole` is that part of the array as if none were there.

    Holes are as large as can be: a header may tell of more chunks than can be counted.
    """
    axis = len(prefix)
    if axis == len(entry.shape):
        yield entry.header.start(prefix), _chunk(entry, prefix)
        return
    rest = (0,) * (len(entry.shape) - axis - 1)

    def slab(lo: int, hi: int) -> Tensor:
        size = entry.chunks[axis]
        return hole.narrow(axis, lo * size, min(hi * size, entry.shape[axis]))

    at, end = 0, entry.header.grid[axis]
    there = {i: list(inner) for i, inner in groupby(chunks, lambda chunk: chunk[axis])}
    for i in (*there, end):
        if at < i:
            yield entry.header.start((*prefix, at, *rest)), slab(at, i)
        if i < end:
            yield from _parts(entry, slab(i, i + 1), (*prefix, i), there[i])
        at = i + 1


def _chunk(entry: Entry, index: Shape) -> Tensor:
    """A file holds a whole chunk; at the far edges of the array only part of it counts."""
    header, source = entry.header, entry.present[index]
    if header.codec:
        source = coding.coded(source, header.codec, header.chunk_nbytes)
    tensor = view(source, 0, header.chunks, header.chunk_strides, header.dtype)
    for axis, (at, size, length) in enumerate(zip(header.start(index), header.chunks, header.shape, strict=True)):
        tensor = tensor.narrow(axis, 0, min(size, length - at))
    return tensor


def _entry(held: Mapping[str, Source], where: str, problems: list[str]) -> Entry:
    """An array: its header, and every other file accounted for as a chunk."""
    header = zarr2_header.read(held[HEADER], f"{where}/{HEADER}")
    present: dict[Shape, Source] = {}
    for name, source in held.items():
        if name in (HEADER, ATTRIBUTES):
            continue
        try:
            index = _index(name, header)
            _check_size(source.nbytes, header)
            present[index] = source
        except ValueError as error:
            problems.append(f"{where}/{name}: {error}")
    return Entry(header, present)


def _index(name: str, header: Header) -> Shape:
    """The place in the grid that a chunk's name says."""
    if not header.shape and name == "0":
        return ()
    index = tuple(map(int, re.split("[./]", name))) if _INDEX.fullmatch(name) else ()
    if len(index) != len(header.shape) or name != header.name_of(index):
        example = header.name_of((0,) * len(header.shape))
        raise ValueError(f"is no chunk of this array; the first is called {example}")
    if any(i >= n for i, n in zip(index, header.grid, strict=True)):
        raise ValueError(f"is outside the grid of {list(header.grid)} chunks that {HEADER} tells of")
    return index


def _check_size(size: int, header: Header) -> None:
    whole = header.chunk_nbytes
    if header.codec and not 0 < size <= whole + whole // 8 + (1 << 16):  # what does not compress grows a little
        raise ValueError(f"has {size:,} bytes, which cannot be a compressed chunk of {whole:,}")
    if not header.codec and size != whole:
        raise ValueError(f"has {size:,} bytes, expected {whole:,} of a whole chunk; is it truncated?")


def _objects(key: str, held: Mapping[str, Source]) -> dict[str, Source]:
    """The objects stored under one key."""
    if wrong := [name for name in held if not _OBJECT.fullmatch(name)]:
        raise FormatError(key, f"holds {wrong[0]}, but no {HEADER}; expected an array, or objects shard_….pt")
    return {f"{key}/{name.removesuffix('.pt')}": source for name, source in held.items()}


def _is_locks(key: str, held: Mapping[str, Source], folders: Mapping[str, Mapping[str, Source]]) -> bool:
    """Empty files, of header and chunks, that ranks had locked to write by turns: `<key>.sync` beside `<key>`."""
    of = folders.get(key.removesuffix(LOCKS), {}) if key.endswith(LOCKS) else {}
    return HEADER in of and not any(source.nbytes for source in held.values())


def _walk(home: Path, below: str, problems: list[str]) -> Iterator[tuple[str, Source]]:
    """Every file below a folder of `home`, by its path in `home`. Links to folders are not followed."""
    try:
        items = listed(home / below)
    except FormatError as error:
        problems.append(str(error))
        return
    if not items and not below.endswith(LOCKS):
        problems.append(f"{home / below}: is empty")
    for item in items:
        name = f"{below}/{item.name}" if below else item.name
        if item.is_dir(follow_symlinks=False) and name.count("/") <= zarr2_header.MAX_AXES:
            yield from _walk(home, name, problems)
            continue
        try:
            yield name, located(home, name)
        except FormatError as error:
            problems.append(str(error))


def _listed(title: str, problems: list[str]) -> str:
    more = [f"and {len(problems) - SHOWN:,} more"] if len(problems) > SHOWN else []
    return "\n  ".join([f"{title}:", *problems[:SHOWN], *more])
