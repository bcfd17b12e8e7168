"""What a plan is, told before anything is done: whether it is sound, and what must not change between two runs."""

from __future__ import annotations

import json
import marshal
import os
import posixpath
from collections.abc import Iterator
from typing import Any, NamedTuple

import xxhash

from ckptconv.errors import FormatError, PlanError
from ckptconv.nodes import Concat, Fill, Fold, Map, View
from ckptconv.plan import File, Late, Plan
from ckptconv.source import Identity, Source, identity
from ckptconv.tensor import Tensor

MANIFEST = "ckptconv.json"
OURS = ".ckptconv."  # how the names begin that are used while work goes on inside an existing folder


def manifest_path(result: str, single: bool) -> str:
    """Inside a folder, beside a single file."""
    return f"{result}.{MANIFEST}" if single else f"{result}/{MANIFEST}"


class Fingerprint(NamedTuple):
    """`digest` stands for all of it: recipes, options, each source's path, size, time; the rest says what changed."""

    digest: str
    about: dict[str, object]
    sources: dict[str, Identity]


def fingerprint(plan: Plan) -> Fingerprint:
    """Looks at every source file, opens none."""
    digest = xxhash.xxh3_128()
    numbers = _Numbers()
    for file in plan.files:
        segments = [(offset, name, _recipe(body, numbers)) for offset, body, name in file.segments]
        digest.update(marshal.dumps((file.path, file.size, file.final, segments), 2))
    for check in plan.checks:
        digest.update(marshal.dumps((check.name, _recipe(check.kept, numbers), _recipe(check.copy, numbers)), 2))
    sources = {os.path.abspath(path): numbers.checked(path) for path in numbers.ends}
    about = json.dumps(plan.about, sort_keys=True)
    digest.update(json.dumps([about, list(sources.items()), plan.single]).encode())
    return Fingerprint(digest.hexdigest(), json.loads(about), sources)


class _Numbers:
    """Numbers source files, and remembers how much of each is read."""

    def __init__(self) -> None:
        self.ends: dict[str, int] = {}
        self._numbers: dict[str, int] = {}

    def of(self, source: Source) -> int:
        """Of a coded file it is not known here how long it must be; what is generated has no file."""
        path, offset, nbytes, coding = source
        number = self._numbers.get(path)
        if number is None:
            if not path:
                return -1
            number = self._numbers[path] = len(self._numbers)
            self.ends[path] = 0
        if not coding and offset + nbytes > self.ends[path]:
            self.ends[path] = offset + nbytes
        return number

    def checked(self, path: str) -> Identity:
        """The file's identity; an error if it is shorter than what will be read of it."""
        known = identity(path)
        if known.size < self.ends[path]:
            raise FormatError(path, f"has {known.size:,} bytes, {self.ends[path]:,} are expected; is it truncated?")
        return known


def _recipe(body: Tensor | bytes | Late, numbers: _Numbers) -> Any:
    """What makes the bytes, as plain tuples; sources are numbered, so that a long path is hashed once."""
    if isinstance(body, View):
        source = body.source
        return body.dtype.name, numbers.of(source), source.coding, source.offset + body.offset, body.shape, body.strides
    if isinstance(body, bytes):
        return body
    if isinstance(body, Late):
        return body.template, body.crcs
    if isinstance(body, Concat):
        return "concat", body.axis, [_recipe(part, numbers) for part in body.parts]
    if isinstance(body, Fold):
        return "fold", body.axis, _recipe(body.child, numbers)
    if isinstance(body, Map):
        return "map", repr(body.fn), body.dtype.name, _recipe(body.child, numbers)
    assert isinstance(body, Fill), body
    return "fill", body.dtype.name, body.shape, body.bits


def changed_sources(sources: dict[str, Identity]) -> list[str]:
    """Source files that are no longer what they were, and how."""
    now = {path: identity(path) if os.path.exists(path) else None for path in sources}
    return list(_source_changes(dict(sources), now))


def differences(old: Fingerprint, new: Fingerprint) -> list[str]:
    """What makes two plans differ, in words."""
    before, after = dict(_flat(old.about, "")), dict(_flat(new.about, ""))
    found = [
        f"{name} was {before.get(name, 'not set')}, is now {after.get(name, 'not set')}"
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]
    paths = dict.fromkeys([*old.sources, *new.sources])
    found += _source_changes({p: old.sources.get(p) for p in paths}, {p: new.sources.get(p) for p in paths})
    return found or ["the files to write, or how they are put together"]


def _source_changes(before: dict[str, Identity | None], after: dict[str, Identity | None]) -> Iterator[str]:
    for path, old in before.items():
        new = after[path]
        if new == old:
            continue
        if old is None or new is None:
            yield f"{path} is {'new' if old is None else 'gone'}"
        elif old.size != new.size:
            yield f"{path} had {old.size:,} bytes, has now {new.size:,}"
        else:
            yield f"{path} was modified"


def _flat(value: object, name: str) -> Iterator[tuple[str, str]]:
    """Nested options as (dotted name, value as text)."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, json.dumps(value)


def validate(plan: Plan) -> None:
    """Refuse, before the first byte, a plan that would not give the files it promises, or would write elsewhere."""
    if plan.single and [file.final for file in plan.files] != [False]:
        raise PlanError(f"the plan of a single file has {len(plan.files)} files, expected one that is not final")
    seen: set[str] = set()
    for file in plan.files:
        path = file.path
        if path != posixpath.normpath(path) or path.startswith(("/", "..", OURS)) or path in (".", MANIFEST):
            raise PlanError(f"the plan would write {path!r}, which is no name for a file of a checkpoint")
        if path in seen:
            raise PlanError(f"the plan writes {path} twice")
        seen.add(path)
        _validate_file(file)
    for path in seen:
        folder = posixpath.dirname(path)
        while folder:
            if folder in seen:
                raise PlanError(f"the plan uses {folder} as a file and as a folder")
            folder = posixpath.dirname(folder)
    for check in plan.checks:
        if (check.kept.shape, check.kept.dtype) != (check.copy.shape, check.copy.dtype):
            raise PlanError(f"{check.name}: copies of unlike shape or dtype cannot be compared ({check.where})")


def _validate_file(file: File) -> None:
    """Segments must tile it; names within it must differ; checksums must be of segments that have their bytes first."""
    at = 0
    names: set[str] = set()
    for segment in file.segments:
        offset, body, name = segment
        if offset != at:
            raise PlanError(f"{file.path}: a segment begins at byte {offset}, expected {at}: a gap or an overlap")
        at += segment.nbytes
        if isinstance(body, Tensor):
            if name in names:
                raise PlanError(f"{file.path}: two tensors are called {name!r}")
            names.add(name)
        elif isinstance(body, Late):
            for position, index in body.crcs:
                of = file.segments[index].body if 0 <= index < len(file.segments) else body
                if not 0 <= position <= body.nbytes - 4 or isinstance(of, Late):
                    raise PlanError(
                        f"{file.path}: a checksum at {position} of a segment of {body.nbytes} bytes cannot be"
                    )
    if at != file.size:
        raise PlanError(f"{file.path}: its segments end at byte {at}, its size is {file.size}")
