"""What the files of a distributed checkpoint hold, as plain data from metadata alone, be it sound or not."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable
from collections.abc import Mapping as Dict
from pathlib import Path

from ckptconv.containers import dcp, zarr2
from ckptconv.containers.chunk_grid import Grid, grid
from ckptconv.containers.dcp_metadata import NAME
from ckptconv.dtypes import DType
from ckptconv.source import Source
from ckptconv.tensor import Shape

Facts = dict[str, object]

_NUMBER = re.compile(r"(\d{1,18})", re.ASCII)
_SHARD = re.compile(r"/shard_[^/]*$")


def torch_dist(folder: Path, known: Collection[str]) -> Facts:
    """A folder of .distcp files. `known` are the other files that belong to it; what else lies there is unused."""
    found, problems = dcp.examine(folder)
    chunks: Counter[str] = Counter()
    rows = []
    for key, entry in found.tensors.items():
        boxes = [tuple((o, o + n) for o, n in zip(c.offset, c.shape, strict=True)) for c in entry.chunks]
        rows.append(_tensor(key, entry.dtype, entry.shape, grid(entry.shape, boxes)))
        chunks.update(_name(chunk.item) for chunk in entry.chunks)
    objects = Counter(_name(item) for item in found.objects.values())
    names = {*chunks, *objects, *(path.name for path in folder.glob(f"*{dcp.SUFFIX}"))}
    files: list[Facts] = [
        {"file": name, "bytes": _size(folder / name), "chunks": chunks[name], "objects": objects[name]}
        for name in sorted(names, key=_by_numbers)
    ]
    unused = [_unused(_name(source), source.offset, source.nbytes) for source in found.unused]
    return _facts("torch_dist", rows, files, found.objects, [*unused, *_strange(folder, {*known, *names})], problems)


def zarr(folder: Path, known: Collection[str]) -> Facts:
    """A folder of arrays; its files are told by array, of which each has its own folder."""
    found, problems = zarr2.examine(folder)
    rows, files = [], list[Facts]()
    for key, entry in found.tensors.items():
        row = _tensor(key, entry.dtype, entry.shape, _regular(entry))
        rows.append({**row, "missing": entry.missing} if entry.missing else row)
        nbytes = sum(source.nbytes for source in entry.present.values())
        files.append({"file": f"{key}/", "bytes": nbytes, "chunks": len(entry.present), "objects": 0})
    return _facts("zarr", rows, files, found.objects, list(_strange(folder, {*known, *_folders(found)})), problems)


def _facts(
    backend: str,
    tensors: list[Facts],
    files: list[Facts],
    objects: Dict[str, Source],
    unused: list[Facts],
    problems: list[str],
) -> Facts:
    return {
        "backend": backend, "tensors": tensors, "files": files, "objects": _groups(objects), "unused": unused,
        "problems": problems,
    }  # fmt: skip


def _tensor(key: str, dtype: DType, shape: Shape, lie: Grid) -> Facts:
    row: Facts = {"name": key, "dtype": dtype.name, "shape": list(shape), "chunks": lie.boxes}
    if lie.counts is None or lie.chunk is None:
        return {**row, "irregular": lie.why}
    return {**row, "grid": list(lie.counts), "chunk": list(lie.chunk)}


def _regular(entry: zarr2.Entry) -> Grid:
    """zarr knows no other chunks; at the far edges they reach beyond the array."""
    counts = entry.header.grid
    chunk = tuple(min(size, n) for size, n in zip(entry.chunks, entry.shape, strict=True))
    return Grid(counts, chunk, math.prod(counts))


def _groups(objects: Dict[str, Source]) -> list[Facts]:
    """Objects that are parts of one (`KEY/shard_0_4`, `KEY/shard_1_4`, …) in one row."""
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for key, source in objects.items():
        base = _SHARD.sub("", key)
        counts[base] += 1
        sizes[base] += source.nbytes
    return [{"name": base, "objects": count, "bytes": sizes[base]} for base, count in counts.items()]


def _strange(folder: Path, used: Collection[str]) -> Iterable[Facts]:
    for path in sorted(folder.iterdir()):
        if path.name not in used and path.name != NAME:
            yield _unused(path.name + "/" * path.is_dir(), 0, _size(path))


def _folders(found: zarr2.Zarr) -> set[str]:
    """The folders of arrays and objects, and of the locks beside arrays."""
    arrays = set(found.tensors)
    return arrays | {key + zarr2.LOCKS for key in arrays} | {_SHARD.sub("", key) for key in found.objects}


def _unused(name: str, start: int, nbytes: int | None) -> Facts:
    return {"file": name, "start": start, "bytes": nbytes}


def _by_numbers(name: str) -> list[tuple[int, str]]:
    """Process 2 before process 10."""
    return [(int(part) if i % 2 else -1, part) for i, part in enumerate(_NUMBER.split(name))]


def _name(source: Source) -> str:
    return source.path.rpartition("/")[2]


def _size(path: Path) -> int | None:
    """Bytes of a file; None where there is none."""
    return path.stat().st_size if path.is_file() else None
