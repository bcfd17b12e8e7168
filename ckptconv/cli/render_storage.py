"""How a distributed checkpoint files its tensors, as lines for people: alike ones in one line."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from ckptconv.sizes import human

SHOWN = 200  # lines of one kind
Rows = Sequence[dict[str, Any]]

_NUMBER = re.compile(r"(?<=\.)\d+(?=[./]|$)")


def lines(facts: dict[str, Any]) -> Iterator[str]:
    """All there is to say of the storage of a checkpoint."""
    tensors, files, objects = facts["tensors"], facts["files"], facts["objects"]
    chunks, held = sum(row["chunks"] for row in tensors), sum(row["objects"] for row in objects)
    counts = [(len(tensors), "tensor"), (chunks, "chunk"), (held, "object")]
    if facts["backend"] != "zarr":  # where each chunk is a file
        counts.append((len(files), "file"))
    yield f"stored as {facts['backend']}: " + ", ".join(_count(n, word) for n, word in counts)
    yield from _first(_tensors(tensors))
    yield from _first([_file(row) for row in files])
    yield from _first(_objects(objects))
    yield from _first([f"unused: {_unused(row)}" for row in facts["unused"]])


def _first(every: Sequence[str]) -> Iterator[str]:
    yield from (f"  {line}" for line in every[:SHOWN])
    if len(every) > SHOWN:
        yield f"  and {len(every) - SHOWN} more (--json lists all)"


def _tensors(rows: Rows) -> list[str]:
    """Tensors of the same form whose names differ in numbers alone share a line."""
    groups: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        groups.setdefault((_pattern(row["name"]), _form(row)), []).append(row["name"])
    return [f"{_named(pattern, names)}  {form}" for (pattern, form), names in groups.items()]


def _objects(rows: Rows) -> list[str]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(_pattern(row["name"]), []).append(row)
    out = []
    for pattern, alike in groups.items():
        count, nbytes = (sum(row[word] for row in alike) for word in ("objects", "bytes"))
        out.append(f"{_named(pattern, [row['name'] for row in alike])}  {_count(count, 'object')}, {human(nbytes)}")
    return out


def _pattern(name: str) -> str:
    return _NUMBER.sub("*", name)


def _named(pattern: str, names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{pattern} ({len(names)})"


def _form(row: dict[str, Any]) -> str:
    head = f"{row['dtype']} {row['shape']} in"
    missing = f", of which {row['missing']} are not there" if row.get("missing") else ""
    if "irregular" in row:
        return f"{head} {row['chunks']} boxes: {row['irregular']}{missing}"
    counts = list(row["grid"])
    if math.prod(counts) == 1:
        return f"{head} 1 chunk{missing}"
    while counts[-1] == 1:
        counts.pop()
    return f"{head} {'x'.join(map(str, counts))} chunks of {row['chunk']}{missing}"


def _file(row: dict[str, Any]) -> str:
    size = "is missing" if row["bytes"] is None else human(row["bytes"])
    held = [_count(row[word], word[:-1]) for word in ("chunks", "objects") if row[word]]
    return f"{row['file']}  {size}  {', '.join(held) or 'nothing'}"


def _unused(row: dict[str, Any]) -> str:
    size = "" if row["bytes"] is None else human(row["bytes"])
    return f"{row['file']}  {size}" + (f" at byte {row['start']}" if row["start"] else "")


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
