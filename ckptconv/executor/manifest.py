"""`ckptconv.json`, the manifest in a result: where it came from and digests of every byte, to check it by later.

A result that is a single file has it beside itself, as `NAME.ckptconv.json`; the two may be renamed together.
It names no time, host, user or absolute path: equal inputs give equal bytes. A tensor's digest is xxh3_128 of its
bytes, or, past one piece, of its pieces' digests in order. A file's `rest` is that of its bytes that are in no tensor.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import xxhash

from ckptconv.containers import json_file
from ckptconv.errors import FormatError
from ckptconv.executor.fingerprint import manifest_path
from ckptconv.executor.units import PIECE, pieces
from ckptconv.nodes import Concat, Fold, Map, View
from ckptconv.tensor import Tensor

Result = str | os.PathLike[str]
_VERSION = 1
_BUFFER = 1 << 20
_MAX_MANIFEST = 1 << 28  # a million tensors


class TensorEntry(NamedTuple):
    """A tensor as stored: where in its file, its digest (hex), and the source files its bytes came from."""

    name: str
    offset: int
    nbytes: int
    digest: str
    origin: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FileEntry:
    path: str
    size: int
    rest: str
    tensors: tuple[TensorEntry, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest read back; `sources` are the source files and their sizes."""

    about: dict[str, Any]
    sources: dict[str, int]
    files: dict[str, FileEntry]


def render(about: dict[str, object], sources: dict[str, int], files: Iterable[bytes]) -> Iterator[bytes]:
    """The manifest's bytes; `files` are the lines of their entries."""
    head = {"manifest": _VERSION, "digest": "xxh3_128", "piece": PIECE, "about": about, "sources": sources}
    yield json.dumps(head, indent=1, sort_keys=True).removesuffix("\n}").encode() + b',\n "files": {'
    separator = b"\n"
    for lines in files:
        yield separator + lines
        separator = b",\n"
    yield b"\n }\n}\n"


def file_lines(path: str, size: int, rest: str, tensors: Iterable[str]) -> bytes:
    """A file as it stands in the manifest; `tensors` are the lines of those in it."""
    inside = ",\n".join(tensors)
    facts = f'{{"size": {size}, "rest": "{rest}", "tensors": {{'
    return (f"  {json.dumps(path)}: {facts}" + (f"\n{inside}\n  }}}}" if inside else "}}")).encode()


def tensor_line(name: str, offset: int, nbytes: int, digest: str, origin: str) -> str:
    """A tensor as it stands in the manifest; `origin` is what `Origins` gives."""
    facts = f'"offset": {offset}, "nbytes": {nbytes}, "xxh3_128": "{digest}", "from": {origin}'
    return f"   {_quoted(name)}: {{{facts}}}"


_quoted = json.encoder.encode_basestring_ascii


class Origins:
    """The source files of tensors, relative to `root`, as a list in JSON; what many have in common is worked out once."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._known: dict[tuple[str, ...], str] = {}

    def of(self, tensor: Tensor) -> str:
        """In the order of first use."""
        paths = _paths(tensor)
        known = self._known.get(paths)
        if known is None:
            known = self._known[paths] = json.dumps(list(dict.fromkeys(relative(p, self._root) for p in paths)))
        return known


def _paths(tensor: Tensor) -> tuple[str, ...]:
    """Of its sources, each once."""
    if isinstance(tensor, View):
        return (tensor.source.path,) if tensor.source.path else ()
    if isinstance(tensor, Concat):
        return tuple(dict.fromkeys(path for part in tensor.parts for path in _paths(part)))
    return _paths(tensor.child) if isinstance(tensor, Map | Fold) else ()


def relative(path: str, root: str) -> str:
    """A source's name as it may be published: never absolute, and no way out of `root`."""
    name = os.path.relpath(path, root) if root else os.path.basename(path)
    return os.path.basename(path) if name.startswith("..") else name.replace(os.sep, "/")


def digest_of(parts: Sequence[bytes]) -> str:
    """A tensor's digest, of those of its pieces."""
    return (parts[0] if len(parts) == 1 else xxhash.xxh3_128_digest(b"".join(parts))).hex()


def manifest_of(result: Result) -> str:
    """Where the manifest of a result is, if it has one."""
    if os.path.isfile(result):
        return manifest_path(os.path.realpath(result), single=True)
    return manifest_path(os.fspath(result), single=False)


def home(result: Result) -> str:
    """The folder from which its manifest names files."""
    return os.path.dirname(os.path.realpath(result)) if os.path.isfile(result) else os.fspath(result)


def read_manifest(result: Result) -> Manifest | None:
    """The manifest of a result, folder or single file, or None where there is none."""
    path = manifest_of(result)
    if not os.path.lexists(path):
        return None
    facts: Any = json_file.read(path, _MAX_MANIFEST)
    try:
        if (facts["manifest"], facts["digest"], facts["piece"]) != (_VERSION, "xxh3_128", PIECE):
            raise FormatError(path, f"is of a kind this version does not know (manifest {facts['manifest']})")
        files = {name: _file_entry(name, entry) for name, entry in facts["files"].items()}
        if os.path.isfile(result):
            files = _renamed(files, os.path.basename(os.path.realpath(result)))
        return Manifest(dict(facts["about"]), dict(facts["sources"]), files)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(path, f"is not a manifest of ckptconv ({error!r})") from None


def _renamed(files: dict[str, FileEntry], name: str) -> dict[str, FileEntry]:
    """A single file under the name it has now: the one in the manifest is a title."""
    if len(files) != 1:
        raise ValueError(f"{len(files)} files are listed, expected {name} alone")
    (entry,) = files.values()
    return {name: replace(entry, path=name)}


def _file_entry(path: str, facts: dict[str, Any]) -> FileEntry:
    if os.path.isabs(path) or ".." in path.split("/"):
        raise ValueError(f"{path!r} is outside the folder")
    tensors = tuple(
        TensorEntry(name, int(t["offset"]), int(t["nbytes"]), str(t["xxh3_128"]), tuple(t["from"]))
        for name, t in facts["tensors"].items()
    )
    return FileEntry(path, int(facts["size"]), str(facts["rest"]), tensors)


def damage(result: Result, manifest: Manifest) -> list[str]:
    """Read the whole result and say what of it is not as it was written."""
    found: list[str] = []
    buffer = bytearray(_BUFFER)
    for entry in manifest.files.values():
        path = os.path.join(home(result), entry.path)
        try:
            with open(path, "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                if size != entry.size:
                    found.append(f"{entry.path}: has {size:,} bytes, expected {entry.size:,}")
                    continue
                found += [f"{entry.path}: {problem}" for problem in _file_damage(file.fileno(), entry, buffer)]
        except OSError as error:
            found.append(f"{entry.path}: {error.strerror}")
    return found


def _file_damage(fd: int, entry: FileEntry, buffer: bytearray) -> Iterator[str]:
    rest = xxhash.xxh3_128()
    at = 0
    for tensor in sorted(entry.tensors, key=lambda t: t.offset):
        _hash_range(fd, at, tensor.offset, buffer, rest)
        at = tensor.offset + tensor.nbytes
        digests = []
        for _, lo, hi in pieces(tensor.nbytes):
            piece = xxhash.xxh3_128()
            _hash_range(fd, tensor.offset + lo, tensor.offset + hi, buffer, piece)
            digests.append(piece.digest())
        if digest_of(digests) != tensor.digest:
            yield f"tensor {tensor.name} is not the one that was written (bytes {tensor.offset}..{at})"
    _hash_range(fd, at, entry.size, buffer, rest)
    if rest.hexdigest() != entry.rest:
        yield "bytes outside the tensors are not the ones that were written"


def _hash_range(fd: int, start: int, stop: int, buffer: bytearray, into: xxhash.xxh3_128) -> None:
    view = memoryview(buffer)
    while start < stop:
        n = os.preadv(fd, [view[: min(len(view), stop - start)]], start)
        if n == 0:
            return  # the file shrank since its size was taken: the digest will tell
        into.update(view[:n])
        start += n
